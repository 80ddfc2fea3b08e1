"""Distil a large-kernel (or any) teacher into a small-kernel student, or train without a teacher.

    torchrun --nproc_per_node=8 train_kd.py --teacher slak_t --student resnet50 --data-path IMAGENET

The defaults are the published ImageNet recipe. `--config run_scripts/recipes/NAME.yaml` sets
others; the command line wins.
"""
import argparse
import math
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import engine
import losses
import models
from analysis.describe import describe_cost, describe_network
from models.distiller import Distiller, FrozenTeacher, OnOwnStream
from models.health import measure_health
from models.large_kernel.operator import CHOICES, describe_choice, use
from models.sparsity import SparseMask, add_sparsity_flags
from models.weights import fetch_weights
from utils import checkpoint, config, distributed, optim
from utils.log import RunLog, peak_memory_gib, print_once, summary_writer_class
from utils.optim import ModelEma, resolve_batch
from utils.registry import UserError, parse_spec
from utils.rng import fold_seed
from utils.run_name import run_name


def build_parser() -> config.Parser:
    parser = config.Parser(prog="train_kd.py", description=__doc__.split("\n")[0])
    group = parser.add_argument_group("what is trained (NAME [key=value ...])")
    group.add_argument("--teacher", nargs="+", default=["none"], metavar="NAME",
                       help="none, or one of: " + ", ".join(models.list_models()))
    group.add_argument("--teacher-weights", default="published", metavar="SOURCE",
                       help="path, URL, published, or random")
    group.add_argument("--teacher-weights-key", metavar="KEY",
                       help="model, or model_ema for averaged weights, where a file has both")
    group.add_argument("--student", nargs="+", default=["resnet50"], metavar="NAME",
                       help="same names as --teacher")
    group.add_argument("--student-weights", default="random", metavar="SOURCE",
                       help="start from: path, URL, published, or random")
    group.add_argument("--student-weights-key", metavar="KEY", help="as for the teacher")
    group.add_argument("--loss", nargs="+", action="append", metavar="NAME",
                       help="may be repeated; weight=1 and the loss's own options; one of: "
                       + ", ".join(losses.list_losses()) + " (default: nkd; ce without a teacher)")
    _add_data_flags(parser)
    optim.add_optimisation_flags(parser)
    add_sparsity_flags(parser)
    _add_run_flags(parser)
    return parser


def _add_data_flags(parser: config.Parser) -> None:
    group = parser.add_argument_group("data and augmentation")
    flag = group.add_argument
    flag("--data-set", nargs="+", default=["imagefolder"], metavar="NAME",
         help="imagefolder, cifar100, or outlines (embedded), with key=value options")
    flag("--data-path", default=None, help="folder that holds train/ and val/")
    flag("--input-size", type=int, default=224, help="pixels")
    flag("--crop-pct", type=float, default=None, help="evaluation crop; by default 224/256")
    flag("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of the random crop")
    flag("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="aspect of the random crop")
    flag("--hflip", type=float, default=0.5, help="probability of a horizontal flip")
    flag("--aa", default="rand-m9-mstd0.5-inc1", help="RandAugment policy, or none")
    flag("--reprob", type=float, default=0.25, help="probability of random erasing")
    flag("--mixup", type=float, default=0.8, help="mixup alpha, 0 = off")
    flag("--cutmix", type=float, default=1.0, help="cutmix alpha, 0 = off")
    flag("--mixup-prob", type=float, default=1.0, help="probability to mix a batch")
    flag("--mixup-switch-prob", type=float, default=0.5, help="share of cutmix where both are on")
    flag("--smoothing", type=float, default=0.1, help="label smoothing of the targets")
    flag("--fast-decode", action=argparse.BooleanOptionalAction, default=False,
         help="scaled JPEG decoding, integer resize; 0.03 to 1.3 grey levels off in the mean")
    flag("--num-workers", type=int, default=10, help="loader processes per training process")
    flag("--skip-bad-images", action=argparse.BooleanOptionalAction, default=False,
         help="count and report unreadable pictures instead of stopping")


def _add_run_flags(parser: config.Parser) -> None:
    group = parser.add_argument_group("running, saving, resuming")
    flag = group.add_argument
    flag("--output-dir", type=Path, default=Path("runs"), help="parent of the run's own folder")
    flag("--resume", type=Path, default=None, metavar="FILE", help="continue this checkpoint")
    flag("--auto-resume", action=argparse.BooleanOptionalAction, default=True,
         help="continue the run folder's checkpoint-last.pth, unless --resume is given")
    flag("--save-freq", type=int, default=10, help="epochs between numbered checkpoints, 0 = none")
    flag("--save-num", type=int, default=3, help="numbered checkpoints to keep, 0 = all")
    flag("--save-every-steps", type=int, default=0,
         help="updates between checkpoint-last.pth within an epoch, 0 = at its end only")
    flag("--print-every", type=int, default=50, help="updates between looks at the loss")
    flag("--log-kd-health", action=argparse.BooleanOptionalAction, default=False,
         help="log, per --print-every, the teacher's accuracy and entropy on the batches of the "
         "training, the student's agreement, each loss's share of the gradient (models/health.py)")
    flag("--dry-run", action=argparse.BooleanOptionalAction, default=False,
         help="build everything, print it and its cost, stop; published weights are not fetched")
    flag("--tensorboard", action=argparse.BooleanOptionalAction, default=False,
         help="write events beside log.txt (needs the package tensorboard)")
    flag("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    flag("--amp", choices=["auto", *engine.AMP_DTYPES], default="auto",
         help="mixed precision; auto: bf16 on a GPU that has it, else none")
    flag("--channels-last", action=argparse.BooleanOptionalAction, default=True,
         help="memory layout of maps and convolutions")
    flag("--compile", action=argparse.BooleanOptionalAction, default=False,
         help="torch.compile of student and teacher")
    flag("--large-kernel", choices=CHOICES, default="auto",
         help="code for large depthwise kernels (docs/performance.md); equal up to rounding")
    flag("--teacher-stream", action=argparse.BooleanOptionalAction, default=False,
         help="the teacher on a CUDA stream of its own, beside the student's forward pass")


class Parts(NamedTuple):
    """Everything a run is made of, built and checked before any training time is spent."""

    teacher: FrozenTeacher | None
    step_teacher: FrozenTeacher | OnOwnStream | None  # the same, as the training step calls it
    state: engine.TrainState
    train: data.Loader
    val: data.Loader
    mix: data.Mixup
    options: engine.StepOptions
    probe: engine.Probe | None


def main(argv: list[str] | None = None) -> int:
    """0 when the run is complete, 143 when it was asked to stop, 2 for an error of the user's."""
    return distributed.run_program("train_kd.py", lambda: run(
        build_parser().parse(sys.argv[1:] if argv is None else argv)))


def run(args: argparse.Namespace) -> int:
    device = distributed.setup(args.device)
    check_ranges(args, device)
    resolve_defaults(args, device)
    name, options = parse_spec(args.data_set, "--data-set")
    sources = [data.create_dataset(name, split, args.data_path, **options)
               for split in ("train", "val")]
    data.check_same_classes(*sources)
    args.num_classes, args.train_size = len(sources[0].classes), len(sources[0])
    resolve_batch_flags(args)
    schedule = build_schedule(args)
    folder = args.output_dir / run_name(
        args.teacher, args.student, args.loss, args.epochs, args.seed, args.sparsity)
    saved = checkpoint.find_checkpoint(folder, args.resume, args.auto_resume, config.plain(args),
                                       defaults=config.plain(build_parser().parse([])))
    checkpoint.check_same_start(saved, folder)
    parts = build_parts(args, device, sources, is_new=saved is None)
    if saved is not None:
        checkpoint.restore(parts.state, *saved)
    is_resumed, saved = saved is not None, None  # else it would stay in memory for the whole run
    describe_run(args, parts, folder, is_resumed)
    if args.dry_run:
        print_once("dry run: nothing was trained, nothing written")
        return 0
    if distributed.is_main():
        config.write_run_files(folder, args)
    distributed.barrier()
    log = RunLog(folder, args.tensorboard)
    with closing(parts.train), closing(parts.val), distributed.StopRequest() as stop:
        return train(args, parts, schedule, folder, log=log, stop=stop)


def check_ranges(args: argparse.Namespace, device: torch.device) -> None:
    smallest = {"epochs": 1, "batch_size": 1, "effective_batch": 1, "accum_steps": 1, "lr": 0,
                "min_lr": 0, "warmup_epochs": 0, "warmup_steps": 0, "weight_decay": 0,
                "num_workers": 0, "print_every": 1, "save_freq": 0, "save_num": 0,
                "save_every_steps": 0, "input_size": 1, "clip_grad": 0, "seed": 0,
                "weight_decay_end": 0, "opt_eps": 0, "prune_every": 0}
    for name, limit in smallest.items():
        value = getattr(args, name)
        if value is not None and not limit <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be at least {limit}, got {value}.")
    for name in ("model_ema_decay", "opt_betas"):
        values = getattr(args, name)
        if not all(0 <= value < 1 for value in ([values] if name != "opt_betas" else values)):
            raise UserError(f"--{name.replace('_', '-')} must lie in [0, 1), got {values}.")
    useless = {"sparse_init", "sparse_layers", "prune_rate", "prune_every", "growth"}
    if useless & {*args.given} and "sparsity" not in args.given and not args.sparsity:
        raise UserError(f"--{min(useless & {*args.given}).replace('_', '-')} does nothing without "
                        "--sparsity; the published one is 0.4.")
    if args.teacher_stream and (device.type != "cuda" or args.teacher == ["none"]):
        raise UserError("--teacher-stream needs a teacher and a GPU; leave it out.")
    if args.log_kd_health and args.teacher == ["none"]:
        raise UserError("--log-kd-health logs what a teacher passes on, and there is none. Name "
                        "one with --teacher, or leave the flag out.")
    if args.tensorboard:
        summary_writer_class()


def resolve_defaults(args: argparse.Namespace, device: torch.device) -> None:
    """Replace what depends on the machine or on other flags by its value, for the record."""
    if args.loss is None:
        args.loss = [["ce"]] if args.teacher[0] == "none" else [["nkd"]]
    if args.amp == "auto":
        has_bf16 = (device.type == "cuda"
                    and torch.cuda.is_bf16_supported(including_emulation=False))
        args.amp = "bf16" if has_bf16 else "none"
    args.world_size = distributed.world_size()
    args.git = checkpoint.git_revision(Path(__file__).parent)


def resolve_batch_flags(args: argparse.Namespace) -> None:
    """Settle accumulation, effective batch and updates per epoch."""
    asked = args.effective_batch if "effective_batch" in args.given else None
    if asked is not None and "accum_steps" not in args.given:
        args.accum_steps = None  # a recipe's; the command line wins
    args.accum_steps, args.effective_batch = resolve_batch(
        args.batch_size, args.world_size, args.accum_steps, asked, default=args.effective_batch)
    args.steps_per_epoch = args.train_size // args.effective_batch
    if args.steps_per_epoch == 0:
        raise UserError(f"the training set has {args.train_size} images, fewer than one effective "
                        f"batch of {args.effective_batch}. Lower --effective-batch (and "
                        "--batch-size).")


def build_schedule(args: argparse.Namespace) -> Callable[[int], dict[str, float]]:
    """update -> learning rate and weight decay."""
    total = args.epochs * args.steps_per_epoch
    if args.warmup_steps is None:
        args.warmup_steps = int(args.warmup_epochs * args.steps_per_epoch)
    lr = optim.cosine_schedule(args.lr, args.min_lr, total, args.warmup_steps)
    final_decay = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    weight_decay = optim.cosine_schedule(args.weight_decay, final_decay, total)
    return lambda step: {"lr": lr(step), "weight_decay": weight_decay(step)}


def build_parts(args: argparse.Namespace, device: torch.device, sources: list,
                is_new: bool) -> Parts:
    torch.manual_seed(fold_seed(args.seed, "student"))
    student = build_model(args.student, "--student", args.num_classes,
                          args.student_weights if is_new else "random",
                          args.student_weights_key, args.dry_run)
    if student.input_size not in (None, args.input_size):
        raise UserError(f"--student {args.student[0]} takes {student.input_size} px only, and "
                        f"--input-size is {args.input_size}.")
    teacher = build_teacher(args, student)
    use(args.large_kernel, student, teacher)
    options = engine.StepOptions(
        device=device, amp_dtype=engine.AMP_DTYPES[args.amp], accum_steps=args.accum_steps,
        memory_format=torch.channels_last if args.channels_last else torch.contiguous_format,
        clip_grad=args.clip_grad, seed=args.seed,
        prepare=data.BatchTransform(student.input_mean, student.input_std, device))
    torch.manual_seed(fold_seed(args.seed, "losses"))
    distiller = Distiller(student, *losses.create_losses(
        args.loss, student.feature_info, teacher and teacher.feature_info))
    distiller.to(device, memory_format=options.memory_format)
    if teacher is not None:
        teacher.to(device)
    train, val = build_loaders(args, sources, pin_memory=device.type == "cuda")
    mix = data.Mixup(args.num_classes, mixup_alpha=args.mixup, cutmix_alpha=args.cutmix,
                     prob=args.mixup_prob, switch_prob=args.mixup_switch_prob,
                     smoothing=args.smoothing)
    check_step(args, distiller, teacher, mix, options)
    if args.compile and teacher is not None:
        teacher.compile()
    state = build_state(args, distiller, options, train if is_new else None)
    state.classes = sources[0].classes
    step_teacher = OnOwnStream(teacher, device) if args.teacher_stream else teacher
    probe = partial(measure_health, state.distiller) if args.log_kd_health else None
    return Parts(teacher, step_teacher, state, train, val, mix, options, probe)


def check_step(args: argparse.Namespace, distiller: Distiller, teacher: FrozenTeacher | None,
               mix: data.Mixup, options: engine.StepOptions) -> None:
    """What does not fit together shall fail before the run folder exists."""
    if mix.mixes and args.batch_size % 2:
        raise UserError(f"mixup and cutmix pair the images of a batch, so --batch-size must be "
                        f"even; got {args.batch_size}.")
    if args.batch_size == 1 and any(isinstance(module, nn.BatchNorm2d)
                                    for module in distiller.student.modules()):
        raise UserError("--batch-size 1 leaves BatchNorm nothing to average over; use 2 or more.")
    images = data.ImageBatch.blank(2, args.input_size)
    images, targets = mix(*options.to_device(images, torch.zeros(2, dtype=torch.long)), seed=0)
    with options.autocast():
        distiller.check(images, targets, teacher)


def build_model(words: list[str], flag: str, num_classes: int, weights: str,
                weights_key: str | None, dry_run: bool) -> models.VisionModel:
    name, options = parse_spec(words, flag)
    model = models.create_model(name, num_classes, **options)
    fetch_weights(model, name, weights, f"{flag}-weights", weights_key, dry_run=dry_run)
    return model


def build_teacher(args: argparse.Namespace, student: models.VisionModel) -> FrozenTeacher | None:
    if args.teacher == ["none"]:
        return None
    torch.manual_seed(fold_seed(args.seed, "teacher"))
    model = build_model(args.teacher, "--teacher", args.num_classes, args.teacher_weights,
                        args.teacher_weights_key, args.dry_run)
    return FrozenTeacher(model, student.input_mean, student.input_std)


def build_loaders(args: argparse.Namespace, sources: list,
                  pin_memory: bool) -> tuple[data.Loader, data.Loader]:
    train_transform = data.train_transform(
        args.input_size, auto_augment=args.aa, random_erasing_prob=args.reprob, scale=args.scale,
        ratio=args.ratio, hflip_prob=args.hflip, fast_decode=args.fast_decode)
    val_transform = data.eval_transform(args.input_size, crop_pct=args.crop_pct)
    common = {"num_workers": args.num_workers, "skip_bad_images": args.skip_bad_images,
              "pin_memory": pin_memory}
    train = data.train_loader(sources[0], train_transform, batch_size=args.batch_size,
                              num_batches=args.steps_per_epoch * args.accum_steps, seed=args.seed,
                              **common)
    # No gradients are kept, so half as many images more fit, as in the published runs.
    val = data.eval_loader(sources[1], val_transform, batch_size=max(1, args.batch_size * 3 // 2),
                           **common)
    return train, val


def build_state(args: argparse.Namespace, distiller: Distiller, options: engine.StepOptions,
                loader: data.Loader | None) -> engine.TrainState:
    """`loader` shows the masks of a new run a batch; without it they wait to be restored."""
    device = options.device
    groups = optim.parameter_groups(distiller, args.weight_decay, args.layer_decay)
    optimizer = optim.build_adamw(groups, lr=args.lr, betas=tuple(args.opt_betas), eps=args.opt_eps)
    sparsity = build_sparsity(args, distiller.student, optimizer)
    if sparsity is not None and loader is not None:
        # Before SyncBatchNorm, which would wait for other processes. In float32, hence the limit.
        sparsity.start(args.sparse_init, 1 - args.sparsity,
                       lambda: options.to_device(*loader.first_batch(most=64)))
    if distributed.world_size() > 1 and device.type == "cuda":
        # It needs CUDA; on the CPU each process keeps the statistics of its own batch.
        distiller = nn.SyncBatchNorm.convert_sync_batchnorm(distiller)  # the parameters stay
    ema = None
    if args.model_ema:
        ema = ModelEma(distiller.student, args.model_ema_decay, args.model_ema_warmup)
    if args.compile:
        distiller.compile()  # in place: names in the state dict stay as they are
    wrapped = distiller
    if distributed.world_size() > 1:
        wrapped = DistributedDataParallel(
            distiller, device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True)
    return engine.TrainState(
        distiller=distiller, wrapped=wrapped, ema=ema, optimizer=optimizer, sparsity=sparsity,
        scaler=torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"),
        best=dict.fromkeys(["best_acc1"] + ["best_acc1_ema"] * (ema is not None), -math.inf))


def build_sparsity(args: argparse.Namespace, student: models.VisionModel,
                   optimizer: torch.optim.Optimizer) -> SparseMask | None:
    if not args.sparsity:
        return None
    return SparseMask(student, optimizer, total_steps=args.epochs * args.steps_per_epoch,
                      layers=args.sparse_layers, growth=args.growth, prune_rate=args.prune_rate,
                      prune_every=args.prune_every, seed=args.seed)


def describe_run(args: argparse.Namespace, parts: Parts, folder: Path, resumed: bool) -> None:
    """Print what will run, with the arithmetic of batch, rate and steps."""
    student = parts.state.distiller.student
    who = [("student", args.student, student, args.student_weights)]
    if parts.teacher is not None:
        who.insert(0, ("teacher", args.teacher, parts.teacher, args.teacher_weights))
    options = parts.options
    for role, words, model, weights in who:
        print_once(describe_network(role, words, model, weights, args.input_size)
            + describe_choice(model, options.device, options.amp_dtype or torch.float32))
    if args.dry_run:
        print_once(describe_cost(student, parts.teacher, args.input_size, keeps_average=args.model_ema))
    weights = parts.state.distiller.weights
    print_once("loss: " + " + ".join(
        f"{weights[words[0]]:g} x " + " ".join(w for w in words if not w.startswith("weight="))
        for words in args.loss))
    print_once(f"effective batch {args.effective_batch} = {args.world_size} process(es) x "
        f"{args.batch_size} images x {args.accum_steps} accumulated")
    total = args.epochs * args.steps_per_epoch
    print_once(f"{args.train_size:,} images // {args.effective_batch} = {args.steps_per_epoch} updates "
        f"per epoch, {total:,} in {args.epochs} epochs; {parts.val.num_samples:,} images to "
        "evaluate on")
    print_once(f"learning rate 0 -> {args.lr:g} in {args.warmup_steps:,} updates, then cosine to "
        f"{args.min_lr:g}; {options.device}, precision {args.amp}")
    state = parts.state
    if state.sparsity is not None:
        print_once(f"sparsity: {state.sparsity.describe()}")
    print_once(f"run folder {folder}" + (f", continued at epoch {state.epoch}, update {state.step:,}"
                                  if resumed else ""))


def train(args: argparse.Namespace, parts: Parts, schedule: Callable, folder: Path, *,
          log: RunLog, stop: distributed.StopRequest) -> int:
    """All remaining epochs; the exit code."""
    state = parts.state
    if state.epoch >= args.epochs:
        print_once(f"nothing to do: all {args.epochs} epochs are done. Set another --output-dir to train "
            "again.")
        return 0
    reference, teacher_acc1 = teacher_predictions(parts)

    def after_update(state: engine.TrainState) -> bool:
        is_stopping = stop.agreed()
        if is_stopping or (args.save_every_steps and state.step % args.save_every_steps == 0):
            engine.checked_means(state)  # never save a NaN
            save(args, state, folder, [checkpoint.LAST])
        return is_stopping

    while state.epoch < args.epochs:
        means = engine.train_one_epoch(
            state, parts.train, parts.step_teacher, parts.mix, schedule, options=parts.options,
            steps_per_epoch=args.steps_per_epoch, print_every=args.print_every,
            after_update=after_update, probe=parts.probe)
        if means is None:
            print_once(f"stopped on request at update {state.step:,}; everything is in {folder}. The same "
                "command continues it.")
            return 143
        for network in state.networks().values():
            distributed.broadcast_buffers(network)  # what is evaluated is what is saved
        save(args, state, folder, [checkpoint.LAST])  # whatever the evaluation may meet
        record = finish_epoch(args, parts, means, reference)
        record |= {"train_lr": schedule(state.step - 1)["lr"], "teacher_acc1": teacher_acc1}
        log.write(record)
        best = [suffix for suffix in state.networks() if record[f"is_best{suffix}"]]
        save(args, state, folder, checkpoint.checkpoint_names(
            record["epoch"], state.epoch == args.epochs, args.save_freq, best))
        if state.epoch < args.epochs and stop.agreed():
            print_once(f"stopped on request after epoch {state.epoch - 1}; the same command continues.")
            return 143
    print_once(f"done: best top-1 {state.best['best_acc1']:.2f} %; checkpoints and log.txt in {folder}")
    return 0


def teacher_predictions(parts: Parts) -> tuple[torch.Tensor | None, float | None]:
    """The teacher's class for every validation image of this process, and its top-1."""
    if parts.teacher is None:
        return None, None
    result = engine.evaluate(parts.teacher, parts.val, options=parts.options,
                             description="teacher")
    print_once(f"teacher: top-1 {result.acc1:.2f} %, top-5 {result.acc5:.2f} % on the "
        f"{result.num_samples:,} validation images, at the student's input size")
    predictions = torch.full((parts.val.num_samples,), -1)
    predictions[result.samples["index"]] = result.samples["top5"][:, 0]
    return predictions, result.acc1


def finish_epoch(args: argparse.Namespace, parts: Parts, means: dict[str, float],
                 reference: torch.Tensor | None) -> dict[str, Any]:
    """Evaluate, advance the state by an epoch, and return its line of log.txt."""
    state = parts.state
    speed = means.pop("images_per_second")
    record = {"epoch": state.epoch, **{f"train_{name}": value for name, value in means.items()},
              **state.figures()}
    for suffix, network in state.networks().items():
        result = engine.evaluate(network, parts.val, options=parts.options, reference=reference)
        record |= {f"test_loss{suffix}": result.loss, f"test_acc1{suffix}": result.acc1,
                   f"test_acc5{suffix}": result.acc5}
        if reference is not None:
            record[f"agreement{suffix}"] = result.agreement
        best = f"best_acc1{suffix}"
        record[f"is_best{suffix}"] = result.acc1 > state.best[best]
        state.best[best] = max(result.acc1, state.best[best])
    record["n_parameters"] = state.distiller.student.num_parameters
    record["images_per_second"] = speed
    if args.skip_bad_images:
        bad = torch.tensor([float(len(loader.bad)) for loader in (parts.train, parts.val)])
        record["skipped_train"], record["skipped_test"] = distributed.sum_over_ranks(bad).tolist()
    record["peak_memory_gib"] = peak_memory_gib(parts.options.device)
    state.epoch += 1
    shown = ", ".join(f"{key.removeprefix('test_')} {record[key]:.2f}" for key in record
                      if key.startswith(("test_acc1", "agreement")))
    print_once(f"epoch {record['epoch']}: train loss {record['train_loss']:.3f}, {shown}"
        + (f", {speed:.0f} images/s" if speed else ""))
    return record


def save(args: argparse.Namespace, state: engine.TrainState, folder: Path,
         names: list[str]) -> None:
    """Write the whole state to each of `names`. Called by all processes; the first one writes."""
    content = {**state.state_dict(), "args": config.plain(args), "git": args.git}
    checkpoint.save(content, folder, names, keep=args.save_num)


if __name__ == "__main__":
    sys.exit(main())
