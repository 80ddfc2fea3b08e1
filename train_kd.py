"""Distil a large-kernel (or any) teacher into a small-kernel student, or train without a teacher.

    torchrun --nproc_per_node=8 train_kd.py --teacher slak_t --student resnet50 --data-path IMAGENET

The defaults are the published ImageNet recipe. `--config run_scripts/recipes/NAME.yaml` sets
others; the command line wins.
"""
from utils import process

if __name__ == "__main__":
    process.begin()  # first, for PyTorch takes seconds to import
import argparse
import copy
import sys
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

import data
import engine
import losses
import models
from data.datasets import DATASETS
from losses.base import LOSSES, resolve_losses
from models.base import MODELS, check_spec
from models.distiller import Distiller, FrozenTeacher, describe_cost, describe_size, frozen_dtype
from models.kept_logits import check_kept, resolve_kept
from models.large_kernel.operator import ACCEPTED, describe_choice, set_backend
from models.sparsity import GROWTHS, INITS, LAYERS, SparseMask
from models.teacher_cache import CachedTeacher, open_cache
from models.weights import load_student, load_teacher
from utils import checkpoint, distributed, faults, optim
from utils.config import Parser, at_least, below_one, between, plain, program
from utils.content import checksum
from utils.log import RunLog, print_once
from utils.registry import UserError, parse_spec
from utils.rng import fold_seed
from utils.sinks import SINKS, check_sinks, open_sinks, sink_names

switch = argparse.BooleanOptionalAction  # --flag and --no-flag


def build_parser() -> Parser:
    parser = Parser(prog="train_kd.py", description=__doc__.split("\n")[0],
                    usage="%(prog)s [--flag value ...]")
    flag = parser.add_argument_group("what is trained (NAME [key=value ...])").add_argument
    flag("--teacher", nargs="+", type=MODELS.own_word, default=["none"], metavar="NAME",
         help="none, " + models.describe_models())
    flag("--teacher-weights", default="published", metavar="SOURCE", help="path, URL, or random")
    flag("--teacher-weights-key", metavar="KEY", help="model, or model_ema for averaged weights")
    flag("--student", nargs="+", type=MODELS.own_word, default=["resnet50"], metavar="NAME",
         help="same names")
    flag("--student-weights", default="random", metavar="SOURCE", help="path, URL, or published")
    flag("--student-weights-key", metavar="KEY", help="as for the teacher")
    flag("--freeze", metavar="WHAT", help="of the student: backbone, or a number of stages")
    flag("--loss", nargs="+", action="append", metavar="NAME",
         help="may be repeated; weight=1 and the loss's own options; one of: "
         + ", ".join(losses.list_losses()) + " (default: nkd; ce without a teacher)")
    flag("--bce", action=switch, default=False, help="short for --loss bce")
    flag("--teacher-cache", type=Path, metavar="DIR", help="kept logits; docs/teacher_cache.md")
    flag("--teacher-cache-only", action=switch, default=False, help="never load the teacher")
    flag("--teacher-cache-top", type=at_least(0), default=0, help="classes kept; 0 = all")
    flag("--teacher-cache-epochs", type=at_least(0), default=0, help="kept, used in turn; 0 = all")
    flag("--fill-cache", action=switch, default=False, help="fill it, and train nothing")

    flag = parser.add_argument_group("data and augmentation").add_argument
    flag("--data-set", nargs="+", type=DATASETS.own_word, default=["imagefolder"], metavar="NAME",
         help="imagefolder, imagenet, list, shards, cifar10, cifar100, imagenette, food101, pets, "
         "flowers102, or outlines (embedded), with key=value options; docs/data.md")
    flag("--data-path", help="folder that holds train/ and val/")
    flag("--data-on", choices=data.PLACES, default="disk", help="where images lie; docs/data.md")
    flag("--input-size", type=at_least(1), default=224, help="pixels")
    flag("--crop-pct", type=float, help="evaluation crop; by default 224/256")
    flag("--interpolation", choices=data.FILTERS, default="bicubic", help="filter of evaluation")
    flag("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of the random crop")
    flag("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="aspect of the random crop")
    flag("--hflip", type=between(0.0, 1.0), default=0.5, help="probability of a horizontal flip")
    flag("--aa", default="rand-m9-mstd0.5-inc1", help="a RandAugment policy, ta, 3a or none")
    flag("--repeated-aug", action=switch, default=False, help="a third of the images, thrice each")
    flag("--reprob", type=between(0.0, 1.0), default=0.25, help="probability of random erasing")
    flag("--mixup", type=at_least(0.0), default=0.8, help="mixup alpha, 0 = off")
    flag("--cutmix", type=at_least(0.0), default=1.0, help="cutmix alpha, 0 = off")
    flag("--mixup-prob", type=between(0.0, 1.0), default=1.0, help="probability to mix a batch")
    flag("--mixup-switch-prob", type=between(0.0, 1.0), default=0.5, help="share of cutmix of both")
    flag("--mixup-mode", choices=data.MIXUP_MODES, default="batch", help="what shares a draw")
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
    flag("--opt", choices=optim.OPTIMIZERS, default="adamw", help="optimizer")
    flag("--lr", type=at_least(0.0), default=4e-3, help="peak rate, not scaled with the batch")
    flag("--min-lr", type=at_least(0.0), default=1e-6, help="where the cosine ends")
    flag("--warmup-epochs", type=at_least(0.0), default=20, help="linear warm-up from 0, in epochs")
    flag("--warmup-steps", type=at_least(0), help="the same in updates; wins")
    flag("--weight-decay", type=at_least(0.0), default=0.05, help="not on 1-D parameters")
    flag("--weight-decay-end", type=at_least(0.0), help="cosine towards it; default constant")
    flag("--layer-decay", type=float, default=1.0, help="layer-wise learning rate decay, 1 = off")
    flag("--opt-betas", type=below_one, nargs=2, default=[0.9, 0.999], help="AdamW's, LAMB's")
    flag("--opt-eps", type=at_least(0.0), default=1e-8, help="AdamW's, LAMB's")
    flag("--momentum", type=below_one, default=0.9, help="SGD's")
    flag("--nesterov", action=switch, default=True, help="SGD's")
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
    flag("--save-best", choices=["weights", "full"], default="weights", help="what best "
         "and numbered checkpoints hold; full: all that a run needs to go on from them")
    flag("--save-every-steps", type=at_least(0), default=0, help="updates between saves, 0 = off")
    flag("--print-every", type=at_least(1), default=50, help="updates between looks at the loss")
    flag("--dry-run", action=switch, default=False, help="build and print everything, then stop")
    flag("--log-to", nargs="+", choices=SINKS, help="where figures go beside log.txt")
    flag("--tensorboard", action=switch, default=False, help="short for --log-to tensorboard")
    flag("--device", choices=distributed.DEVICES, default="auto", help="where to train")
    flag("--amp", choices=["auto", *engine.AMP_DTYPES], default="auto", help="auto: bf16 on a GPU")
    flag("--channels-last", action=switch, default=True, help="memory layout of feature maps")
    flag("--compile", action=switch, help="torch.compile of student and teacher; default: of the "
         "teacher alone on a GPU, where it gains by it, in a run of 300 updates or more")
    flag("--cuda-graphs", action=switch, help="replay teacher and step; default: on a GPU")
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
    schedule = optim.build_schedule(
        args.epochs * args.steps_per_epoch, args.warmup_steps, lr=args.lr, min_lr=args.min_lr,
        weight_decay=args.weight_decay, weight_decay_end=args.weight_decay_end)

    # What the student starts from:
    # 1. --resume FILE, or what the same command has saved since;
    # 2. without it, the run folder's own checkpoint-last.pth, unless --no-auto-resume;
    # 3. without either, --student-weights;
    # 4. without that, random weights.
    # --teacher-weights has no part in it.
    folder, settings = args.output_dir, plain(args)
    lock = checkpoint.lock_folder(folder, args.dry_run or args.fill_cache)
    saved = None if args.fill_cache else checkpoint.find_saved(
        folder, args.resume, args.auto_resume, settings, args.defaults)
    data.keep_labels(saved, train_set, val_set)

    # Student. Each part has a seed of its own, so that none depends on what was built before it.
    torch.manual_seed(fold_seed(args.seed, "student"))
    student = load_student(args.student, args.student_weights if saved is None else "random",
                           args.student_weights_key, train_set.classes, dry_run=args.dry_run)

    # Teacher. It never trains: no gradient, no DDP, no optimizer, no checkpoint. The step asks it,
    # or what is kept of it.
    options = build_options(args, student, device)
    train_loader, val_loader, mix = build_loaders(args, train_set, val_set, device)
    teacher, asked = build_teacher(args, settings, student, (train_loader, val_loader), options)
    set_backend(args.large_kernel, student, teacher)

    # Losses and distiller: everything with a gradient in one module. Two blank images go through
    # it now, so that what does not fit together fails before the run folder exists.
    torch.manual_seed(fold_seed(args.seed, "losses"))
    distiller = Distiller(student, *losses.create_losses(
        args.loss, student.feature_info, asked.feature_info if asked else None),
        freeze=args.freeze)
    distiller.to(device, memory_format=options.memory_format)
    check_step(distiller, asked, mix, options, args.batch_size, args.input_size)

    # Optimizer, masks, average, DDP. The masks of a new run look at a batch before SyncBatchNorm
    # is there, which would wait for the other processes; a continued run restores its masks.
    optimizer = build_optimizer(args, distiller)
    sparsity = build_masks(args, student, optimizer) if args.sparsity else None
    if sparsity is not None and saved is None:  # SNIP computes in float32, hence the limit
        sparsity.start(args.sparse_init, 1 - args.sparsity,
                       lambda: options.to_device(*train_loader.first_batch(most=64)))
    state = engine.build_state(distiller, optimizer, options, sparsity=sparsity,
                               classes=train_set.classes, **wrap(args, distiller, teacher, device))
    if saved is not None:
        checkpoint.restore(state, *saved, settings)

    # What will run.
    print_run(args, state, teacher, asked, device, folder, num_val=len(val_set))
    if args.dry_run or state.epoch >= args.epochs:
        return 0
    if args.teacher_cache:
        asked.begin(state.step * args.accum_steps, must_write=args.fill_cache)
    if args.fill_cache:
        with closing(asked), closing(train_loader), closing(val_loader):
            return asked.fill(train_loader, mix.at, partial(
                engine.evaluate_teacher, asked, val_loader, options))
    checkpoint.start_run(lock, settings)
    places = open_sinks(sink_names(args.log_to, args.tensorboard), folder, settings, state.step)
    log = RunLog(folder, args.epochs, places)

    def save(names: list[str]) -> None:
        checkpoint.save({**state.state_dict(), "args": settings, "git": args.git}, folder, names,
                        keep=args.save_num, is_whole=args.save_best == "full")

    def after_update(state: engine.TrainState) -> bool:
        is_stopping = stop.agreed()
        if is_stopping or (args.save_every_steps and state.step % args.save_every_steps == 0):
            engine.checked_means(state)  # never save a NaN
            save([checkpoint.LAST])
        return is_stopping

    # The epochs: train, evaluate, log, save.
    with distributed.StopRequest() as stop, closing(lock), closing(log), closing(train_loader), \
            closing(val_loader), closing(asked) if args.teacher_cache else nullcontext():
        with stop.at_once():
            for loader in (train_loader, val_loader):
                loader.prepare()
            teacher_acc1, reference = engine.evaluate_teacher(asked, val_loader, options)
        while state.epoch < args.epochs and not stop.agreed():
            means = engine.train_one_epoch(
                state, train_loader, asked, mix.at, schedule, options=options,
                print_every=args.print_every, after_update=after_update, on_print=log.point)
            if means is None:  # asked to stop within the epoch
                break
            for network in state.networks().values():
                distributed.broadcast_buffers(network)  # what is evaluated is what is saved
            save([checkpoint.LAST])  # whatever the evaluation may meet
            with stop.at_once():
                results = {suffix: engine.evaluate(network, val_loader, options=options,
                                                   reference=reference)
                           for suffix, network in state.networks().items()}
            best = state.finish_epoch({suffix: result.acc1 for suffix, result in results.items()})
            record = engine.epoch_record(
                state, means, results, best,
                skipping=(train_loader, val_loader) if args.skip_bad_images else ())
            log.write({**record, "train_lr": schedule(state.step - 1)["lr"],
                       "teacher_acc1": teacher_acc1}, state.best, state.step)
            save(checkpoint.checkpoint_names(state.epoch - 1, state.epoch == args.epochs,
                                             args.save_freq, best))
    if state.epoch < args.epochs:
        print_once(f"stopped on request at update {state.step:,}; the same command continues it.")
        return 143
    print_once(f"done: top-1 {results[''].acc1:.2f} %, best {state.best['best_acc1']:.2f} %; "
               f"everything is in {folder}")
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for what can be told wrong at once: first for names."""
    if args.teacher != ["none"]:
        check_spec(args.teacher, "--teacher")
    check_spec(args.student, "--student")
    for registry, flag, specs in ((LOSSES, "--loss", args.loss or []),
                                  (DATASETS, "--data-set", [args.data_set])):
        for spec in specs:
            registry.builder(parse_spec(spec, flag)[0])
    data.check_data_on(args.data_on, args.aa, args.given)
    check_sinks(sink_names(args.log_to, args.tensorboard))  # better missed now than after an epoch
    no_sparsity = "sparsity" not in args.given and not args.sparsity
    for is_off, names, reason in (
            (no_sparsity, ("sparse_init", "sparse_layers", "prune_rate", "prune_every", "growth"),
             "without --sparsity; the published one is 0.4"),
            (args.opt != "sgd", ("momentum", "nesterov"), f"with --opt {args.opt}; it is SGD's"),
            (args.opt == "sgd", ("opt_betas", "opt_eps"), "with --opt sgd; see --momentum"),
            (not args.teacher_cache, ("teacher_cache_top", "teacher_cache_epochs"),
             "without --teacher-cache")):
        useless = [name for name in names if name in args.given]
        if is_off and useless:
            raise UserError(f"--{useless[0].replace('_', '-')} does nothing {reason}.")
    check_kept(vars(args))
    losses.check_kept_logits(args.loss or [] if args.teacher_cache else [])
    if args.repeated_aug and args.mixup_mode == "pair":
        raise UserError("--mixup-mode pair mixes neighbours of the epoch's order, and "
                        "--repeated-aug makes them one image. Leave one of them out.")
    if args.sparsity and args.freeze:
        raise UserError("--sparsity would mask weights that --freeze keeps as they are. Leave one "
                        "of them out.")
    if args.sparsity and args.growth == "momentum" and args.opt == "sgd":
        raise UserError("--growth momentum ranks by AdamW's moments, which --opt sgd has not. Use "
                        "--growth gradient or random.")


def resolve(args: argparse.Namespace, device: torch.device, *, train_size: int,
            num_classes: int) -> argparse.Namespace:
    """A copy of args in which what depends on the machine, the data or other flags has its value,
    for the record, too. Raises UserError where flags contradict each other."""
    args = copy.copy(args)
    args.num_classes, args.train_size = num_classes, train_size
    args.world_size = distributed.world_size()
    args.git = checkpoint.git_revision(Path(__file__).parent)
    args.loss = resolve_losses(args.loss, adds_bce=args.bce, has_teacher=args.teacher[0] != "none")
    if args.output_dir is None:
        args.output_dir = Path("runs") / checkpoint.run_name(
            args.teacher, args.student, args.loss, args.epochs, args.seed, args.sparsity)
    args.amp = faults.resolve_precision(args.amp, device)
    vars(args).update(resolve_kept(vars(args), args.chosen))
    vars(args).update(optim.resolve_sizes(vars(args), args.given, args.chosen))
    args.compile, args.compile_teacher = faults.what_to_compile(
        args.compile, device, args.epochs * args.steps_per_epoch)
    args.cuda_graphs = faults.has_cuda_graphs(args.cuda_graphs, device)
    return args


def build_teacher(args: argparse.Namespace, settings: dict[str, Any], student: models.VisionModel,
                  loaders: tuple[data.Loader, data.Loader], options: engine.StepOptions
                  ) -> tuple[FrozenTeacher | None, FrozenTeacher | CachedTeacher | None]:
    """The teacher's network, if it may be asked, and what the step asks: it, or its kept logits.
    The checksum of its weights goes to `settings`; a dry run may not fetch them."""
    teacher = None
    if args.teacher != ["none"] and not args.teacher_cache_only:
        torch.manual_seed(fold_seed(args.seed, "teacher"))
        model = load_teacher(
            args.teacher, args.teacher_weights, args.teacher_weights_key,
            loaders[0].samples.source.classes, dry_run=args.dry_run,
            needs_logits=losses.need_teacher_logits(args.loss))
        settings[checkpoint.TEACHER] = None if args.dry_run else checksum(model.state_dict())
        teacher = FrozenTeacher(
            model, student.input_mean, student.input_std,
            dtype=frozen_dtype(options.amp_dtype, options.device)).to(options.device)
    if not args.teacher_cache:
        return teacher, teacher
    asked = open_cache(args.teacher_cache, settings, teacher, student, loaders, options)
    settings[checkpoint.TEACHER] = asked.manifest.get(checkpoint.TEACHER)
    return teacher, asked


def build_options(args: argparse.Namespace, student: models.VisionModel,
                  device: torch.device) -> engine.StepOptions:
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return engine.StepOptions(
        device=device, amp_dtype=engine.AMP_DTYPES[args.amp], accum_steps=args.accum_steps,
        memory_format=layout, clip_grad=args.clip_grad, seed=args.seed,
        steps_per_epoch=args.steps_per_epoch, epochs_kept=args.teacher_cache_epochs,
        batch_transform=data.BatchTransform(student.input_mean, student.input_std, device))


def build_loaders(args: argparse.Namespace, train_set: data.ImageSource,
                  val_set: data.ImageSource, device: torch.device
                  ) -> tuple[data.Loader, data.Loader, data.Mixup]:
    """The loaders of training and validation, and what mixes the batches of the first."""
    train_transform = data.train_transform(
        args.input_size, auto_augment=args.aa, random_erasing_prob=args.reprob, scale=args.scale,
        ratio=args.ratio, hflip_prob=args.hflip, fast_decode=args.fast_decode)
    val_transform = data.eval_transform(args.input_size, crop_pct=args.crop_pct,
                                        interpolation=args.interpolation)
    common = {"num_workers": args.num_workers, "skip_bad_images": args.skip_bad_images,
              "pin_memory": device.type == "cuda"}
    train = data.train_loader(train_set, train_transform, batch_size=args.batch_size,
                              num_batches=args.steps_per_epoch * args.accum_steps, seed=args.seed,
                              repeated_aug=args.repeated_aug, **common)
    # No gradients are kept, so half as many images more fit, as in the published runs.
    val = data.eval_loader(val_set, val_transform, batch_size=max(1, args.batch_size * 3 // 2),
                           **common)
    if args.data_on != "disk":
        train, val = (data.in_memory(loader, args.data_on, device) for loader in (train, val))
    return train, val, data.MIXUP_MODES[args.mixup_mode](
        args.num_classes, mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob, smoothing=args.smoothing, seed=args.seed)


def check_step(distiller: Distiller, teacher: FrozenTeacher | CachedTeacher | None, mix: data.Mixup,
               options: engine.StepOptions, batch_size: int, input_size: int) -> None:
    """Raises UserError where a batch, the networks and the losses do not go together."""
    mix.check_batch_size(batch_size)
    images, labels = data.ImageBatch.blank(2, input_size), torch.zeros(2, dtype=torch.long)
    images, targets = mix(*options.to_device(images, labels), seed=0)
    with options.autocast():
        distiller.check(images, targets, teacher, batch_size)


def build_optimizer(args: argparse.Namespace, distiller: Distiller) -> torch.optim.Optimizer:
    groups = optim.parameter_groups(distiller, args.weight_decay, args.layer_decay)
    return optim.build_optimizer(
        args.opt, groups, lr=args.lr, betas=tuple(args.opt_betas), eps=args.opt_eps,
        momentum=args.momentum, nesterov=args.nesterov)


def build_masks(args: argparse.Namespace, student: models.VisionModel,
                optimizer: torch.optim.Optimizer) -> SparseMask:
    return SparseMask(student, optimizer, total_steps=args.epochs * args.steps_per_epoch,
                      growth=args.growth, layers=args.sparse_layers, prune_rate=args.prune_rate,
                      prune_every=args.prune_every, seed=args.seed)


def wrap(args: argparse.Namespace, distiller: Distiller, teacher: FrozenTeacher | None,
         device: torch.device) -> dict[str, Any]:
    """Of the state: the distiller as the step calls it, what calls that, and the average."""
    ema = captured = None
    if args.model_ema:
        ema = optim.ModelEma(distiller.student, args.model_ema_decay, args.model_ema_warmup)
    if args.compile:
        distiller.compile()  # in place: names in the state dict stay as they are
    if teacher is not None:
        if args.compile or (args.compile_teacher and teacher.model.gains_by_compiler):
            teacher.compile()
        if args.cuda_graphs:
            teacher.capture()
    # No graph holds BatchNorms that wait for other processes.
    if args.cuda_graphs and not (distributed.world_size() > 1 and distiller.has_batch_norm):
        captured = distiller.capture()
    wrapped = distributed.parallelize(distiller, device, in_ddp=captured is None)
    return {"wrapped": wrapped, "captured": captured, "ema": ema}


def print_run(args: argparse.Namespace, state: engine.TrainState, teacher: FrozenTeacher | None,
              asked: FrozenTeacher | CachedTeacher | None, device: torch.device, folder: Path,
              num_val: int) -> None:
    """What will run: networks, loss, and the arithmetic of batch, rate and steps."""
    student = state.distiller.student
    dtype = engine.AMP_DTYPES[args.amp] or torch.float32
    for role, spec, source, model in (("teacher", args.teacher, args.teacher_weights, teacher),
                                      ("student", args.student, args.student_weights, student)):
        if model is not None:
            print_once(f"{role}: {' '.join(spec)}, weights {source}, "
                       f"{describe_size(model, args.input_size)}"
                       f"{describe_choice(model, device, dtype)}")
    if args.freeze:
        print_once(f"frozen: {state.distiller.describe_frozen()}")
    if args.dry_run:
        print_once(describe_cost(student, teacher, args.input_size, keeps_average=args.model_ema,
                                 num_moments=1 if args.opt == "sgd" else 2))
    print_once(f"loss: {losses.describe_losses(args.loss, state.distiller.weights)}")
    for sentence in optim.describe_schedule(vars(args), args.defaults, args.chosen):
        print_once(sentence)
    what = "all" if args.compile else "teacher" if teacher and teacher.is_compiled else "nothing"
    graphs = [name for name, is_on in (("teacher", teacher and teacher.captured.is_on),
                                       ("step", state.captured.is_on)) if is_on]
    print_once(f"{num_val:,} validation images; {device}, precision {args.amp}, compiled: {what}, "
               f"CUDA graphs: {' and '.join(graphs) or 'none'}")
    if state.sparsity is not None:
        print_once(f"sparsity: {state.sparsity.describe()}")
    if args.teacher_cache:
        print_once(asked.describe(state.distiller if args.dry_run else None))
        losses.warn_of_softening(state.distiller.losses, args.teacher_cache_top)
    continued = f", continued at epoch {state.epoch}, update {state.step:,}" if state.step else ""
    if not args.fill_cache:
        print_once(f"run folder {folder}{continued}")
    if args.dry_run:
        print_once("dry run: nothing was trained, nothing written")
    elif state.epoch >= args.epochs:
        print_once(f"nothing to do: all {args.epochs} epochs are done. Set another --output-dir to "
                   "train again.")


if __name__ == "__main__":
    sys.exit(main())
