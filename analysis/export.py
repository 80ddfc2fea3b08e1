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
from utils.config import Parser
from utils.registry import UserError


def build_parser() -> Parser:
    parser = Parser(prog="analysis.export", description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--checkpoint", type=Path, metavar="FILE", help="of train_kd.py")
    flag("--model", nargs="+", metavar="NAME", help="NAME [key=value ...], with --weights")
    flag("--weights", metavar="SOURCE", help="path, URL or published")
    flag("--weights-key", metavar="KEY", help="model, or model_ema for the averaged weights")
    flag("--num-classes", type=int, default=1000, help="of --weights")
    flag("--out", type=Path, required=True, metavar="FILE", help="a file that does not exist yet")
    return parser


def export(model: models.VisionModel, out: Path) -> None:
    """Write the state dict of the equal ConvNeXt under `model`, as published files have it."""
    if not hasattr(model, "convnext_state"):
        raise UserError(f"{type(model).__name__} is no ConvNeXt with BatchNorm.")
    if out.exists() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} must be a file that does not exist yet, in a folder that "
                        "does.")
    save_atomically({"model": model.convnext_state()}, out)
    depths, dims = ([",".join(map(str, numbers)) for numbers in (
        model.depths, [info.channels for info in model.feature_info])])
    scale = "" if any(name.endswith(".gamma") for name in model.state_dict()) else (
        " layer_scale_init=0")
    print(f"written to {out}\npython eval.py --model convnext_t depths={depths} dims={dims}{scale} "
          f"--num-classes {model.num_classes} --weights {out} ...")


def main(argv: list[str] | None = None) -> int:
    try:
        args: argparse.Namespace = build_parser().parse(sys.argv[1:] if argv is None else argv)
        if (args.checkpoint is None) == (args.model is None) or bool(args.model) != bool(
                args.weights):
            raise UserError("give either --checkpoint FILE, or --model NAME with --weights SOURCE.")
        if args.checkpoint:
            model = load_trained(args.checkpoint, args.weights_key).model
        else:
            if args.weights == "random":
                raise UserError("--weights random has nothing to export; name a file.")
            model = load_named(args.model, args.weights, args.weights_key, args.num_classes)
        export(model, args.out)
    except UserError as error:
        print(f"analysis.export: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
