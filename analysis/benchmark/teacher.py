"""Inference of a teacher: folded, channels-last and frozen, against its authors' arrangement.

    python -m analysis.benchmark teacher --models slak_t convnext_t resnet50 --batch-size 16
    python -m analysis.benchmark teacher --amp bf16 --batch-size 128 --compile     # on a GPU

On a GPU ours is shown as called and as in a run, replayed from a CUDA graph. "published" is the
SLaK of its authors as it trains: un-folded, an nn.Conv2d per branch, maps contiguous, here without
gradient history. Other networks are shown beside it.
"""
import argparse
import copy
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

import engine
import models
from analysis.benchmark import common
from analysis.benchmark.published import arranged
from models.distiller import FrozenTeacher, frozen_dtype
from models.large_kernel.operator import ACCEPTED, describe_choice, set_backend
from models.slak import SLaK
from utils.config import Parser, program
from utils.cuda_graphs import WARM_UPS

COLUMNS = [
    ("teacher", "model", ""), ("px", "pixels", ""), ("precision", "precision", ""),
    ("arrangement", "shown", ""), ("ms per image", "ms_per_image", ".3f"),
    ("ratio", "ratio", ".2f"), ("images/s", "images_per_second", ".1f"), *common.RATE_COLUMNS,
    ("memory (GiB)", "memory_gib", ".2f"), ("error of logits", "error", ".1e")]


@torch.no_grad()
def randomize_statistics(model: nn.Module) -> nn.Module:
    """Random layer scales and statistics of the size of trained ones, and classifiers that are not
    zero; as they start, no block would matter and folding would change nothing."""
    for name, tensor in model.state_dict().items():
        if name.endswith(".gamma"):
            tensor.uniform_(0.2, 0.4)
        elif name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(".weight") and not tensor.any():
            tensor.normal_(std=0.02)
    return model


def inference(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, dtype=dtype,
                                             enabled=dtype != torch.float32):
            if isinstance(network, FrozenTeacher):
                return network.teach(images, None).logits  # as a step calls it
            return network(images)
    return run


def measure(names: Sequence[str], precisions: Sequence[str], *, batch_size: int, input_size: int,
            repeats: int, device: torch.device, backend: str, is_compiled: bool
            ) -> tuple[list[common.Row], dict[str, dict[str, float]], common.Seconds]:
    """A row per model, precision and arrangement; what the machine does at best by precision; and
    all seconds. Errors are those of the logits against the un-folded float32 network."""
    dtypes = {precision: common.dtype_of(precision) for precision in precisions}
    rows, actions = [], {}
    for precision, dtype in dtypes.items():
        actions |= common.ceiling_actions(device, dtype, f"{precision}, ")
    for name in names:
        torch.manual_seed(0)
        model = randomize_statistics(models.create_model(name)).eval()
        size = common.size_of(model, input_size)
        images = torch.randn(batch_size, 3, size, size, device=device)
        macs = batch_size * model.count_macs(size)
        plain = arranged(model).to(device)
        expected = inference(plain, images, torch.float32)().double()
        for precision, dtype in dtypes.items():
            networks = {"published": plain} if isinstance(model, SLaK) else {}
            networks["ours"] = FrozenTeacher(
                copy.deepcopy(model), model.input_mean, model.input_std,
                dtype=frozen_dtype(engine.AMP_DTYPES[precision], device)).to(device)
            if isinstance(model, SLaK):
                set_backend(backend, networks["ours"])
            if device.type == "cuda":
                networks["ours, CUDA graph"] = copy.deepcopy(networks["ours"])
                networks["ours, CUDA graph"].capture()
            if is_compiled:
                networks["ours, compiled"] = copy.deepcopy(list(networks.values())[-1])
                networks["ours, compiled"].compile()
            for kind, network in networks.items():
                layout = torch.contiguous_format if kind == "published" else torch.channels_last
                action = inference(network, images.to(memory_format=layout), dtype)
                action()  # what is made once
                memory = common.memory_of(action, device)  # a replay would take none
                for _ in range(WARM_UPS if device.type == "cuda" else 0):
                    action()
                error = (action().double() - expected).abs().max() / expected.abs().max()
                rows.append({
                    "model": name, "pixels": size, "precision": precision, "arrangement": kind,
                    "shown": kind + describe_choice(network, device, dtype), "macs": macs,
                    "error": error.item(), "memory_gib": memory})
                actions[f"{precision}, {name}, {kind}"] = action
    shortest = 0.2 if device.type == "cuda" else 0  # in a row, so that the host runs ahead
    seconds = common.time_interleaved(actions, repeats, device, shortest)
    best = {precision: common.ceilings(seconds, device, dtype, f"{precision}, ")
            for precision, dtype in dtypes.items()}
    for row in rows:
        key = f"{row['precision']}, {row['model']}, "
        ours, published = median(seconds[key + row["arrangement"]]), seconds.get(key + "published")
        row["ms_per_image"], row["images_per_second"] = 1000 * ours / batch_size, batch_size / ours
        row["ratio"] = median(published) / ours if published else None
        row.update(common.rates(row["macs"], ours, best[row["precision"]]))
    return rows, best, seconds


def build_parser() -> Parser:
    parser = common.new_parser("teacher", __doc__, batch_size=16)
    flag = parser.add_argument
    flag("--models", nargs="+", default=["slak_t", "convnext_t", "resnet50"], metavar="NAME",
         help="names of models")
    flag("--amp", nargs="+", choices=list(engine.AMP_DTYPES), default=["none", "bf16"],
         help="one or more precisions to compare")
    flag("--large-kernel", choices=ACCEPTED, default="auto", help="code for the large kernels")
    flag("--compile", action="store_true", help="show ours compiled, too")
    return parser


@program("analysis.benchmark teacher", build_parser)
def main(args: argparse.Namespace) -> int:
    device = common.start(args.device, args.threads)
    rows, best, seconds = measure(
        list(dict.fromkeys(args.models)), list(dict.fromkeys(args.amp)),
        batch_size=args.batch_size, input_size=args.input_size, repeats=args.repeats,
        device=device, backend=args.large_kernel, is_compiled=args.compile)
    notes = ["Ratio: published time / time, in the same precision. Error: largest over the "
             "largest logit, against the un-folded network in float32. Memory, on a GPU: what a "
             "pass holds beyond the networks."]
    notes += [common.ceilings_text(found, common.dtype_of(name)) for name, found in best.items()]
    common.show(f"Inference with random weights, batch {args.batch_size}", rows,
                COLUMNS, notes, {"ceilings": best, "seconds": seconds},
                repeats=args.repeats, device=device, json_path=args.json)
    return 0
