"""An update of sparse training against a dense one.

    python -m analysis.benchmark masking                  # slak_t at 224 px: masks against none
    python -m analysis.benchmark masking --amp bf16 --batch-size 128 --repeats 20   # on a GPU
"""
import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import engine
import models
from analysis.benchmark.common import (
    add_model_flag,
    check_at_least,
    new_parser,
    no_mix,
    place,
    random_batches,
    random_state,
    show,
    start,
    time_interleaved,
)
from analysis.complexity import count_macs
from models.sparsity import SparseMask
from utils.registry import parse_spec

KINDS = ("no masks", "masks", "masks that change")


def time_masking(model: models.VisionModel, options: engine.StepOptions, *, batch_size: int,
                 input_size: int, repeats: int, growth: str, sparsity: float
                 ) -> tuple[dict[str, list[float]], float]:
    """Seconds of forward and backward ("gradients of KIND"), and of the rest of the update
    ("KIND"): optimizer, masks, average. And the bytes of masks per weight of the network."""
    state = random_state(model, None, [["ce"]], options, keeps_average=True)
    masks = SparseMask(model, state.optimizer, total_steps=10 ** 9, growth=growth, prune_every=2)
    masks.start("uniform", 1 - sparsity, first_batch=lambda: None)
    batches = random_batches(options, batch_size, input_size, model.num_classes)

    def gradients() -> None:
        engine.accumulate_gradients(state, batches, None, no_mix, options)

    def update(kind: str) -> None:
        # With prune_every=2 update 1 leaves the masks as they are and update 2 changes them.
        state.sparsity = None if kind == "no masks" else masks
        state.step, masks.changed_at = int(kind == "masks that change"), 0
        engine.optimizer_update(state, options.clip_grad)

    actions: dict[str, Callable[[], Any]] = {}
    for kind in KINDS:
        actions |= {f"gradients of {kind}": gradients, kind: partial(update, kind)}
    num_bytes = sum(mask.numel() * mask.element_size() for mask in masks.masks.values())
    seconds = time_interleaved(actions, repeats, options.device)
    return seconds, num_bytes / model.num_parameters


def masking_table(seconds: dict[str, list[float]], prune_every: int) -> tuple[str, float]:
    """A Markdown table, and the ratio of an update with masks to one without, in the mean over
    `prune_every` updates of which one changes them. Masks do not touch forward and backward, so
    their time is one median over all kinds."""
    gradients = statistics.median(value for kind in KINDS
                                  for value in seconds[f"gradients of {kind}"])
    rest = {kind: statistics.median(seconds[kind]) for kind in KINDS}
    name = f"mean at --prune-every {prune_every}"
    rest[name] = ((prune_every - 1) * rest["masks"] + rest["masks that change"]) / prune_every
    plain = gradients + rest["no masks"]
    rows = ["| update | forward, backward (s) | the rest (s) | ratio |", "|---|---:|---:|---:|"]
    rows += [f"| {kind} | {gradients:.3f} | {value:.3f} | {(gradients + value) / plain:.3f} |"
             for kind, value in rest.items()]
    return "\n".join(rows), (gradients + rest[name]) / plain


def main(argv: list[str]) -> None:
    parser = new_parser("masking", __doc__, batch_size=8)
    add_model_flag(parser, "slak_t")
    flag = parser.add_argument
    flag("--sparsity", type=float, default=0.4, help="in every layer (uniform)")
    flag("--growth", choices=["random", "gradient", "momentum"], default="random",
         help="where pruned weights move to")
    flag("--prune-every", type=int, default=100, help="for the mean")
    flag("--amp", choices=list(engine.AMP_DTYPES), default="none", help="mixed precision")
    args: argparse.Namespace = parser.parse(argv)
    check_at_least({name: getattr(args, name) for name in (
        "input_size", "batch_size", "repeats", "prune_every", "threads")}, smallest_batch=2)
    device = start(args.device, args.threads)
    options = engine.StepOptions(
        device=device, amp_dtype=engine.AMP_DTYPES[args.amp], accum_steps=1, clip_grad=None,
        memory_format=torch.channels_last, seed=0)
    name, model_options = parse_spec(args.model, "--model")
    model = models.create_model(name, 1000, **model_options)
    count_macs(model, args.input_size)  # says in words when it does not run at this size
    seconds, bytes_per_weight = time_masking(
        model, options, batch_size=args.batch_size, input_size=args.input_size,
        repeats=args.repeats, growth=args.growth, sparsity=args.sparsity)
    table, ratio = masking_table(seconds, args.prune_every)
    title = (f"{' '.join(args.model)}, batch {args.batch_size} at {args.input_size} px, AdamW, "
             f"averaged weights, precision {args.amp}, {place(device)}, medians of {args.repeats} "
             "rounds")
    notes = [f"masks: {bytes_per_weight:.3f} bytes per weight of the network."]
    show(title, table, notes, {**seconds, "ratio": ratio, "bytes_per_weight": bytes_per_weight},
         device=device, json_path=args.json)
