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
from torch.utils.flop_counter import flop_registry

import models
from models.base import VisionModel, model_from_spec, run_on_shapes
from models.sparsity import erk_densities, maskable
from models.weights import load_named, load_trained
from utils.config import Parser, at_least, below_one, program
from utils.log import markdown_table
from utils.registry import UserError

ACTIVATIONS = "(activations with each other)"  # attention
REST = "(norms, scales, embeddings)"


class MacsByWeight(TorchDispatchMode):
    """Counts as FlopCounterMode does, but under the name of the parameter that an operation reads,
    whichever module called it and whatever view of it was taken."""

    def __init__(self, model: VisionModel) -> None:
        super().__init__()
        self.names = {storage(weight): name for name, weight in model.named_parameters()}
        self.macs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=result)
            read = [self.names.get(storage(value)) for value in args
                    if isinstance(value, torch.Tensor) and value.dim() > 1]
            self.macs[next(filter(None, read), ACTIVATIONS)] += flops // 2
        return result


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # tensors without data have no address


class Layer(NamedTuple):
    """Counts of one module's own parameters, or of what belongs to none."""

    name: str
    shape: str  # of its weight
    parameters: int
    nonzero: int
    macs: int
    sparse_macs: float  # in proportion to the weight's nonzero share


def count_layers(model: VisionModel, input_size: int, nonzero: Mapping[str, int]) -> list[Layer]:
    """One row per module that multiplies by a weight, then one for all other parameters and one for
    products of activations. `nonzero`: by name of the parameter; all where it is not listed."""
    model = copy.deepcopy(model).to("meta")
    with MacsByWeight(model) as counter:
        run_on_shapes(model, input_size)
    attention = counter.macs.pop(ACTIVATIONS, 0)
    multiplying = {owner_of(name) for name, macs in counter.macs.items() if macs}
    rows: dict[str, Layer] = {}
    for name, weight in model.named_parameters():
        macs, live = counter.macs[name], nonzero.get(name, weight.numel())
        owner = owner_of(name) if owner_of(name) in multiplying else REST
        row = rows.get(owner, Layer(owner, "-", 0, 0, 0, 0.0))
        rows[owner] = row._replace(
            shape="x".join(map(str, weight.shape)) if macs else row.shape,
            parameters=row.parameters + weight.numel(), nonzero=row.nonzero + live,
            macs=row.macs + macs, sparse_macs=row.sparse_macs + macs * live / weight.numel())
    layers = [row for row in rows.values() if row.name != REST]
    if REST in rows:
        layers.append(rows[REST])
    if attention:
        layers.append(Layer(ACTIVATIONS, "-", 0, 0, attention, attention))
    return layers


def owner_of(parameter: str) -> str:
    """The name of the module that has the parameter."""
    return parameter.rpartition(".")[0]


def count_nonzero(model: VisionModel) -> dict[str, int]:
    """Of every weight of two or more dimensions."""
    return {name: int(weight.count_nonzero()) for name, weight in model.named_parameters()
            if weight.dim() > 1}


def expected_nonzero(model: VisionModel, sparsity: float, init: str) -> dict[str, int]:
    """What sparse training at this sparsity would leave, uniform or by ERK. (SNIP's densities
    depend on weights and images.)"""
    shapes = {name: tuple(weight.shape) for name, weight in maskable(model).items()}
    densities = dict.fromkeys(shapes, 1 - sparsity)
    if init == "erk":
        densities = erk_densities(shapes, 1 - sparsity)
    return {name: round(densities[name] * model.get_parameter(name).numel()) for name in shapes}


def layer_table(layers: list[Layer]) -> str:
    """A Markdown table with a row of totals."""
    total = Layer("**total**", "", *(sum(column) for column in list(zip(*layers))[2:]))
    header = ["layer", "weight", "parameters", "nonzero", "10^6 MACs", "of nonzero weights"]
    rows = [[layer.name, layer.shape, f"{layer.parameters:,}", f"{layer.nonzero:,}",
             f"{layer.macs / 1e6:,.3f}", f"{layer.sparse_macs / 1e6:,.3f}"]
            for layer in [*layers, total]]
    return markdown_table(header, rows, num_text_columns=2)


def table(specs: list[list[str]], num_classes: int, input_size: int | None = None) -> str:
    """A Markdown table, one row per `NAME key=value ...`, at `input_size` or each at its own."""
    rows = []
    for spec in specs:
        model = meta_model(spec, num_classes)
        size = input_size or model.input_size
        stages = ", ".join(f"{info.channels}/{info.stride}" for info in model.feature_info)
        rows.append([" ".join(spec), f"{model.num_parameters:,}",
                     f"{model.count_macs(size) / 1e9:.3f} G", str(size), stages])
    return markdown_table(["model", "parameters", "MACs", "input", "stages"], rows)


def meta_model(spec: list[str], num_classes: int) -> VisionModel:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return model_from_spec(spec, "--model", num_classes)


def build_parser() -> Parser:
    parser = Parser(prog="analysis.complexity", description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--model", nargs="+", metavar="NAME",
         help="NAME [key=value ...], layer by layer (default: an overview of all models)")
    flag("--weights", metavar="SOURCE", help="of --model, to count its zeros: path, URL, published")
    flag("--checkpoint", type=Path, metavar="FILE", help="of train_kd.py, to count its zeros")
    flag("--weights-key", metavar="KEY", help="model, or model_ema for the averaged weights")
    flag("--sparsity", type=below_one, default=0.0, help="of --model without weights")
    flag("--sparse-init", choices=["uniform", "erk"], default="uniform", help="for --sparsity")
    flag("--num-classes", type=at_least(1), default=1000, help="of --model")
    flag("--input-size", type=at_least(1), default=None,
         help="pixels; by default what the checkpoint or the model was trained at")
    return parser


@program("analysis.complexity", build_parser)
def main(args: argparse.Namespace) -> int:
    if args.checkpoint:
        is_contradicting = args.model or args.weights or args.sparsity
    elif args.model:
        is_contradicting = args.weights and args.sparsity
    else:
        is_contradicting = args.weights or args.sparsity
    if is_contradicting:
        raise UserError("give --checkpoint FILE; or --model NAME, alone, with --weights SOURCE or "
                        "with --sparsity S (and --sparse-init); or none of them.")
    if args.checkpoint:
        trained = load_trained(args.checkpoint, args.weights_key)
        model, size = trained.model, trained.preprocessing()["input_size"]
        nonzero = count_nonzero(model)
    elif args.weights:
        model = load_named(args.model, args.weights, args.weights_key, args.num_classes)
        size, nonzero = model.input_size, count_nonzero(model)
    elif args.model:
        model = meta_model(args.model, args.num_classes)
        size = model.input_size
        nonzero = expected_nonzero(model, args.sparsity, args.sparse_init)
    else:
        specs = [[name] for name in models.list_models()]
        print(table(specs, args.num_classes, args.input_size))
        print("\nMACs: convolutions and matrix products of one image. Stages: channels/stride.")
        return 0
    size = args.input_size or size
    print(f"{size} px\n\n{layer_table(count_layers(model, size, nonzero))}\n")
    print("MACs: convolutions and matrix products of one image; of nonzero weights: in proportion "
          "to each weight's share.\nBiases and norms count as nonzero.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
