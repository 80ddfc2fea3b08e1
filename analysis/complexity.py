"""Parameters and multiply-accumulates of registered models.

    python -m analysis.complexity                         # every model at 224 px
    python -m analysis.complexity --model slak_t kernel_size=31,29,27,13,5 --input-size 384
"""
import argparse
import copy
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

import models
from utils.config import Parser
from utils.errors import UserError
from utils.registry import parse_spec


def count_macs(model: models.VisionModel, input_size: int) -> int:
    """Multiply-accumulates of one image, in convolutions and matrix products (what tables of
    papers call FLOPs). Computed on shapes alone; `model` is left as it is."""
    model = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, input_size, input_size, device="meta"))
    return counter.get_total_flops() // 2


def table(specs: list[list[str]], num_classes: int, input_size: int) -> str:
    """A Markdown table, one row per `NAME key=value ...`."""
    rows = ["| model | parameters | MACs | input | stages |", "|---|---:|---:|---:|---|"]
    for words in specs:
        name, options = parse_spec(words, "--model")
        with torch.device("meta"):
            model = models.create_model(name, num_classes, **options)
        size = model.input_size or input_size
        stages = ", ".join(f"{info.channels}/{info.stride}" for info in model.feature_info)
        rows.append(f"| {' '.join(words)} | {model.num_parameters:,} | "
                    f"{count_macs(model, size) / 1e9:.3f} G | {size} | {stages} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="analysis.complexity", description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", action="append", metavar="NAME",
                        help="NAME [key=value ...], may be repeated (default: all)")
    parser.add_argument("--num-classes", type=int, default=1000, help="classes")
    parser.add_argument("--input-size", type=int, default=224, help="pixels")
    try:
        args: argparse.Namespace = parser.parse(sys.argv[1:] if argv is None else argv)
        specs = args.model or [[name] for name in models.list_models()]
        print(table(specs, args.num_classes, args.input_size))
    except UserError as error:
        print(f"analysis.complexity: error: {error}", file=sys.stderr)
        return 2
    print("\nMACs: convolutions and matrix products of one image. Stages: channels/stride.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
