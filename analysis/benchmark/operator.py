"""The large depthwise convolutions of a SLaK, by every implementation that runs here.

    python -m analysis.benchmark operator --batch-size 8                 # slak_t's stages
    python -m analysis.benchmark operator --dtype bfloat16 --batch-size 64 --device cuda
    python -m analysis.benchmark operator --only-sum --shape 124 56 56 --kernel 51 5

"published" is F.conv2d with its own gradient on contiguous maps, the baseline of all ratios. Each
branch has a gradient of its own, as under BatchNorms. With --only-sum it is the folded pair of
inference: its forward pass without gradient history, and its backward pass with one gradient.
"""
import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import models
from analysis.bench_branches import PUBLISHED, Shape, Work, largest_error, results, shapes_of
from analysis.benchmark.common import (
    DTYPES,
    SHORTEST,
    Seconds,
    add_model_flag,
    ceiling_actions,
    ceilings,
    ceilings_text,
    check_at_least,
    markdown_table,
    new_parser,
    number,
    percent,
    place,
    show,
    start,
    time_interleaved,
)
from models.large_kernel.operator import BACKENDS, CHOICES, choose
from utils.registry import UserError, did_you_mean, parse_spec

PASSES = ("forward", "backward")  # with a gradient per branch, the latter holds a forward pass
Row = dict[str, Any]


def runnable(names: Sequence[str] | None, device: torch.device) -> list[str]:
    """What to compare with "published", which comes first: what is asked for, else all that run
    there. Raises UserError for one that does not."""
    known = [*BACKENDS, "library"]
    names = names or [name for name in known if name == "library"
                      or not BACKENDS[name].why_not(device)]
    for name in names:
        if name not in (*known, PUBLISHED):
            raise UserError(f"--implementations {name!r} is unknown. Known: {', '.join(known)}."
                            f"{did_you_mean(name, known)}")
        reason = BACKENDS[name].why_not(device) if name in BACKENDS else None
        if reason:
            raise UserError(f"--implementations {name} cannot run on {device}: {reason}")
    return [PUBLISHED, *(name for name in dict.fromkeys(names) if name != PUBLISHED)]


def measure(shapes: Mapping[Shape, int], names: Sequence[str], *, batch_size: int, repeats: int,
            only_sum: bool, device: torch.device, dtype: torch.dtype
            ) -> tuple[list[Row], dict[str, float], Seconds]:
    """A row per shape and implementation, then the totals; what the machine does at best; and all
    seconds. Raises UserError for a shape that an implementation cannot compute."""
    rows, actions = [], ceiling_actions(device, dtype)
    expected: list[torch.Tensor] = []  # published comes first
    for stage, (shape, blocks) in enumerate(shapes.items(), 1):
        for name in names:
            work = Work(shape, batch_size, name, device=device, dtype=dtype, only_sum=only_sum)
            try:
                found = results(work)
            except ValueError as error:
                raise UserError(f"{name} cannot compute {shape}: {error} Leave it out of "
                                "--implementations.") from None
            expected = found if name == PUBLISHED else expected
            chosen = choose("auto", device, dtype, work.kernels)
            rows.append({
                "stage": stage, "shape": str(shape), "blocks": blocks, "implementation": name,
                "auto": name == chosen, "error": largest_error(found, expected),
                "forward_macs": shape.macs(batch_size),
                "backward_macs": (2 if only_sum else 3) * shape.macs(batch_size),
                "bytes": shape.copied_bytes(batch_size, dtype)})
            actions[f"stage {stage}, {name}, forward"] = work.forward
            actions[f"stage {stage}, {name}, backward"] = work.forward_backward
    seconds = time_interleaved(actions, repeats, device, shortest=SHORTEST)
    for row in rows:
        for kind in PASSES:
            key = f"stage {row['stage']}, {row['implementation']}, {kind}"
            row[f"{kind}_ms"] = 1000 * statistics.median(seconds[key])
    if len(shapes) > 1:
        rows += totals(rows, names)
    best = ceilings(seconds, device, dtype)
    for row in rows:
        add_ratios(row, rows, best)
    return rows, best, seconds


def totals(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Sums over the shapes, weighted by blocks: each implementation's, and that of what "auto"
    chooses where that is not the same at every shape."""
    groups = {name: [row for row in rows if row["implementation"] == name] for name in names}
    chosen = [row for row in rows if row["auto"]]
    is_whole = len({row["stage"] for row in chosen}) == len(groups[PUBLISHED])
    if is_whole and len({row["implementation"] for row in chosen}) > 1:
        groups["auto"] = chosen
    result = []
    for name, group in groups.items():
        sums = {key: sum(row["blocks"] * row[key] for row in group)
                for key in ("forward_ms", "backward_ms", "forward_macs", "backward_macs", "bytes")}
        result.append({
            "stage": "all", "shape": "all blocks", "implementation": name, **sums,
            "blocks": sum(row["blocks"] for row in group),
            "auto": name == "auto" or all(row["auto"] for row in group),
            "error": max(row["error"] for row in group)})
    return result


def add_ratios(row: Row, rows: Sequence[Row], best: Mapping[str, float]) -> None:
    base = next(other for other in rows if other["stage"] == row["stage"]
                and other["implementation"] == PUBLISHED)
    for kind in PASSES:
        row[f"{kind}_ratio"] = base[f"{kind}_ms"] / row[f"{kind}_ms"]
        rate = row[f"{kind}_macs"] / row[f"{kind}_ms"] / 1e6
        row[f"{kind}_gmacs_per_second"] = rate
        row[f"{kind}_matrix_share"] = rate / best["matrix_gmacs_per_second"]
    row["copy_share"] = row["bytes"] / row["forward_ms"] / 1e6 / best["copy_gb_per_second"]


def table(rows: Sequence[Row], only_sum: bool) -> str:
    header = ["map, kernels", "implementation", "blocks"]
    for name in ("forward", "backward" if only_sum else "forward + backward"):
        header += [f"{name} (ms)", "ratio", "G multiply-adds/s", "of matrix rate"]
        header += ["of copy bandwidth"] * (name == "forward")
    header.append("largest error")
    lines = []
    for row in rows:
        line = [row["shape"], row["implementation"] + " (auto)" * (
            row["auto"] and row["implementation"] != "auto"), str(row["blocks"])]
        for kind in PASSES:
            line += [number(row[f"{kind}_ms"], 3), number(row[f"{kind}_ratio"]),
                     number(row[f"{kind}_gmacs_per_second"], 1),
                     percent(row[f"{kind}_matrix_share"])]
            line += [percent(row["copy_share"])] * (kind == "forward")
        lines.append([*line, f"{row['error']:.1e}"])
    return markdown_table(header, lines, num_words=2)


def wanted_shapes(words: list[str], input_size: int, *, only_sum: bool, map_size: list[int] | None,
                  kernel: list[int]) -> dict[Shape, int]:
    """The shapes of the model, or the one given by hand."""
    if map_size is not None:
        check_at_least({"shape": min(map_size), "kernel": min(kernel)})
        long, short = kernel
        if long % 2 == 0 or short % 2 == 0 or long < short:
            raise UserError(f"--kernel takes two odd numbers, the larger first; got {long} "
                            f"{short}.")
        kernels = ((long, short), (short, long), (short, short))
        return {Shape(*map_size, kernels[:2] if only_sum else kernels): 1}
    name, options = parse_spec(words, "--model")
    with torch.device("meta"):
        model = models.create_model(name, **options)
        return shapes_of(model.fold() if only_sum else model, input_size)


def main(argv: list[str]) -> None:
    parser = new_parser("operator", __doc__, batch_size=8)
    add_model_flag(parser, "slak_t")
    flag = parser.add_argument
    flag("--implementations", nargs="+", metavar="NAME",
         help=f"of {', '.join(CHOICES[1:])}; default: all that run on the device")
    flag("--dtype", choices=list(DTYPES), default="float32", help="of maps and kernels")
    flag("--only-sum", action="store_true", help="the folded pair of a frozen network")
    flag("--shape", type=int, nargs=3, metavar=("C", "H", "W"), help="of one map; default: --model")
    flag("--kernel", type=int, nargs=2, metavar=("K", "N"), default=[51, 5],
         help="with --shape: long and short edge")
    args: argparse.Namespace = parser.parse(argv)
    check_at_least({name: getattr(args, name) for name in (
        "input_size", "batch_size", "repeats", "threads")})
    idle = {*args.given} & ({"model", "input_size"} if args.shape else {"kernel"})
    if idle:
        raise UserError(f"--{min(idle).replace('_', '-')} has no effect "
                        f"{'beside' if args.shape else 'without'} --shape; leave it out.")
    device, dtype = start(args.device, args.threads), DTYPES[args.dtype]
    shapes = wanted_shapes(args.model, args.input_size, only_sum=args.only_sum,
                           map_size=args.shape, kernel=args.kernel)
    names = runnable(args.implementations, device)
    rows, best, seconds = measure(
        shapes, names, batch_size=args.batch_size, repeats=args.repeats, only_sum=args.only_sum,
        device=device, dtype=dtype)
    source = "given maps" if args.shape else f"{' '.join(args.model)} at {args.input_size} px"
    title = (f"Depthwise convolutions of {source}{', folded, summed' * args.only_sum}, batch "
             f"{args.batch_size}, {args.dtype}, {place(device)}, medians of {args.repeats} rounds")
    notes = [
        "Ratio: published time / time. published: F.conv2d and its own gradient, (N, C, H, W). "
        "Error: relative to the largest value of published, in outputs and gradients.",
        ceilings_text(best, dtype) + " Of copy bandwidth: the map read once and written once."]
    show(title, table(rows, args.only_sum), notes, {"rows": rows, **best, "seconds": seconds},
         device=device, json_path=args.json)
