"""Write a ConvNeXt with BatchNorm (an L2S student) as the exact original ConvNeXt.

    python -m analysis.export --checkpoint runs/NAME/checkpoint-best.pth --out l2s_t.pth
    python -m analysis.export --model convnext_t_bn --weights published --out l2s_t.pth
    python eval.py --model convnext_t --weights l2s_t.pth --data-path IMAGENET   # the same logits
"""
import argparse
import sys
from pathlib import Path

import models
from models.weights import load_named, load_trained
from utils.checkpoint import save_atomically
from utils.config import Parser, at_least, program
from utils.registry import UserError


def export(model: models.VisionModel, out: Path) -> None:
    """Write the state dict of the equal ConvNeXt under `model`, as published files have it."""
    if not hasattr(model, "convnext_state"):
        raise UserError(f"{type(model).__name__} is no ConvNeXt with BatchNorm.")
    if out.exists() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} must be a file that does not exist yet, in a folder that "
                        "does.")
    save_atomically({"model": model.convnext_state()}, out)
    spec = ["convnext_t", f"depths={','.join(map(str, model.depths))}",
            f"dims={','.join(str(info.channels) for info in model.feature_info)}"]
    if not any(name.endswith(".gamma") for name in model.state_dict()):
        spec.append("layer_scale_init=0")
    print(f"written to {out}\npython eval.py --model {' '.join(spec)} "
          f"--num-classes {model.num_classes} --weights {out} ...")


def build_parser() -> Parser:
    parser = Parser(prog="analysis.export", description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--checkpoint", type=Path, metavar="FILE", help="of train_kd.py")
    flag("--model", nargs="+", metavar="NAME", help="NAME [key=value ...], with --weights")
    flag("--weights", metavar="SOURCE", help="path, URL or published")
    flag("--weights-key", metavar="KEY", help="model, or model_ema for the averaged weights")
    flag("--num-classes", type=at_least(1), default=1000, help="of --weights")
    flag("--out", type=Path, required=True, metavar="FILE", help="a file that does not exist yet")
    return parser


@program("analysis.export", build_parser)
def main(args: argparse.Namespace) -> int:
    has_weights = args.model is not None and args.weights is not None
    has_half = (args.model is None) != (args.weights is None)
    if has_half or has_weights == (args.checkpoint is not None):
        raise UserError("give either --checkpoint FILE, or --model NAME with --weights SOURCE.")
    if args.weights == "random":
        raise UserError("--weights random has nothing to export; name a file.")
    if args.checkpoint:
        model = load_trained(args.checkpoint, args.weights_key).model
    else:
        model = load_named(args.model, args.weights, args.weights_key, args.num_classes)
    export(model, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
