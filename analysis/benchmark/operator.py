"""The large depthwise convolutions of a SLaK, by every backend that runs here.

    python -m analysis.benchmark operator --batch-size 8                 # slak_t's stages
    python -m analysis.benchmark operator --dtype bf16 --batch-size 64 --device cuda
    python -m analysis.benchmark operator --only-sum --shape 124 56 56 --kernel 51 5

"published" is F.conv2d with its own gradient on contiguous maps, the baseline of all ratios. Each
branch has a gradient of its own, as under BatchNorms. With --only-sum it is the folded pair of
inference: its forward pass without gradient history, and its backward pass with one gradient.
"""
import argparse
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import engine
import models
from analysis.benchmark import common
from models.base import model_from_spec
from models.large_kernel import dense
from models.large_kernel.operator import (
    BACKENDS,
    CHOICES,
    LargeKernelModule,
    Prepared,
    depthwise,
    depthwise_sum,
    fastest,
)
from utils.config import Parser, at_least, program
from utils.registry import UserError

PUBLISHED = "published"
RECORDED = ("dense", "triton")  # as CUDA graphs; cuDNN refuses some convolutions
PASSES = ("forward", "backward")  # with a gradient per branch, the latter holds a forward pass


class Shape(NamedTuple):
    """Of one module's work: its map and its kernels."""

    channels: int
    height: int
    width: int
    kernels: tuple[tuple[int, int], ...]

    def macs(self, batch_size: int) -> int:
        """MACs of the direct sums, taps that no pixel reaches left out."""
        taps = sum(min(height, 2 * self.height - 1) * min(width, 2 * self.width - 1)
                   for height, width in self.kernels)
        return batch_size * math.prod(self[:3]) * taps

    def __str__(self) -> str:
        kernels = ", ".join(f"{height}x{width}" for height, width in self.kernels)
        return f"{self.channels} x {self.height} x {self.width}, {kernels}"


def shapes_of(model: models.VisionModel, input_size: int) -> dict[Shape, int]:
    """How many modules of `model` compute large kernels of each shape, in its order."""
    found: Counter[Shape] = Counter()

    def note(module: LargeKernelModule, inputs: tuple[Tensor, ...]) -> None:
        sizes = tuple(tuple(kernel.shape[2:]) for kernel in module.kernels())
        found[Shape(*inputs[0].shape[1:], sizes)] += 1

    for module in model.modules():
        if isinstance(module, LargeKernelModule):
            module.register_forward_pre_hook(note)
    model.count_macs(input_size)  # a forward pass on shapes alone
    if not found:
        raise UserError("--model has no large depthwise kernels. Take a SLaK, e.g. slak_t.")
    return dict(found)


def passes(shape: Shape, batch_size: int, backend: str, *, device: torch.device,
           dtype: torch.dtype, only_sum: bool) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """PASSES of one backend over random maps, kernels and gradients of one shape."""
    def normal(*size: int) -> Tensor:
        return torch.randn(*size).to(device, dtype)

    torch.manual_seed(0)  # the same numbers for all
    size = (batch_size, shape.channels, shape.height, shape.width)
    # Ours get the map as the networks give it, and gradients as their own outputs lie.
    layout = torch.contiguous_format if backend == PUBLISHED else torch.channels_last
    of_outputs = BACKENDS[backend].branches_format if backend in BACKENDS else layout
    x = normal(*size).to(memory_format=layout).requires_grad_()
    kernels = [normal(shape.channels, 1, *edges).requires_grad_() for edges in shape.kernels]
    bias, prepared = normal(shape.channels), Prepared()
    gradients = [normal(*size).to(memory_format=of_outputs)
                 for _ in (kernels[:1] if only_sum else kernels)]

    def outputs() -> list[Tensor]:
        if backend == PUBLISHED:
            return [F.conv2d(x, kernel, groups=len(kernel), padding=(
                kernel.shape[2] // 2, kernel.shape[3] // 2)) for kernel in kernels]
        return depthwise(x, kernels, backend)

    def backward() -> Sequence[Tensor]:
        return torch.autograd.grad(outputs(), [x, *kernels], gradients)

    if not only_sum:
        return {"forward": outputs, "backward": backward}

    @torch.no_grad()
    def folded() -> Sequence[Tensor]:
        if backend == PUBLISHED:
            return [sum(outputs()) + bias.view(-1, 1, 1)]
        return [depthwise_sum(x, kernels, bias, prepared, backend)]

    @cache
    def total() -> Tensor:
        return sum(outputs())

    def backward_alone() -> Sequence[Tensor]:  # of a graph that is kept
        return torch.autograd.grad([total()], [x, *kernels], gradients, retain_graph=True)

    return {"forward": folded, "backward": backward_alone}


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference over largest value, the worst of the tensors."""
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
               for a, b in zip(found, expected, strict=True))


def runnable(names: Sequence[str] | None, device: torch.device) -> list[str]:
    """What to compare with "published", which comes first: what is asked for, else all that run
    there. Raises UserError for one that does not."""
    reasons = {name: BACKENDS[name].why_not(device) if name in BACKENDS else None
               for name in CHOICES[1:]}
    for name in names or []:
        if reasons[name]:
            raise UserError(f"--backends {name} cannot run on {device}: {reasons[name]}")
    names = names or [name for name, reason in reasons.items() if not reason]
    return [PUBLISHED, *dict.fromkeys(names)]


def measure(shapes: Mapping[Shape, int], names: Sequence[str], *, batch_size: int, repeats: int,
            only_sum: bool, device: torch.device, dtype: torch.dtype
            ) -> tuple[list[common.Row], dict[str, float], common.Seconds]:
    """A row per shape and backend, then the totals; what the machine does at best; and all
    seconds. Raises UserError for a shape that a backend cannot compute."""
    rows, actions = [], common.ceiling_actions(device, dtype)
    expected: list[Tensor] = []
    for stage, (shape, blocks) in enumerate(shapes.items(), 1):
        for name in names:
            work = passes(shape, batch_size, name, device=device, dtype=dtype, only_sum=only_sum)
            try:
                found = [tensor for kind in PASSES for tensor in work[kind]()]
            except ValueError as error:
                raise UserError(f"{name} cannot compute {shape}: {error} Leave it out of "
                                "--backends.") from None
            if name == PUBLISHED:  # the first
                expected = found
            recorded = PASSES if name in RECORDED else ()
            if only_sum:  # autograd runs a graph that is kept on the stream that made it
                recorded = recorded[:1]
            rows.append({
                "stage": stage, "shape": str(shape), "blocks": blocks, "backend": name,
                "auto": name == fastest(device, dtype, max(max(edges) for edges in shape.kernels),
                                        shape.height * shape.width <= dense.LARGEST_MAP),
                "error": largest_error(found, expected), "forward_macs": shape.macs(batch_size),
                "backward_macs": (2 if only_sum else 3) * shape.macs(batch_size),
                "bytes": 2 * batch_size * math.prod(shape[:3]) * dtype.itemsize,
                **{f"{kind}_{key}": value for kind in PASSES
                   for key, value in common.gpu_shares(
                       work[kind], device, is_recorded=kind in recorded).items()}})
            actions |= {f"stage {stage}, {name}, {kind}": work[kind] for kind in PASSES}
    seconds = common.time_interleaved(actions, repeats, device, shortest=common.SHORTEST)
    for row in rows:
        for kind in PASSES:
            key = f"stage {row['stage']}, {row['backend']}, {kind}"
            row[f"{kind}_ms"] = 1000 * median(seconds[key])
    if len(shapes) > 1:
        rows += totals(rows, names)
    best = common.ceilings(seconds, device, dtype)
    for row in rows:
        add_ratios(row, rows, best)
    return rows, best, seconds


def totals(rows: Sequence[common.Row], names: Sequence[str]) -> list[common.Row]:
    """Sums over the shapes, weighted by blocks: each backend's, and that of what "auto" chooses
    where that is not the same at every shape."""
    groups = {name: [row for row in rows if row["backend"] == name] for name in names}
    chosen = [row for row in rows if row["auto"]]
    is_whole = len({row["stage"] for row in chosen}) == len(groups[PUBLISHED])
    if is_whole and len({row["backend"] for row in chosen}) > 1:
        groups["auto"] = chosen
    result = []
    for name, group in groups.items():
        keys = [key for key in group[0] if key.endswith(("_ms", "_macs"))] + ["bytes"]
        sums = {key: sum(row["blocks"] * row[key] for row in group)
                if None not in [row[key] for row in group] else None for key in keys}
        result.append({
            "stage": "all", "shape": "all blocks", "backend": name, **sums,
            "blocks": sum(row["blocks"] for row in group), "auto": all(r["auto"] for r in group),
            "error": max(row["error"] for row in group)})
    return result


def add_ratios(row: common.Row, rows: Sequence[common.Row], best: Mapping[str, float]) -> None:
    base = next(other for other in rows if other["stage"] == row["stage"]
                and other["backend"] == PUBLISHED)
    for kind in PASSES:
        row[f"{kind}_ratio"] = base[f"{kind}_ms"] / row[f"{kind}_ms"]
        for key, value in common.rates(row[f"{kind}_macs"], row[f"{kind}_ms"] / 1000, best).items():
            row[f"{kind}_{key}"] = value
    row["copy_share"] = row["bytes"] / row["forward_ms"] / 1e6 / best["copy_gb_per_second"]
    is_marked = row["auto"] and row["backend"] != "auto"
    row["shown"] = f"{row['backend']} (auto)" if is_marked else row["backend"]


def columns(only_sum: bool, is_gpu: bool) -> list[common.Column]:
    def of_pass(kind: str, header: str) -> list[common.Column]:
        shares = [(name, f"{kind}_{key}", form) for name, key, form in common.SHARE_COLUMNS]
        return [(f"{header} (ms)", f"{kind}_ms", ".3f"), *(shares if is_gpu else []),
                ("ratio", f"{kind}_ratio", ".2f"),
                *[(name, f"{kind}_{key}", form) for name, key, form in common.RATE_COLUMNS]]

    return [("map, kernels", "shape", ""), ("backend", "shown", ""), ("blocks", "blocks", "d"),
            *of_pass("forward", "forward"), ("of copy bandwidth", "copy_share", ".1%"),
            *of_pass("backward", "backward" if only_sum else "forward + backward"),
            ("largest error", "error", ".1e")]


def wanted_shapes(spec: list[str], input_size: int, *, only_sum: bool, map_size: list[int] | None,
                  kernel: list[int]) -> dict[Shape, int]:
    """The shapes of the model, or the one given by hand."""
    if map_size is not None:
        long, short = kernel
        if long % 2 == 0 or short % 2 == 0 or long < short:
            raise UserError(f"--kernel takes two odd numbers, the larger first; got {long} "
                            f"{short}.")
        kernels = ((long, short), (short, long), (short, short))
        return {Shape(*map_size, kernels[:2] if only_sum else kernels): 1}
    with torch.device("meta"):
        model = model_from_spec(spec, "--model")
        return shapes_of(model.fold() if only_sum else model, input_size)


def build_parser() -> Parser:
    parser = common.new_parser("operator", __doc__, batch_size=8)
    flag = parser.add_argument
    flag("--model", nargs="+", default=["slak_t"], metavar="NAME", help="NAME [key=value ...]")
    flag("--backends", nargs="+", choices=CHOICES[1:],
         help="which to compare; default: all that run on the device")
    flag("--dtype", choices=list(engine.AMP_DTYPES), default="none",
         help="of maps and kernels; none: float32")
    flag("--only-sum", action="store_true", help="the folded pair of a frozen network")
    flag("--shape", type=at_least(1), nargs=3, metavar=("C", "H", "W"),
         help="of one map; default: those of --model")
    flag("--kernel", type=at_least(1), nargs=2, metavar=("K", "N"), default=[51, 5],
         help="with --shape: long and short edge")
    return parser


@program("analysis.benchmark operator", build_parser)
def main(args: argparse.Namespace) -> int:
    device, dtype = common.start(args.device, args.threads), common.dtype_of(args.dtype)
    shapes = wanted_shapes(args.model, args.input_size, only_sum=args.only_sum,
                           map_size=args.shape, kernel=args.kernel)
    rows, best, seconds = measure(
        shapes, runnable(args.backends, device), batch_size=args.batch_size, repeats=args.repeats,
        only_sum=args.only_sum, device=device, dtype=dtype)
    source = "given maps" if args.shape else f"{' '.join(args.model)} at {args.input_size} px"
    if args.only_sum:
        source += ", folded, summed"
    title = (f"Depthwise convolutions of {source}, batch {args.batch_size}, "
             f"{str(dtype).removeprefix('torch.')}")
    notes = [
        "Ratio: published time / time. published: F.conv2d and its own gradient, (N, C, H, W). "
        "Error: relative to the largest value of published, in outputs and gradients.",
        common.ceilings_text(best, dtype)
        + " Of copy bandwidth: the map read once and written once."]
    common.show(title, rows, columns(args.only_sum, device.type == "cuda"), notes,
                {**best, "seconds": seconds}, repeats=args.repeats, device=device,
                json_path=args.json)
    return 0
