"""Evaluate a checkpoint of this project, or published weights.

    python eval.py --checkpoint runs/slak_t-resnet50-nkd-300ep/checkpoint-best.pth --data-path DIR
    python eval.py --model convnext_t --weights published --data-path DIR
    python eval.py ... --data-set imagenet_c --data-path DIR      # and _a, _r, _sketch, _v2, _real
    torchrun --nproc_per_node=8 eval.py ...          # the same numbers, faster
"""
from utils import process

if __name__ == "__main__":
    process.begin()  # first, for PyTorch takes seconds to import
import argparse
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import data
import engine
import models
from models.large_kernel.operator import ACCEPTED, describe_choice, set_backend
from models.weights import Trained, check_source, load_named, load_trained
from utils import distributed, faults
from utils.config import Parser, at_least, program
from utils.files import write_atomically
from utils.log import print_once
from utils.registry import UserError, parse_spec


def build_parser() -> Parser:
    parser = Parser(prog="eval.py", description=__doc__.split("\n")[0],
                    usage="%(prog)s [--flag value ...]")
    flag = parser.add_argument
    flag("--checkpoint", type=Path, metavar="FILE",
         help="a checkpoint of train_kd.py; it knows its model, data set and input size")
    flag("--model", nargs="+", metavar="NAME", help="NAME [key=value ...], with --weights; "
         + models.describe_models())
    flag("--weights", metavar="SOURCE", help="path, URL or published")
    flag("--weights-key", help="model, or model_ema for the averaged weights")
    flag("--num-classes", type=at_least(1), default=1000, help="classes of --weights")
    flag("--data-set", nargs="+", metavar="NAME",
         help="NAME [key=value ...], by default the checkpoint's, else imagefolder; one of: "
         + ", ".join(data.list_datasets()))
    flag("--data-path",
         help="folder that holds val/; of ImageNet's test sets, the folder as it was unpacked")
    flag("--input-size", type=at_least(1),
         help="by default the checkpoint's, else the model's own, in pixels")
    flag("--crop-pct", type=float, help="share of the short side that is seen; by default the data "
         "set's own, else the checkpoint's or the publisher's, else 224/256")
    flag("--resize", type=at_least(1), help="pixels of the short side; says the same as --crop-pct")
    flag("--interpolation", choices=data.FILTERS,
         help="filter of resizing; by default the checkpoint's or the publisher's, else bicubic")
    flag("--batch-size", type=at_least(1), default=96, help="images per process")
    flag("--num-workers", type=at_least(0), default=10, help="loader processes per process")
    flag("--skip-bad-images", action=argparse.BooleanOptionalAction, default=False,
         help="leave unreadable images out of the count instead of stopping")
    flag("--device", choices=distributed.DEVICES, default="auto", help="where to run")
    flag("--amp", choices=list(engine.AMP_DTYPES), default="none", help="mixed precision")
    flag("--large-kernel", choices=ACCEPTED, default="auto",
         help="code for large depthwise kernels (docs/performance.md); equal up to rounding")
    flag("--predictions", type=Path, metavar="NPZ", help="save what was predicted for every image")
    return parser


@program("eval.py", build_parser)
def main(args: argparse.Namespace) -> int:
    device = distributed.setup(args.device)
    args.amp = faults.resolve_precision(args.amp, device)
    check_flags(args)

    # The model: of a checkpoint, which knows its run, or by name.
    if args.checkpoint:
        trained = load_trained(args.checkpoint, args.weights_key)
        print_once(f"{' '.join(trained.settings['student'])} from {args.checkpoint}")
    else:
        model = load_named(args.model, args.weights, args.weights_key, args.num_classes)
        trained = Trained(model, settings={}, classes=model.classes)
        print_once(f"{' '.join(args.model)}, weights {args.weights}")
    model, settings, classes = trained

    # The data set, its labels those of the model. What no flag says, the run or the model does.
    how = trained.preprocessing(args.input_size)
    input_size = how["input_size"]
    if model.fixed_size and input_size != model.input_size:
        raise UserError(f"--input-size {input_size}: this model takes {model.input_size} px only.")
    name, options = parse_spec(args.data_set or settings.get("data_set") or ["imagefolder"],
                               "--data-set")
    source = data.create_dataset(name, "val", args.data_path, **options)
    source.align(classes, model.num_classes)
    if source.crop_pct is not None:
        how |= {"crop_pct": source.crop_pct, "resize": None}
    if args.crop_pct is not None or args.resize is not None:
        how |= {"crop_pct": args.crop_pct, "resize": args.resize}
    if args.interpolation is not None:
        how["interpolation"] = args.interpolation
    transform = data.eval_transform(**how)

    # Counted as it is trained, then folded for speed.
    num_parameters, macs = model.num_parameters, model.count_macs(input_size)
    print_once(f"{num_parameters:,} parameters, {macs / 1e9:.3f} G MACs at {input_size} px; "
               f"images: {data.describe_eval(transform)}")
    model = model.eval().fold().to(device, memory_format=torch.channels_last)
    set_backend(args.large_kernel, model)
    amp_dtype = engine.AMP_DTYPES[args.amp]
    print_once(f"on {device}, precision {args.amp}"
               f"{describe_choice(model, device, amp_dtype or torch.float32)}")
    step_options = engine.StepOptions(
        device=device, amp_dtype=amp_dtype, accum_steps=1, memory_format=torch.channels_last,
        clip_grad=None, seed=0,
        batch_transform=data.BatchTransform(model.input_mean, model.input_std, device))

    # Every image once, whatever the number of processes, among the classes that compete.
    network = model
    if source.competing is not None:
        network = Competing(model, source.competing).to(device).eval()
    loader = data.eval_loader(
        source, transform, batch_size=args.batch_size, num_workers=args.num_workers,
        skip_bad_images=args.skip_bad_images, pin_memory=device.type == "cuda")
    start = time.perf_counter()
    with closing(loader):
        result = engine.evaluate(network, loader, options=step_options)
    seconds = time.perf_counter() - start
    engine.refuse_nan(result, "the network's")

    # The report.
    rows = {"images": f"{result.num_samples:,}", "top-1": f"{result.acc1:.2f} %",
            "top-5": f"{result.acc5:.2f} %", "cross-entropy": f"{result.loss:.4f}"}
    if source.competing is not None:
        rows["classes"] = f"{len(source.competing)} of the model's {model.num_classes} compete"
        top5 = result.samples["top5"]  # below five classes filled with -1, as everywhere
        top5[~torch.isin(top5, torch.tensor(source.competing))] = -1
    if source.metric is not None:
        counts = source.metric.count(result.samples["index"], result.samples["top5"])
        rows |= source.metric.rows(distributed.sum_over_ranks(counts))
    alone = throughput(model, step_options, input_size, args.batch_size)
    rows |= {"parameters": f"{num_parameters:,}", "MACs": f"{macs / 1e9:.3f} G",
             "images/s, with loading, all processes": f"{result.num_samples / seconds:.0f}",
             f"images/s, network alone, batch {args.batch_size}": f"{alone:.0f}"}
    width = max(map(len, rows))
    print_once("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
    if args.predictions:
        save_predictions(result, source, args.predictions)
    return 0


def check_flags(args: argparse.Namespace) -> None:
    check_source(args.checkpoint, args.model, args.weights,
                 names_classes="num_classes" in args.given)
    if args.predictions and (args.predictions.suffix != ".npz" or args.predictions.is_dir()
                             or not args.predictions.absolute().parent.is_dir()):
        raise UserError(f"--predictions {args.predictions} must be a file name ending in .npz in a "
                        "folder that exists.")


class Competing(nn.Module):
    """A classifier whose other classes than `classes` have logits of minus infinity."""

    def __init__(self, model: models.VisionModel, classes: list[int]) -> None:
        super().__init__()
        self.model = model
        is_out = torch.ones(model.num_classes, dtype=torch.bool)
        is_out[classes] = False
        self.register_buffer("is_out", is_out)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).masked_fill(self.is_out, -torch.inf)


@torch.no_grad()
def throughput(model: models.VisionModel, options: engine.StepOptions, input_size: int,
               batch_size: int, repeats: int = 5) -> float:
    """Images per second of the network alone on this process: median of `repeats` batches."""
    images = torch.randn(batch_size, 3, input_size, input_size, device=options.device)
    images = images.to(memory_format=options.memory_format)
    seconds = []
    with options.autocast():
        for _ in range(repeats + 1):  # the first warms up
            start = time.perf_counter()
            model(images)[0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - start)
    return batch_size / float(np.median(seconds[1:]))


def save_predictions(result: engine.Evaluation, source: data.ImageSource, path: Path) -> None:
    """One row per image, in the data set's order: index, name, label, top5 classes, prob."""
    shares = distributed.gather_objects({k: v.numpy() for k, v in result.samples.items()})
    if not distributed.is_main():
        return
    columns = {key: np.concatenate([share[key] for share in shares]) for key in shares[0]}
    order = np.argsort(columns["index"])
    columns = {key: column[order] for key, column in columns.items()}
    names = [source.name_of(int(index)) for index in columns["index"]]
    write_atomically(
        lambda file: np.savez_compressed(file, name=np.array(names),
                                         classes=np.array(source.classes), **columns), path)
    print_once(f"predictions of {len(order):,} images saved to {path}")


if __name__ == "__main__":
    sys.exit(main())
