"""An update of sparse training against a dense one.

    python -m analysis.benchmark masking                  # slak_t at 224 px: masks against none
    python -m analysis.benchmark masking --amp bf16 --batch-size 128 --repeats 20   # on a GPU
"""
import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import data
import engine
import models
from analysis.benchmark import common
from models.base import model_from_spec
from models.sparsity import GROWTHS, SparseMask
from utils.config import Parser, at_least, below_one, program

KINDS = ("no masks", "masks", "masks that change")
COLUMNS = [("update", "update", ""), ("forward, backward (s)", "gradients", ".3f"),
           ("the rest (s)", "rest", ".3f"), ("ratio", "ratio", ".3f")]


def time_masking(model: models.VisionModel, options: engine.StepOptions, *, batch_size: int,
                 input_size: int, repeats: int, growth: str, sparsity: float
                 ) -> tuple[common.Seconds, float]:
    """Seconds of forward and backward ("gradients of KIND"), and of the rest of the update
    ("KIND"): optimizer, masks, average. And the bytes of masks per weight of the network."""
    state = common.random_state(model, None, [["ce"]], options, keeps_average=True)
    masks = SparseMask(model, state.optimizer, total_steps=10 ** 9, growth=growth, prune_every=2)
    masks.start("uniform", 1 - sparsity, first_batch=lambda: None)
    no_mix = data.Mixup(model.num_classes, mixup_alpha=0, cutmix_alpha=0, smoothing=0).at
    batches = common.random_batches(batch_size, input_size, model.num_classes, options.device)

    def gradients() -> None:
        engine.accumulate_gradients(state, batches, None, no_mix, options)

    def update(kind: str) -> None:
        # With prune_every=2 update 1 leaves the masks as they are and update 2 changes them.
        state.sparsity = None if kind == "no masks" else masks
        state.step, masks.changed_at = (1 if kind == "masks that change" else 0), 0
        engine.optimizer_update(state, options.clip_grad)

    actions: dict[str, Callable[[], Any]] = {}
    for kind in KINDS:
        actions |= {f"gradients of {kind}": gradients, kind: partial(update, kind)}
    num_bytes = sum(mask.numel() * mask.element_size() for mask in masks.masks.values())
    seconds = common.time_interleaved(actions, repeats, options.device)
    return seconds, num_bytes / model.num_parameters


def rows_of(seconds: common.Seconds, prune_every: int) -> list[common.Row]:
    """A row per kind of update, then their mean over `prune_every` updates of which one changes the
    masks. These do not touch forward and backward, whose time is one median over all kinds."""
    gradients = median(value for kind in KINDS for value in seconds[f"gradients of {kind}"])
    rest = {kind: median(seconds[kind]) for kind in KINDS}
    rest[f"mean at --prune-every {prune_every}"] = (
        (prune_every - 1) * rest["masks"] + rest["masks that change"]) / prune_every
    dense = gradients + rest["no masks"]
    return [{"update": kind, "gradients": gradients, "rest": value,
             "ratio": (gradients + value) / dense} for kind, value in rest.items()]


def build_parser() -> Parser:
    parser = common.new_parser("masking", __doc__, batch_size=8, smallest_batch=2)
    flag = parser.add_argument
    flag("--model", nargs="+", default=["slak_t"], metavar="NAME", help="NAME [key=value ...]")
    flag("--sparsity", type=below_one, default=0.4, help="in every layer (uniform)")
    flag("--growth", choices=GROWTHS, default="random", help="where pruned weights move to")
    flag("--prune-every", type=at_least(1), default=100, help="for the mean")
    flag("--amp", choices=list(engine.AMP_DTYPES), default="none", help="mixed precision")
    return parser


@program("analysis.benchmark masking", build_parser)
def main(args: argparse.Namespace) -> int:
    device = common.start(args.device, args.threads)
    model = model_from_spec(args.model, "--model")
    model.count_macs(args.input_size)  # says in words when it does not run at this size
    seconds, bytes_per_weight = time_masking(
        model, common.step_options(device, args.amp), batch_size=args.batch_size,
        input_size=args.input_size, repeats=args.repeats, growth=args.growth,
        sparsity=args.sparsity)
    rows = rows_of(seconds, args.prune_every)
    common.show(
        f"{' '.join(args.model)}, batch {args.batch_size} at {args.input_size} px, AdamW, averaged "
        f"weights, precision {args.amp}", rows, COLUMNS,
        [f"masks: {bytes_per_weight:.3f} bytes per weight of the network."],
        {**seconds, "ratio": rows[-1]["ratio"], "bytes_per_weight": bytes_per_weight},
        repeats=args.repeats, device=device, json_path=args.json)
    return 0
