"""Parameters and multiply-accumulates of networks, dense and with the zeros of sparse training left
out.

    python -m analysis.complexity                               # every model, one row each
    python -m analysis.complexity --model slak_t kernel_size=31,29,27,13,5 --input-size 384
    python -m analysis.complexity --model slak_b --sparsity 0.4
    python -m analysis.complexity --checkpoint runs/NAME/checkpoint-best.pth
"""
import argparse
import copy
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import models
from models.sparsity import erk_densities, maskable
from models.weights import load_named, load_trained
from utils.config import Parser
from utils.registry import UserError, one_line, parse_spec

ACTIVATIONS = "(activations with each other)"  # attention
REST = "(norms, scales, embeddings)"


def count_macs(model: models.VisionModel, input_size: int) -> int:
    """Multiply-accumulates of one image, in convolutions and matrix products (what tables of
    papers call FLOPs). Computed on shapes alone; `model` is left as it is."""
    with FlopCounterMode(display=False) as counter:
        _run_on_shapes(copy.deepcopy(model).to("meta"), input_size)
    return counter.get_total_flops() // 2


@torch.no_grad()
def _run_on_shapes(model: models.VisionModel, input_size: int) -> None:
    if model.input_size not in (None, input_size):
        raise UserError(f"the model takes {model.input_size} px only, and --input-size is "
                        f"{input_size}.")
    try:
        model.eval()(torch.empty(1, 3, input_size, input_size, device="meta"))
    except RuntimeError as error:
        raise UserError(f"the model does not run at --input-size {input_size}: "
                        f"{one_line(error)}.") from error


class _MacsByWeight(TorchDispatchMode):
    """Counts as FlopCounterMode does, but under the name of the parameter that an operation reads,
    whichever module called it and whatever view of it was taken."""

    def __init__(self, model: models.VisionModel) -> None:
        super().__init__()
        self.names = {_storage(weight): name for name, weight in model.named_parameters()}
        self.macs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=result)
            read = [self.names.get(_storage(value)) for value in args
                    if isinstance(value, torch.Tensor) and value.dim() > 1]
            self.macs[next(filter(None, read), ACTIVATIONS)] += flops // 2
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # tensors without data have no address


class Layer(NamedTuple):
    """Counts of one module's own parameters, or of what belongs to none."""

    name: str
    shape: str  # of its weight
    parameters: int
    nonzero: int
    macs: int
    sparse_macs: float  # in proportion to the weight's nonzero share


def count_layers(model: models.VisionModel, input_size: int,
                 nonzero: Mapping[str, int]) -> list[Layer]:
    """One row per module that multiplies by a weight, then one for all other parameters and one for
    products of activations. `nonzero`: by name of the parameter; all where it is not listed."""
    model = copy.deepcopy(model).to("meta")
    with _MacsByWeight(model) as counter:
        _run_on_shapes(model, input_size)
    rows: dict[str, Layer] = {}
    for name, weight in model.named_parameters():
        macs, live = counter.macs[name], nonzero.get(name, weight.numel())
        owner = name.rpartition(".")[0] if _multiplies(counter.macs, name) else REST
        row = rows.get(owner, Layer(owner, "-", 0, 0, 0, 0.0))
        rows[owner] = row._replace(
            shape="x".join(map(str, weight.shape)) if macs else row.shape,
            parameters=row.parameters + weight.numel(), nonzero=row.nonzero + live,
            macs=row.macs + macs, sparse_macs=row.sparse_macs + macs * live / weight.numel())
    attention = counter.macs[ACTIVATIONS]
    last = [rows.pop(REST, None), attention and Layer(ACTIVATIONS, "-", 0, 0, attention, attention)]
    return [*rows.values(), *filter(None, last)]


def _multiplies(macs: Mapping[str, int], name: str) -> bool:
    """Whether the module that has this parameter multiplies by it or by another of its own."""
    owner = name.rpartition(".")[0]
    return any(count and other.rpartition(".")[0] == owner
               for other, count in macs.items() if other != ACTIVATIONS)


def count_nonzero(model: models.VisionModel) -> dict[str, int]:
    """Of every weight of two or more dimensions."""
    return {name: int(weight.count_nonzero()) for name, weight in model.named_parameters()
            if weight.dim() > 1}


def expected_nonzero(model: models.VisionModel, sparsity: float, init: str) -> dict[str, int]:
    """What sparse training at this sparsity would leave, uniform or by ERK. (SNIP's densities
    depend on weights and pictures.)"""
    shapes = {name: tuple(weight.shape) for name, weight in maskable(model).items()}
    densities = dict.fromkeys(shapes, 1 - sparsity)
    if init == "erk":
        densities = erk_densities(shapes, 1 - sparsity)
    return {name: round(densities[name] * model.get_parameter(name).numel()) for name in shapes}


def layer_table(layers: list[Layer]) -> str:
    """A Markdown table with a row of totals."""
    total = Layer("**total**", "", *(sum(column) for column in list(zip(*layers))[2:]))
    rows = ["| layer | weight | parameters | nonzero | 10^6 MACs | of nonzero weights |",
            "|---|---|---:|---:|---:|---:|"]
    for layer in [*layers, total]:
        rows.append(f"| {layer.name} | {layer.shape} | {layer.parameters:,} | {layer.nonzero:,} | "
                    f"{layer.macs / 1e6:,.3f} | {layer.sparse_macs / 1e6:,.3f} |")
    return "\n".join(rows)


def native_size(model: models.VisionModel) -> int:
    return model.input_size or model.native_size or 224


def table(specs: list[list[str]], num_classes: int, input_size: int | None = None) -> str:
    """A Markdown table, one row per `NAME key=value ...`, at `input_size` or each at its own."""
    rows = ["| model | parameters | MACs | input | stages |", "|---|---:|---:|---:|---|"]
    for words in specs:
        model = meta_model(words, num_classes)
        size = input_size or native_size(model)
        stages = ", ".join(f"{info.channels}/{info.stride}" for info in model.feature_info)
        rows.append(f"| {' '.join(words)} | {model.num_parameters:,} | "
                    f"{count_macs(model, size) / 1e9:.3f} G | {size} | {stages} |")
    return "\n".join(rows)


def meta_model(words: list[str], num_classes: int) -> models.VisionModel:
    name, options = parse_spec(words, "--model")
    with torch.device("meta"):
        return models.create_model(name, num_classes, **options)


def build_parser() -> Parser:
    parser = Parser(prog="analysis.complexity", description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--model", nargs="+", metavar="NAME",
         help="NAME [key=value ...], layer by layer (default: an overview of all models)")
    flag("--weights", metavar="SOURCE", help="of --model, to count its zeros: path, URL, published")
    flag("--checkpoint", type=Path, metavar="FILE", help="of train_kd.py, to count its zeros")
    flag("--weights-key", metavar="KEY", help="model, or model_ema for the averaged weights")
    flag("--sparsity", type=float, default=0.0, help="of --model without weights")
    flag("--sparse-init", choices=["uniform", "erk"], default="uniform", help="for --sparsity")
    flag("--num-classes", type=int, default=1000, help="of --model")
    flag("--input-size", type=int, default=None, help="by default the checkpoint's, else 224 px")
    return parser


# What may stand together, beside --input-size.
COMBINATIONS = [{"num_classes"}, {"model", "num_classes"}, {"checkpoint", "weights_key"},
                {"model", "num_classes", "weights", "weights_key"},
                {"model", "num_classes", "sparsity", "sparse_init"}]
NEEDED = {"weights": "model", "sparsity": "model", "sparse_init": "sparsity"}


def check_flags(given: set[str], sparsity: float, input_size: int | None) -> None:
    """`given`: the flags on the command line, which must mean something together."""
    if not 0 <= sparsity < 1:
        raise UserError(f"--sparsity must lie in [0, 1), got {sparsity}.")
    if input_size is not None and input_size < 1:
        raise UserError(f"--input-size must be at least 1, got {input_size}.")
    flags = given - {"input_size", "config"}
    if not any(flags <= allowed for allowed in COMBINATIONS) or any(
            flag in flags and other not in flags for flag, other in NEEDED.items()) or (
            "weights_key" in flags and not flags & {"weights", "checkpoint"}):
        raise UserError("give --checkpoint FILE; or --model NAME, alone, with --weights SOURCE or "
                        "with --sparsity S (and --sparse-init); or none of them.")


def print_layers(model: models.VisionModel, input_size: int, nonzero: Mapping[str, int]) -> None:
    print(f"{input_size} px\n\n{layer_table(count_layers(model, input_size, nonzero))}\n")
    print("MACs: convolutions and matrix products of one image; of nonzero weights: in proportion "
          "to each weight's share.\nBiases and norms count as nonzero.")


def main(argv: list[str] | None = None) -> int:
    try:
        args: argparse.Namespace = build_parser().parse(sys.argv[1:] if argv is None else argv)
        check_flags({*args.given}, args.sparsity, args.input_size)
        if args.checkpoint:
            model, settings, _ = load_trained(args.checkpoint, args.weights_key)
            print_layers(model, args.input_size or settings["input_size"], count_nonzero(model))
        elif args.weights:
            model = load_named(args.model, args.weights, args.weights_key, args.num_classes)
            print_layers(model, args.input_size or native_size(model), count_nonzero(model))
        elif args.model:
            model = meta_model(args.model, args.num_classes)
            print_layers(model, args.input_size or native_size(model),
                         expected_nonzero(model, args.sparsity, args.sparse_init))
        else:
            specs = [[name] for name in models.list_models()]
            print(table(specs, args.num_classes, args.input_size))
            print("\nMACs: convolutions and matrix products of one image. Stages: channels/stride.")
    except UserError as error:
        print(f"analysis.complexity: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
