"""Inference of a teacher: folded, channels-last and frozen, against its authors' arrangement.

    python -m analysis.benchmark teacher --models slak_t convnext_t resnet50 --batch-size 16

"published" is the SLaK of its authors as it trains: un-folded, an nn.Conv2d per branch, maps
contiguous, here without gradient history. Other networks are shown beside it.
"""
import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import models
from analysis.benchmark.common import (
    COPY,
    MATRIX,
    Seconds,
    ceiling_actions,
    ceilings,
    ceilings_text,
    check_at_least,
    markdown_table,
    memory_of,
    new_parser,
    number,
    percent,
    place,
    show,
    start,
    time_interleaved,
)
from analysis.benchmark.published import arranged
from analysis.complexity import count_macs
from models.distiller import FrozenTeacher
from models.large_kernel.operator import CHOICES, describe_choice, use
from models.slak import SLaK

PRECISIONS = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Row = dict[str, Any]


@torch.no_grad()
def randomize_statistics(model: nn.Module) -> nn.Module:
    """Random layer scales and statistics of the size of trained ones; as they start, no block would
    matter and folding would change nothing."""
    for name, tensor in model.state_dict().items():
        if name.endswith(".gamma"):
            tensor.uniform_(0.2, 0.4)
        elif name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    return model


def inference(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    def run() -> Tensor:
        is_half = dtype != torch.float32
        with torch.no_grad(), torch.autocast(
                images.device.type, dtype=dtype if is_half else torch.bfloat16, enabled=is_half):
            return network(images)
    return run


def logits_of(output: Any) -> Tensor:
    return (output if isinstance(output, Tensor) else output.logits).double()


def measure(names: Sequence[str], precisions: Sequence[str], *, batch_size: int, input_size: int,
            repeats: int, device: torch.device, implementation: str = "auto"
            ) -> tuple[list[Row], dict[str, dict], Seconds]:
    """A row per model, precision and arrangement; what the machine does at best by precision; and
    all seconds. Errors are those of the logits against the un-folded float32 network."""
    rows, actions = [], {}
    for precision in precisions:
        actions |= {f"{precision}, {name}": action for name, action in
                    ceiling_actions(device, PRECISIONS[precision]).items()}
    for name in names:
        torch.manual_seed(0)
        model = randomize_statistics(models.create_model(name)).eval()
        size = model.input_size or model.native_size or input_size
        images = torch.randn(batch_size, 3, size, size, device=device)
        macs = batch_size * count_macs(model, size)
        plain = arranged(model).to(device)
        reference = logits_of(inference(plain, images, torch.float32)())
        networks = {"published": plain} if isinstance(model, SLaK) else {}
        networks["ours"] = FrozenTeacher(model, model.input_mean, model.input_std).to(device)
        if implementation != "auto" and isinstance(model, SLaK):
            use(implementation, networks["ours"])
        for precision in precisions:
            for kind, network in networks.items():
                layout = torch.channels_last if kind == "ours" else torch.contiguous_format
                action = inference(network, images.to(memory_format=layout), PRECISIONS[precision])
                error = (logits_of(action()) - reference).abs().max() / reference.abs().max()
                choice = describe_choice(network, device, PRECISIONS[precision])
                rows.append({"model": name, "choice": choice, "precision": precision,
                             "arrangement": kind, "pixels": size, "macs": macs,
                             "error": error.item(), "memory_gib": memory_of(action, device)})
                actions[f"{precision}, {name}, {kind}"] = action
    seconds = time_interleaved(actions, repeats, device)
    best = {precision: ceilings(
        {name: seconds[f"{precision}, {name}"] for name in (COPY, MATRIX)},
        device, PRECISIONS[precision]) for precision in precisions}
    for row in rows:
        add_figures(row, seconds, batch_size, best[row["precision"]])
    return rows, best, seconds


def add_figures(row: Row, seconds: Seconds, batch_size: int, best: dict[str, float]) -> None:
    def median(kind: str) -> float | None:
        key = f"{row['precision']}, {row['model']}, {kind}"
        return statistics.median(seconds[key]) if key in seconds else None

    mine, published = median(row["arrangement"]), median("published")
    row["ms_per_image"] = 1000 * mine / batch_size
    row["images_per_second"] = batch_size / mine
    row["ratio"] = published and published / mine
    row["gmacs_per_second"] = row["macs"] / mine / 1e9
    row["matrix_share"] = row["gmacs_per_second"] / best["matrix_gmacs_per_second"]


def table(rows: Sequence[Row]) -> str:
    header = ["teacher", "px", "precision", "arrangement", "ms per image", "ratio", "images/s",
              "G multiply-adds/s", "of matrix rate", "memory (GiB)", "error of logits"]
    return markdown_table(header, [
        [row["model"], str(row["pixels"]), row["precision"], row["arrangement"] + row["choice"],
         number(row["ms_per_image"], 3), number(row["ratio"]), number(row["images_per_second"], 1),
         number(row["gmacs_per_second"], 1), percent(row["matrix_share"]),
         number(row["memory_gib"]), f"{row['error']:.1e}"] for row in rows], num_words=4)


def main(argv: list[str]) -> None:
    parser = new_parser("teacher", __doc__, batch_size=16)
    flag = parser.add_argument
    flag("--models", nargs="+", default=["slak_t", "convnext_t", "resnet50"], metavar="NAME",
         help="names of models")
    flag("--amp", nargs="+", choices=list(PRECISIONS), default=["none", "bf16"],
         help="one or more precisions to compare")
    flag("--large-kernel", choices=CHOICES, default="auto", help="code for the large kernels")
    args: argparse.Namespace = parser.parse(argv)
    check_at_least({name: getattr(args, name) for name in (
        "input_size", "batch_size", "repeats", "threads")})
    device = start(args.device, args.threads)
    precisions = list(dict.fromkeys(args.amp))
    rows, best, seconds = measure(
        list(dict.fromkeys(args.models)), precisions, batch_size=args.batch_size,
        input_size=args.input_size, repeats=args.repeats, device=device,
        implementation=args.large_kernel)
    title = (f"Inference with random weights, batch {args.batch_size}, {place(device)}, medians of "
             f"{args.repeats} rounds")
    notes = ["Ratio: published time / time, in the same precision. Error: largest over the "
             "largest logit, against the un-folded network in float32. Memory, on a GPU: what a "
             "pass holds beyond the networks.",
             *(ceilings_text(best[name], PRECISIONS[name]) for name in precisions)]
    show(title, table(rows), notes, {"rows": rows, "ceilings": best, "seconds": seconds},
         device=device, json_path=args.json)
