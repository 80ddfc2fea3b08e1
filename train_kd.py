"""Distil a large-kernel (or any) teacher into a small-kernel student, or train without a teacher.

    torchrun --nproc_per_node=8 train_kd.py --teacher slak_t --student resnet50 --data-path IMAGENET

The defaults are the published ImageNet recipe. `--config run_scripts/recipes/NAME.yaml` sets
others; the command line wins.
"""
import argparse
import copy
import math
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

import data
import engine
import losses
import models
from data.datasets import DATASETS
from losses.base import LOSSES
from models.base import MODELS
from models.distiller import Distiller, FrozenTeacher, frozen_dtype
from models.large_kernel.operator import ACCEPTED, describe_choice, set_backend
from models.sparsity import GROWTHS, INITS, LAYERS, SparseMask
from models.weights import load_named
from utils import checkpoint, distributed, optim
from utils.config import Parser, at_least, below_one, between, plain, program
from utils.log import RunLog, peak_memory_gib, print_once, summary_writer_class
from utils.registry import UserError, parse_spec
from utils.rng import fold_seed

GIB_PER_FLOAT = 4 / 2 ** 30
COMPILE_FROM = 300  # updates of a run, from which on the teacher is compiled on a GPU
switch = argparse.BooleanOptionalAction  # --flag and --no-flag


def build_parser() -> Parser:
    parser = Parser(prog="train_kd.py", description=__doc__.split("\n")[0],
                    usage="%(prog)s [--flag value ...]")
    flag = parser.add_argument_group("what is trained (NAME [key=value ...])").add_argument
    flag("--teacher", nargs="+", default=["none"], metavar="NAME",
         help="none, or one of: " + ", ".join(models.list_models()))
    flag("--teacher-weights", default="published", metavar="SOURCE", help="path, URL, or random")
    flag("--teacher-weights-key", metavar="KEY", help="model, or model_ema for averaged weights")
    flag("--student", nargs="+", default=["resnet50"], metavar="NAME", help="same names")
    flag("--student-weights", default="random", metavar="SOURCE", help="path, URL, or published")
    flag("--student-weights-key", metavar="KEY", help="as for the teacher")
    flag("--loss", nargs="+", action="append", metavar="NAME",
         help="may be repeated; weight=1 and the loss's own options; one of: "
         + ", ".join(losses.list_losses()) + " (default: nkd; ce without a teacher)")

    flag = parser.add_argument_group("data and augmentation").add_argument
    flag("--data-set", nargs="+", default=["imagefolder"], metavar="NAME",
         help="imagefolder, cifar100, or outlines (embedded), with key=value options")
    flag("--data-path", help="folder that holds train/ and val/")
    flag("--input-size", type=at_least(1), default=224, help="pixels")
    flag("--crop-pct", type=float, help="evaluation crop; by default 224/256")
    flag("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of the random crop")
    flag("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="aspect of the random crop")
    flag("--hflip", type=between(0.0, 1.0), default=0.5, help="probability of a horizontal flip")
    flag("--aa", default="rand-m9-mstd0.5-inc1", help="RandAugment policy, or none")
    flag("--reprob", type=between(0.0, 1.0), default=0.25, help="probability of random erasing")
    flag("--mixup", type=at_least(0.0), default=0.8, help="mixup alpha, 0 = off")
    flag("--cutmix", type=at_least(0.0), default=1.0, help="cutmix alpha, 0 = off")
    flag("--mixup-prob", type=between(0.0, 1.0), default=1.0, help="probability to mix a batch")
    flag("--mixup-switch-prob", type=between(0.0, 1.0), default=0.5, help="share of cutmix of both")
    flag("--smoothing", type=below_one, default=0.1, help="label smoothing of the targets")
    flag("--fast-decode", action=switch, default=False, help="approximate decoding (docs/data.md)")
    flag("--num-workers", type=at_least(0), default=10, help="loader processes per process")
    flag("--skip-bad-images", action=switch, default=False, help="report them instead of stopping")

    add_optimisation_flags(parser)
    add_running_flags(parser)
    return parser


def add_optimisation_flags(parser: Parser) -> None:
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--epochs", type=at_least(1), default=300, help="epochs")
    flag("--batch-size", type=at_least(1), default=64, help="images per process and micro-batch")
    flag("--effective-batch", type=at_least(1), default=4096, help="images per update, in total")
    flag("--accum-steps", "--update-freq", type=at_least(1), help="micro-batches per update")
    flag("--lr", type=at_least(0.0), default=4e-3, help="peak rate, not scaled with the batch")
    flag("--min-lr", type=at_least(0.0), default=1e-6, help="where the cosine ends")
    flag("--warmup-epochs", type=at_least(0.0), default=20, help="linear warm-up from 0, in epochs")
    flag("--warmup-steps", type=at_least(0), help="the same in updates; wins")
    flag("--weight-decay", type=at_least(0.0), default=0.05, help="AdamW's, not on 1-D parameters")
    flag("--weight-decay-end", type=at_least(0.0), help="cosine towards it; default constant")
    flag("--layer-decay", type=float, default=1.0, help="layer-wise learning rate decay, 1 = off")
    flag("--opt-betas", type=below_one, nargs=2, default=[0.9, 0.999], help="AdamW's")
    flag("--opt-eps", type=at_least(0.0), default=1e-8, help="AdamW's")
    flag("--clip-grad", type=at_least(0.0), help="largest gradient norm; default: no limit")
    flag("--model-ema", action=switch, default=False, help="average the weights, evaluate both")
    flag("--model-ema-decay", type=below_one, default=0.9999, help="per update")
    flag("--model-ema-warmup", action=switch, default=False, help="smaller decay first; short runs")
    flag("--seed", type=between(0, 2 ** 63 - 1), default=0, help="of everything random")

    flag = parser.add_argument_group("sparse training of the student").add_argument
    flag("--sparsity", type=below_one, default=0.0, help="share of the weights to mask, 0 = off")
    flag("--sparse-init", choices=INITS, default="snip", help="density of each layer, or the masks")
    flag("--sparse-layers", choices=LAYERS, default="all", help="which weights may be masked")
    flag("--prune-rate", type=float, default=0.3, help="share of the live weights that moves first")
    flag("--prune-every", type=at_least(0), default=100, help="updates between moves, 0 = never")
    flag("--growth", choices=GROWTHS, default="random", help="where pruned weights move to")


def add_running_flags(parser: Parser) -> None:
    flag = parser.add_argument_group("running, saving, resuming").add_argument
    flag("--output-dir", type=Path, help="the run's folder (default: runs/ and a derived name)")
    flag("--resume", type=Path, metavar="FILE", help="continue this checkpoint")
    flag("--auto-resume", action=switch, default=True, help="continue the folder's last checkpoint")
    flag("--save-freq", type=at_least(0), default=10, help="epochs between numbered, 0 = none")
    flag("--save-num", type=at_least(0), default=3, help="numbered checkpoints to keep, 0 = all")
    flag("--save-every-steps", type=at_least(0), default=0, help="updates between saves, 0 = off")
    flag("--print-every", type=at_least(1), default=50, help="updates between looks at the loss")
    flag("--dry-run", action=switch, default=False, help="build and print everything, then stop")
    flag("--tensorboard", action=switch, default=False, help="write events beside log.txt")
    flag("--device", choices=distributed.DEVICES, default="auto", help="where to train")
    flag("--amp", choices=["auto", *engine.AMP_DTYPES], default="auto", help="auto: bf16 on a GPU")
    flag("--channels-last", action=switch, default=True, help="memory layout of feature maps")
    flag("--compile", action=switch, help="torch.compile of student and teacher; default: of the "
         "teacher alone on a GPU, in a run of 300 updates or more")
    flag("--large-kernel", choices=ACCEPTED, default="auto", help="backend; docs/performance.md")


@program("train_kd.py", build_parser)
def main(args: argparse.Namespace) -> int:
    """0 when the run is complete, 143 when it was asked to stop, 2 for an error of the user's."""
    # Device and processes; under torchrun each runs this function. Names are checked before all.
    check_flags(args)
    device = distributed.setup(args.device)

    # Data. The number of classes comes from it.
    train_set, val_set = data.create_splits(args.data_set, args.data_path)

    # Batch, schedule and their arithmetic. From here on args hold every value that will be used.
    args = resolve(args, device, train_size=len(train_set), num_classes=len(train_set.classes))
    total_steps = args.epochs * args.steps_per_epoch
    schedule = optim.build_schedule(
        total_steps, args.warmup_steps, lr=args.lr, min_lr=args.min_lr,
        weight_decay=args.weight_decay, weight_decay_end=args.weight_decay_end)

    # What the student starts from:
    # 1. --resume FILE;
    # 2. without it, the run folder's own checkpoint-last.pth, unless --no-auto-resume;
    # 3. without either, --student-weights;
    # 4. without that, random weights.
    # --teacher-weights has no part in it.
    folder, settings, amp_dtype = args.output_dir, plain(args), engine.AMP_DTYPES[args.amp]
    saved = checkpoint.find_saved(folder, args.resume, args.auto_resume, settings, args.defaults)

    # Student. Each part has a seed of its own, so that none depends on what was built before it.
    torch.manual_seed(fold_seed(args.seed, "student"))
    student = load_named(args.student, args.student_weights if saved is None else "random",
                         args.student_weights_key, args.num_classes, flag="--student",
                         dry_run=args.dry_run)

    # Teacher. It never trains: no gradient, no DDP, no optimizer, no checkpoint.
    teacher = None
    if args.teacher != ["none"]:
        torch.manual_seed(fold_seed(args.seed, "teacher"))
        teacher = load_named(args.teacher, args.teacher_weights, args.teacher_weights_key,
                             args.num_classes, flag="--teacher", dry_run=args.dry_run)
        teacher = FrozenTeacher(teacher, student.input_mean, student.input_std,
                                dtype=frozen_dtype(amp_dtype, device)).to(device)
    set_backend(args.large_kernel, student, teacher)

    # Losses and distiller: everything with a gradient in one module. Two blank images go through
    # it now, so that what does not fit together fails before the run folder exists.
    options = engine.StepOptions(
        device=device, amp_dtype=amp_dtype, accum_steps=args.accum_steps,
        memory_format=torch.channels_last if args.channels_last else torch.contiguous_format,
        clip_grad=args.clip_grad, seed=args.seed,
        batch_transform=data.BatchTransform(student.input_mean, student.input_std, device))
    torch.manual_seed(fold_seed(args.seed, "losses"))
    distiller = Distiller(student, *losses.create_losses(
        args.loss, student.feature_info, teacher.feature_info if teacher else None))
    distiller.to(device, memory_format=options.memory_format)
    train_loader, val_loader, mix = build_loaders(args, train_set, val_set, device)
    check_step(distiller, teacher, mix, options, args.batch_size, args.input_size)

    # Optimizer, masks, average, DDP. The masks of a new run look at a batch before SyncBatchNorm
    # is there, which would wait for the other processes; a continued run restores its masks.
    groups = optim.parameter_groups(distiller, args.weight_decay, args.layer_decay)
    optimizer = optim.build_adamw(groups, lr=args.lr, betas=tuple(args.opt_betas), eps=args.opt_eps)
    sparsity = None
    if args.sparsity:
        sparsity = SparseMask(student, optimizer, total_steps=total_steps, growth=args.growth,
                              layers=args.sparse_layers, prune_rate=args.prune_rate,
                              prune_every=args.prune_every, seed=args.seed)
        if saved is None:  # SNIP computes in float32, hence the limit
            sparsity.start(args.sparse_init, 1 - args.sparsity,
                           lambda: options.to_device(*train_loader.first_batch(most=64)))
    wrapped, ema = wrap(args, distiller, teacher, device)
    state = engine.build_state(distiller, optimizer, device=device, amp_dtype=amp_dtype, ema=ema,
                               sparsity=sparsity, wrapped=wrapped, classes=train_set.classes)
    if saved is not None:
        checkpoint.restore(state, *saved)
        del saved  # else it would stay in memory for the whole run

    # What will run.
    print_run(args, state, teacher, device, folder, num_val=len(val_set))
    if args.dry_run or state.epoch >= args.epochs:
        return 0
    checkpoint.write_run_files(folder, settings)
    log = RunLog(folder, args.epochs, args.tensorboard)

    def save(names: list[str]) -> None:
        content = {**state.state_dict(), "args": settings, "git": args.git}
        checkpoint.save(content, folder, names, keep=args.save_num)

    def after_update(state: engine.TrainState) -> bool:
        is_stopping = stop.agreed()
        if is_stopping or (args.save_every_steps and state.step % args.save_every_steps == 0):
            engine.checked_means(state)  # never save a NaN
            save([checkpoint.LAST])
        return is_stopping

    # The epochs: train, evaluate, log, save.
    with closing(train_loader), closing(val_loader), distributed.StopRequest() as stop:
        teacher_acc1, reference = evaluate_teacher(teacher, val_loader, options)
        while state.epoch < args.epochs and not stop.agreed():
            means = engine.train_one_epoch(
                state, train_loader, teacher, mix, schedule, options=options,
                steps_per_epoch=args.steps_per_epoch, print_every=args.print_every,
                after_update=after_update)
            if means is None:  # asked to stop within the epoch
                break
            for network in state.networks().values():
                distributed.broadcast_buffers(network)  # what is evaluated is what is saved
            save([checkpoint.LAST])  # whatever the evaluation may meet
            results = {suffix: engine.evaluate(network, val_loader, options=options,
                                               reference=reference)
                       for suffix, network in state.networks().items()}
            best = state.finish_epoch({suffix: result.acc1 for suffix, result in results.items()})
            log.write(epoch_record(args, state, means, results, best, teacher_acc1=teacher_acc1,
                                   lr=schedule(state.step - 1)["lr"],
                                   loaders=(train_loader, val_loader)), state.best)
            save(checkpoint.checkpoint_names(state.epoch - 1, state.epoch == args.epochs,
                                             args.save_freq, best))
    if state.epoch < args.epochs:
        print_once(f"stopped on request at update {state.step:,}; the same command continues it.")
        return 143
    last, best = results[""].acc1, state.best["best_acc1"]
    print_once(f"done: top-1 {last:.2f} %, best {best:.2f} %; everything is in {folder}")
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for what can be told wrong at once: first for names."""
    for registry, flag, specs in ((MODELS, "--teacher", [args.teacher]),
                                  (MODELS, "--student", [args.student]),
                                  (LOSSES, "--loss", args.loss or []),
                                  (DATASETS, "--data-set", [args.data_set])):
        for spec in specs:
            if spec != ["none"] or flag != "--teacher":
                registry.builder(parse_spec(spec, flag)[0])
    if args.tensorboard:
        summary_writer_class()  # better missed now than after an epoch
    useless = [name for name in ("sparse_init", "sparse_layers", "prune_rate", "prune_every",
                                 "growth") if name in args.given]
    if useless and "sparsity" not in args.given and not args.sparsity:
        raise UserError(f"--{useless[0].replace('_', '-')} does nothing without --sparsity; the "
                        "published one is 0.4.")


def resolve(args: argparse.Namespace, device: torch.device, *, train_size: int,
            num_classes: int) -> argparse.Namespace:
    """A copy of args in which what depends on the machine, the data or other flags has its value,
    for the record, too. Raises UserError where flags contradict each other."""
    args = copy.copy(args)
    args.num_classes, args.train_size = num_classes, train_size
    args.world_size = distributed.world_size()
    args.git = checkpoint.git_revision(Path(__file__).parent)
    if args.loss is None:
        args.loss = [["ce"]] if args.teacher[0] == "none" else [["nkd"]]
    if args.output_dir is None:
        args.output_dir = Path("runs") / checkpoint.run_name(
            args.teacher, args.student, args.loss, args.epochs, args.seed, args.sparsity)
    if args.amp == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if has_bf16 else "none"

    # images per update = processes x images per process x micro-batches
    asked = args.effective_batch if "effective_batch" in args.given else None
    if asked is not None and "accum_steps" not in args.given:
        args.accum_steps = None  # a recipe's; the command line wins
    args.accum_steps, args.effective_batch = optim.resolve_batch(
        args.batch_size, args.world_size, args.accum_steps, asked, default=args.effective_batch)
    args.steps_per_epoch = train_size // args.effective_batch
    if args.steps_per_epoch == 0:
        raise UserError(f"the training set has {train_size} images, fewer than one effective "
                        f"batch of {args.effective_batch}. Lower --effective-batch (and "
                        "--batch-size).")
    if args.warmup_steps is None:
        args.warmup_steps = int(args.warmup_epochs * args.steps_per_epoch)
    args.compile_teacher = args.compile
    if args.compile is None:  # it takes a minute, which a frozen teacher soon pays back
        is_long = args.epochs * args.steps_per_epoch >= COMPILE_FROM
        args.compile, args.compile_teacher = False, is_long and device.type == "cuda"
    return args


def build_loaders(args: argparse.Namespace, train_set: data.ImageSource,
                  val_set: data.ImageSource, device: torch.device
                  ) -> tuple[data.Loader, data.Loader, data.Mixup]:
    """The loaders of training and validation, and what mixes the batches of the first."""
    train_transform = data.train_transform(
        args.input_size, auto_augment=args.aa, random_erasing_prob=args.reprob, scale=args.scale,
        ratio=args.ratio, hflip_prob=args.hflip, fast_decode=args.fast_decode)
    val_transform = data.eval_transform(args.input_size, crop_pct=args.crop_pct)
    common = {"num_workers": args.num_workers, "skip_bad_images": args.skip_bad_images,
              "pin_memory": device.type == "cuda"}
    train = data.train_loader(train_set, train_transform, batch_size=args.batch_size,
                              num_batches=args.steps_per_epoch * args.accum_steps, seed=args.seed,
                              **common)
    # No gradients are kept, so half as many images more fit, as in the published runs.
    val = data.eval_loader(val_set, val_transform, batch_size=max(1, args.batch_size * 3 // 2),
                           **common)
    return train, val, data.Mixup(
        args.num_classes, mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob, smoothing=args.smoothing)


def check_step(distiller: Distiller, teacher: FrozenTeacher | None, mix: data.Mixup,
               options: engine.StepOptions, batch_size: int, input_size: int) -> None:
    """Raises UserError where a batch, the networks and the losses do not go together."""
    mix.check_batch_size(batch_size)
    images, labels = data.ImageBatch.blank(2, input_size), torch.zeros(2, dtype=torch.long)
    images, targets = mix(*options.to_device(images, labels), seed=0)
    with options.autocast():
        distiller.check(images, targets, teacher, batch_size)


def wrap(args: argparse.Namespace, distiller: Distiller, teacher: FrozenTeacher | None,
         device: torch.device) -> tuple[nn.Module, optim.ModelEma | None]:
    """The distiller as the step calls it, and the average of the student if there is one."""
    ema = None
    if args.model_ema:
        ema = optim.ModelEma(distiller.student, args.model_ema_decay, args.model_ema_warmup)
    if args.compile:
        distiller.compile()  # in place: names in the state dict stay as they are
    if args.compile_teacher and teacher is not None:
        teacher.compile()
    return distributed.parallelize(distiller, device), ema


def evaluate_teacher(teacher: FrozenTeacher | None, loader: data.Loader,
                     options: engine.StepOptions) -> tuple[float | None, torch.Tensor | None]:
    """Top-1 in percent; the class of every image of this process, -1 elsewhere (data set size,)."""
    if teacher is None:
        return None, None
    result = engine.evaluate(teacher, loader, options=options, description="teacher")
    print_once(f"teacher: top-1 {result.acc1:.2f} %, top-5 {result.acc5:.2f} % on the "
               f"{result.num_samples:,} validation images, at the student's input size")
    predictions = torch.full((loader.num_samples,), -1)
    predictions[result.samples["index"]] = result.samples["top5"][:, 0]
    return result.acc1, predictions


def epoch_record(args: argparse.Namespace, state: engine.TrainState, means: dict[str, float],
                 results: dict[str, engine.Evaluation], best: list[str], *,
                 teacher_acc1: float | None, lr: float,
                 loaders: tuple[data.Loader, data.Loader]) -> dict[str, Any]:
    """The line of log.txt of the epoch that just ended, under ConvNeXt's key names."""
    speed = means.pop("images_per_second")
    record = {"epoch": state.epoch - 1,
              **{f"train_{name}": value for name, value in means.items()}, **state.metrics()}
    for suffix, result in results.items():
        record |= {f"test_loss{suffix}": result.loss, f"test_acc1{suffix}": result.acc1,
                   f"test_acc5{suffix}": result.acc5}
        if result.agreement is not None:
            record[f"agreement{suffix}"] = result.agreement
        record[f"is_best{suffix}"] = suffix in best
    record["n_parameters"] = state.distiller.student.num_parameters
    record["images_per_second"] = speed
    if args.skip_bad_images:
        bad = torch.tensor([float(len(loader.bad)) for loader in loaders])
        record["skipped_train"], record["skipped_test"] = distributed.sum_over_ranks(bad).tolist()
    return record | {"peak_memory_gib": peak_memory_gib(next(state.distiller.parameters()).device),
                     "train_lr": lr, "teacher_acc1": teacher_acc1}


def print_run(args: argparse.Namespace, state: engine.TrainState, teacher: FrozenTeacher | None,
              device: torch.device, folder: Path, num_val: int) -> None:
    """What will run: networks, loss, and the arithmetic of batch, rate and steps."""
    student, weights = state.distiller.student, state.distiller.weights
    dtype = engine.AMP_DTYPES[args.amp] or torch.float32
    for role, spec, source, model in (("teacher", args.teacher, args.teacher_weights, teacher),
                                      ("student", args.student, args.student_weights, student)):
        if model is not None:
            size = model.input_size if model.fixed_size else args.input_size
            stages = " | ".join(f"{info.channels}x{math.ceil(size / info.stride)}^2"
                                for info in model.feature_info)
            print_once(f"{role}: {' '.join(spec)}, weights {source}, {model.num_parameters:,} "
                       f"parameters, stages {stages}{describe_choice(model, device, dtype)}")
    if args.dry_run:
        print_once(describe_cost(student, teacher, args.input_size, keeps_average=args.model_ema))
    terms = [f"{weights[spec[0]]:g} x " + " ".join(word for word in spec
                                                   if not word.startswith("weight="))
             for spec in args.loss]
    print_once(f"loss: {' + '.join(terms)}")
    print_once(f"effective batch {args.effective_batch} = {args.world_size} process(es) x "
               f"{args.batch_size} images x {args.accum_steps} accumulated")
    print_once(f"{args.train_size:,} images // {args.effective_batch} = {args.steps_per_epoch} "
               f"updates per epoch, {args.epochs * args.steps_per_epoch:,} in {args.epochs} epochs;"
               f" {num_val:,} images to evaluate on")
    compiled = "all" if args.compile else "nothing"
    if args.compile_teacher and not args.compile:
        compiled = "teacher"
    print_once(f"learning rate 0 -> {args.lr:g} in {args.warmup_steps:,} updates, then cosine to "
               f"{args.min_lr:g}; {device}, precision {args.amp}, compiled: {compiled}")
    if state.sparsity is not None:
        print_once(f"sparsity: {state.sparsity.describe()}")
    continued = f", continued at epoch {state.epoch}, update {state.step:,}" if state.step else ""
    print_once(f"run folder {folder}{continued}")
    if args.dry_run:
        print_once("dry run: nothing was trained, nothing written")
    elif state.epoch >= args.epochs:
        print_once(f"nothing to do: all {args.epochs} epochs are done. Set another --output-dir to "
                   "train again.")


def describe_cost(student: models.VisionModel, teacher: FrozenTeacher | None, input_size: int,
                  keeps_average: bool) -> str:
    """GiB of parameters in float32, and the teacher's share of a step's MACs: its forward pass and
    three times the student's make a step (a backward pass is two forward ones)."""
    copies = 5 if keeps_average else 4  # weights, gradients, two moments of AdamW; the average
    macs = student.count_macs(input_size)
    text = (f"student: {copies * student.num_parameters * GIB_PER_FLOAT:.2f} GiB of weights, "
            f"gradients, optimizer state{' and average' if keeps_average else ''}; "
            f"{macs / 1e9:.3f} G MACs forward at {input_size} px")
    if teacher is None:
        return text
    size = teacher.input_size if teacher.fixed_size else input_size
    teacher_macs = teacher.count_macs(size)
    share = teacher_macs / (teacher_macs + 3 * macs)
    held = sum(value.nbytes for value in teacher.state_dict().values())
    return (f"{text}\nteacher: {held / 2 ** 30:.2f} GiB of weights; "
            f"{teacher_macs / 1e9:.3f} G MACs forward at {size} px, {share:.0%} of a step (its "
            "forward, and forward and backward of the student)")


if __name__ == "__main__":
    sys.exit(main())
