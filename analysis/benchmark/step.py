"""A whole step of training or distillation, against the arrangement of SLaK's authors.

    python -m analysis.benchmark step                                  # SLaK-T -> ResNet-50, NKD
    python -m analysis.benchmark step --teacher none --student slak_t  # training of a SLaK
    python -m analysis.benchmark step --amp bf16 --batch-size 128 --compile teacher --against timm
    python -m analysis.benchmark step --teacher-cache --no-published   # and from a teacher cache

Both are the program's own step (engine.py) on the same images, from the bytes of a loader to the
update of AdamW. "published" has contiguous maps; a SLaK in its authors' arrangement; and the
teacher un-folded, its graph kept and back-propagated. "timm, supervised" is the step of the same
student as timm builds it, without a teacher, by cross-entropy. On a GPU ours is replayed from CUDA
graphs, as in a run; the others are not. With --teacher-cache there are two
steps more: "supervised", of the same student without a teacher by cross-entropy, and "from the
cache", which reads the teacher's logits from files that the program has written.
"""
import argparse
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from operator import truediv
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import data
import engine
import losses
import models
from analysis.benchmark import common
from analysis.benchmark.cached import Cache, open_cache
from analysis.benchmark.published import KeptTeacher, arranged, through_teacher
from data.batch import Batch
from models.base import ModelOutput, model_from_spec
from models.distiller import FrozenTeacher, frozen_dtype
from models.kept_logits import DEFAULT_TOP
from models.large_kernel import operator
from utils.config import Parser, at_least, program
from utils.cuda_graphs import WARM_UPS, Captured
from utils.faults import has_cuda_graphs
from utils.log import Meter
from utils.metrics import teacher_metrics
from utils.registry import UserError

PHASES = ("data", "teacher forward", "student forward", "backward", "optimizer")
METRICS, METRICS_AT_A_TIME = "teacher metrics", 20  # too short to be timed alone
COLUMNS = [("step", "step", ""), ("ms", "ms", ".1f"), ("ratio", "ratio", ".2f"),
           ("time / timm's", "over_timm", ".2f"),
           ("time / supervised", "over_supervised", ".3f"),
           ("images/s", "images_per_second", ".1f"), *common.RATE_COLUMNS,
           ("memory (GiB)", "memory_gib", ".2f"), *((name, name, ".1%") for name in PHASES)]

NOTES = (
    "Ratio: published time / time. Time / supervised: median of the rounds' ratios. published: "
    "un-folded, contiguous maps, nn.Conv2d per branch; its teacher's graph is kept and "
    "back-propagated. MACs: one pass through the teacher's network where the step asks it, three "
    "through the student.",
    "Shares of time by phase: from steps of ours that wait for the device after each, the student "
    "not from a CUDA graph; data is the hand-over, normalising, erasing and mixing. Memory, on a "
    "GPU: what a step holds beyond the networks.")

SUPERVISED, CACHED = "supervised", "from the cache"
FILL, TEACHER = "filling the cache", "teacher alone"  # of as many batches
TIMM, TIMM_NAMES = "timm, supervised", {
    "convnext_t": "convnext_tiny", "convnext_s": "convnext_small", "convnext_b": "convnext_base",
    "resnet18": "resnet18", "resnet34": "resnet34", "resnet50": "resnet50",
    "resnet101": "resnet101", "resnet50d": "resnet50d"}


class TimmStudent(nn.Module):
    """A network of timm as the step calls a student."""

    feature_info = ()

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise UserError("--against timm needs the package timm: pip install timm.") from None
        self.network = timm.create_model(TIMM_NAMES[name])

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        return ModelOutput(self.network(images), [])

    def no_weight_decay(self) -> set[str]:
        return set()


class Step(NamedTuple):
    """All that engine.py's step is handed."""

    state: engine.TrainState
    batches: Iterator[Batch]
    teacher: nn.Module | None
    mix: Callable
    options: engine.StepOptions

    def __call__(self) -> None:
        engine.accumulate_gradients(self.state, self.batches, self.teacher, self.mix, self.options)
        engine.optimizer_update(self.state, self.options.clip_grad)

    def warm_up(self) -> None:
        """Take the steps before and in which CUDA graphs are recorded."""
        for _ in range(WARM_UPS if self.state.captured.is_on else 0):
            self()


def build_steps(student: models.VisionModel, teacher: models.VisionModel | None,
                loss_specs: list[list[str]], batches: Iterator[Batch],
                options: engine.StepOptions, *, has_published: bool, backend: str,
                compiled: str, cuda_graphs: bool, timm_name: str | None,
                cache_of: Callable[[FrozenTeacher, Callable], Cache] | None = None
                ) -> tuple[dict[str, Step], Cache | None]:
    """The steps to compare; ours folds `teacher` and lets `backend` compute its large kernels.
    `cache_of`: what opens a cache of the frozen teacher, with what mixes; None for no cache."""
    mix = data.Mixup(student.num_classes).at
    steps, kept, frozen, cache = {}, None, None, None
    if has_published:
        if teacher is not None:
            kept = arranged(teacher).to(options.device).eval()
        theirs = options._replace(memory_format=torch.contiguous_format)
        state = common.random_state(arranged(student), kept, loss_specs, theirs)
        if kept is not None:
            state.wrapped = through_teacher(state.distiller)
        steps["published"] = Step(state, batches, kept and KeptTeacher(kept), mix, theirs)
    if teacher is not None:
        frozen = FrozenTeacher(teacher, student.input_mean, student.input_std,
                               dtype=frozen_dtype(options.amp_dtype, options.device))
        frozen.to(options.device)
        if compiled != "none":
            frozen.compile()
        if cuda_graphs:
            frozen.capture()
    if timm_name is not None:
        state = common.random_state(TimmStudent(timm_name), None, [["ce"]], options)
        steps[TIMM] = Step(state, batches, None, mix, options)
    operator.set_backend(backend, student, teacher)
    if cache_of is not None:
        cache = cache_of(frozen, mix)
        state = common.random_state(copy.deepcopy(student), None, [["ce"]], options,
                                    cuda_graphs=cuda_graphs)
        steps[SUPERVISED] = Step(state, batches, None, mix, options)
        state = common.random_state(copy.deepcopy(student), cache.teacher, loss_specs, options,
                                    cuda_graphs=cuda_graphs)
        steps[CACHED] = Step(state, batches, cache.teacher, mix, cache.options)
    state = common.random_state(student, frozen, loss_specs, options, cuda_graphs=cuda_graphs)
    steps["ours"] = Step(state, batches, frozen, mix, options)
    for name in ("ours", SUPERVISED, CACHED):
        if compiled == "all" and name in steps:
            steps[name].state.distiller.compile()
    return steps, cache


def lapped(step: Step, watch: common.Stopwatch) -> Callable[[], None]:
    """The step with a lap of the watch at the end of each of PHASES."""
    def after(name: str, function: Callable) -> Callable:
        def run(*values: Any) -> Any:
            result = function(*values)
            watch.lap(name)
            return result
        return run

    def batches() -> Iterator[Batch]:
        while True:
            watch.lap("backward")  # of the micro-batch before; nothing at the first
            yield next(step.batches)

    state = dataclasses.replace(step.state, wrapped=after("student forward", step.state.distiller),
                                captured=Captured())
    teacher = step.teacher
    if teacher is not None:
        teacher = SimpleNamespace(teach=after("teacher forward", step.teacher.teach))
    handed = (state, batches(), teacher, after("data", step.mix), step.options)

    def run() -> None:
        watch.start()
        engine.accumulate_gradients(*handed)
        watch.lap("backward")
        engine.optimizer_update(state, step.options.clip_grad)
        watch.lap("optimizer")

    return run


def metrics_action(step: Step) -> Callable[[], None]:
    """What every step of distillation logs about its teacher, METRICS_AT_A_TIME times."""
    batch = next(step.batches)
    images, labels = step.options.to_device(batch.images, batch.labels)
    _, targets = step.mix(images, labels, step.options.position(0, 0))
    logits, meter = torch.randn(2, *targets.shape, device=targets.device), Meter()

    def run() -> None:
        for _ in range(METRICS_AT_A_TIME * step.options.accum_steps):
            meter.add(teacher_metrics(*logits, targets), 0)

    return run


def filling_actions(cache: Cache, step: Step) -> dict[str, Callable[[], Any]]:
    """Filling a cache, and its network alone on as many batches, one of `step`'s again and again.
    """
    batch = next(step.batches)
    images, labels = step.options.to_device(batch.images, batch.labels)
    position = step.options.position(0, 0)
    images, _ = step.mix(images, labels, position)

    def alone() -> None:
        for _ in range(cache.num_batches):
            with step.options.autocast():
                step.teacher.teach(images, position)

    return {FILL: cache.fill, TEACHER: alone}


def time_steps(steps: dict[str, Step], repeats: int, dtype: torch.dtype, cache: Cache | None = None
               ) -> tuple[common.Seconds, dict[str, float | None]]:
    """Seconds of each step, of the ceilings, of the teacher metrics of a step if there is a
    teacher, and by phase of ours; GiB that each step takes."""
    ours = steps["ours"]
    device = ours.options.device
    memory = {}
    for name, step in steps.items():
        step()  # what is made once
        memory[name] = common.memory_of(step, device)  # a replay would take none
        step.warm_up()
    phases: common.Seconds = {name: [] for name in PHASES}
    watch = common.Stopwatch(device)
    run = lapped(ours, watch)

    def in_phases() -> None:
        watch.seconds.clear()
        run()
        for name in PHASES:
            phases[name].append(watch.seconds[name])

    actions = {**steps, "in phases": in_phases, **common.ceiling_actions(device, dtype)}
    if ours.teacher is not None:
        actions[METRICS] = metrics_action(ours)
    if cache is not None:
        actions |= filling_actions(cache, ours)
    # On a GPU several steps in a row, as in training: the host then runs ahead of it.
    shortest = 0.5 if device.type == "cuda" else 0
    seconds = common.time_interleaved(actions, repeats, device, shortest)
    if METRICS in seconds:
        seconds[METRICS] = [value / METRICS_AT_A_TIME for value in seconds[METRICS]]
    return {**seconds, **{name: values[1:] for name, values in phases.items()}}, memory


def rows_of(seconds: common.Seconds, memory: dict[str, float | None], *, images: int, macs: int,
            macs_alone: int, best: dict[str, float]) -> list[common.Row]:
    """`macs` of an image, and `macs_alone` of steps without the teacher's network."""
    medians = {name: median(values) for name, values in seconds.items()}
    whole = sum(medians[name] for name in PHASES)
    rows = []
    for name in memory:
        shares = {phase: medians[phase] / whole if name == "ours" else None for phase in PHASES}
        ratio = medians["published"] / medians[name] if "published" in medians else None
        over_timm = medians[name] / medians[TIMM] if TIMM in medians else None
        over_supervised = None
        if SUPERVISED in seconds:
            over_supervised = median(map(truediv, seconds[name], seconds[SUPERVISED]))
        count = macs_alone if name in (TIMM, SUPERVISED, CACHED) else macs
        rows.append({"step": name, "seconds": medians[name], "ms": 1000 * medians[name],
                     "ratio": ratio, "over_timm": over_timm, "over_supervised": over_supervised,
                     "images_per_second": images / medians[name],
                     **common.rates(count * images, medians[name], best),
                     "memory_gib": memory[name], **shares})
    return rows


def describe_filling(cache: Cache, seconds: common.Seconds, top: int, num_classes: int) -> str:
    medians = {name: median(seconds[name]) for name in (FILL, TEACHER)}
    rates = {name: cache.num_images / value for name, value in medians.items()}
    return (f"The cache keeps {top or 'all'} of {num_classes} classes. It is filled at "
            f"{rates[FILL]:.1f} images/s, {rates[FILL] / rates[TEACHER]:.3f} of what the teacher "
            f"alone does, {rates[TEACHER]:.1f} images/s.")


def build_networks(teacher_spec: list[str], student_spec: list[str], input_size: int
                   ) -> tuple[models.VisionModel, models.VisionModel | None, int, int]:
    """Student, teacher if there is one, and the MACs that one image needs: one pass
    through the teacher and three through the student; and without the teacher."""
    torch.manual_seed(0)
    student = model_from_spec(student_spec, "--student")
    macs = 3 * student.count_macs(input_size)
    if teacher_spec == ["none"]:
        return student, None, macs, macs
    teacher = model_from_spec(teacher_spec, "--teacher")
    size = common.size_of(teacher, input_size)
    if size != input_size:
        raise UserError(f"--teacher {teacher_spec[0]} sees images at {size} px. Set --input-size "
                        f"{size}, so that both arrangements do the same.")
    return student, teacher, macs + teacher.count_macs(input_size), macs


def build_parser() -> Parser:
    parser = common.new_parser("step", __doc__, batch_size=16, smallest_batch=2)
    flag = parser.add_argument
    flag("--teacher", nargs="+", default=["slak_t"], metavar="NAME",
         help="NAME [key=value ...] with random weights, or none")
    flag("--student", nargs="+", metavar="NAME",
         help="NAME [key=value ...]; default: resnet50, and slak_t without a teacher")
    flag("--loss", nargs="+", action="append", metavar="NAME",
         help="NAME [weight=1 key=value ...]; default: nkd, and ce without a teacher")
    flag("--amp", choices=list(engine.AMP_DTYPES), default="none", help="mixed precision")
    flag("--accum-steps", type=at_least(1), default=1, help="batches of --batch-size per update")
    flag("--large-kernel", choices=operator.ACCEPTED, default="auto",
         help="what computes the large kernels of ours")
    flag("--compile", choices=["none", "teacher", "all"], default="none", help="of ours")
    flag("--cuda-graphs", action=argparse.BooleanOptionalAction,
         help="replay ours; default: on a GPU")
    flag("--teacher-cache", action="store_true", help="measure the step from a teacher cache "
         "and the supervised one, too")
    flag("--teacher-cache-top", type=at_least(0), default=DEFAULT_TOP, metavar="K",
         help="classes kept of an image, 0 = all")
    flag("--against", choices=["timm"], help="measure timm's supervised step of the student, too")
    flag("--published", action=argparse.BooleanOptionalAction, default=True,
         help="measure the published arrangement, too")
    return parser


@program("analysis.benchmark step", build_parser)
def main(args: argparse.Namespace) -> int:
    if args.batch_size % 2:
        raise UserError(f"mixup pairs the images of a batch: --batch-size must be even, got "
                        f"{args.batch_size}.")
    device, dtype = common.start(args.device, args.threads), common.dtype_of(args.amp)
    is_alone = args.teacher == ["none"]
    student_spec = args.student or ["slak_t" if is_alone else "resnet50"]
    loss_specs = args.loss or [["ce" if is_alone else "nkd"]]
    timm_name = student_spec[0] if args.against else None
    if timm_name is not None and (timm_name not in TIMM_NAMES or student_spec[1:]):
        raise UserError(f"--against timm compares {', '.join(TIMM_NAMES)}, without options; got "
                        f"{' '.join(student_spec)}.")
    if args.teacher_cache:
        if is_alone:
            raise UserError("--teacher-cache keeps what a teacher says; --teacher is none.")
        losses.check_kept_logits(loss_specs)
    cuda_graphs = has_cuda_graphs(args.cuda_graphs, device)
    student, teacher, macs, macs_alone = build_networks(args.teacher, student_spec, args.input_size)
    batches = common.random_batches(args.batch_size, args.input_size, student.num_classes, device)
    options = common.step_options(device, args.amp, args.accum_steps)
    top = args.teacher_cache_top if args.teacher_cache_top < student.num_classes else 0
    with ExitStack() as stack:
        cache_of = None
        if args.teacher_cache:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

            def cache_of(frozen: FrozenTeacher, mix: Callable) -> Cache:
                cache = open_cache(folder, frozen, batches, mix, options, top=top,
                                   batch_size=args.batch_size, input_size=args.input_size)
                stack.callback(cache.teacher.close)
                return cache

        steps, cache = build_steps(student, teacher, loss_specs, batches, options,
                                   has_published=args.published, backend=args.large_kernel,
                                   compiled=args.compile, cuda_graphs=cuda_graphs,
                                   timm_name=timm_name, cache_of=cache_of)
        seconds, memory = time_steps(steps, args.repeats, dtype, cache)
    best, images = common.ceilings(seconds, device, dtype), args.batch_size * args.accum_steps
    rows = rows_of(seconds, memory, images=images, macs=macs, macs_alone=macs_alone, best=best)
    notes = [*NOTES, common.ceilings_text(best, dtype)]
    if METRICS in seconds:
        share = median(seconds[METRICS]) / rows[-1]["seconds"]  # ours is the last row
        notes.append(f"Of ours, the teacher metrics that a step logs take {100 * share:.2f} % "
                     "(measured alone in the same rounds).")
    if cache is not None:
        notes.append(describe_filling(cache, seconds, top, student.num_classes))
    networks = nn.ModuleList([student] if teacher is None else [student, teacher])
    title = (f"Training step, {' '.join(args.teacher)} -> {' '.join(student_spec)}, "
             f"{', '.join(' '.join(spec) for spec in loss_specs)}, AdamW, {args.accum_steps} x "
             f"{args.batch_size} images at {args.input_size} px, precision {args.amp}, compiled: "
             f"{args.compile}{', from CUDA graphs' * cuda_graphs}"
             f"{operator.describe_choice(networks, device, dtype)}")
    common.show(title, rows, COLUMNS, notes, {**best, "seconds": seconds}, repeats=args.repeats,
                device=device, json_path=args.json)
    return 0
