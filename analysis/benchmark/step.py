"""A whole step of training or distillation, against the arrangement of SLaK's authors.

    python -m analysis.benchmark step                                  # SLaK-T -> ResNet-50, NKD
    python -m analysis.benchmark step --teacher none --student slak_t  # training of a SLaK
    python -m analysis.benchmark step --amp bf16 --batch-size 128 --device cuda

Both are the program's own step (engine.py) on the same pictures, from the bytes of a loader to the
update of AdamW. "published" has contiguous maps; a SLaK in its authors' arrangement; and the
teacher un-folded, its graph kept and back-propagated.
"""
import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import data
import engine
import models
from analysis.benchmark.common import (
    Seconds,
    Stopwatch,
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
    random_images,
    random_state,
    show,
    start,
    time_interleaved,
)
from analysis.benchmark.published import GraphDistiller, GraphTeacher, arranged
from analysis.benchmark.teacher import PRECISIONS
from analysis.complexity import count_macs
from models.distiller import FrozenTeacher
from models.large_kernel import operator
from utils.registry import UserError, parse_spec

PHASES = ("data", "teacher forward", "student forward", "backward", "optimizer")

NOTES = (
    "Ratio: published time / time. published: un-folded, contiguous maps, nn.Conv2d per branch; "
    "its teacher's graph is kept and back-propagated. Multiply-adds: one pass through the teacher, "
    "three through the student, in both.",
    "Shares of time by phase: from steps of ours that wait for the device after each; data is the "
    "hand-over, normalising, erasing and mixing. Memory, on a GPU: what a step holds beyond the "
    "networks.")


class Step(NamedTuple):
    """All that engine.py's step is handed."""

    state: engine.TrainState
    batches: Iterator
    teacher: torch.nn.Module | None
    mix: Callable
    options: engine.StepOptions

    def __call__(self) -> None:
        engine.accumulate_gradients(self.state, self.batches, self.teacher, self.mix, self.options)
        engine.optimizer_update(self.state, self.options.clip_grad)


def our_step(student: models.VisionModel, teacher: models.VisionModel | None,
             loss_specs: list[list[str]], *, batches: Iterator,
             options: engine.StepOptions) -> Step:
    """As train_kd.py builds it."""
    frozen = None
    if teacher is not None:
        frozen = FrozenTeacher(teacher, student.input_mean, student.input_std).to(options.device)
    state = random_state(student, frozen, loss_specs, options, keeps_average=False)
    return Step(state, batches, frozen, data.Mixup(student.num_classes), options)


def published_step(student: models.VisionModel, teacher: models.VisionModel | None,
                   loss_specs: list[list[str]], *, batches: Iterator,
                   options: engine.StepOptions) -> Step:
    options = options._replace(memory_format=torch.contiguous_format)
    kept = None if teacher is None else GraphTeacher(arranged(teacher)).to(options.device)
    state = random_state(arranged(student), kept, loss_specs, options, keeps_average=False)
    if kept is not None:
        state.wrapped = GraphDistiller(state.distiller)
    return Step(state, batches, kept, data.Mixup(student.num_classes), options)


def lapped(step: Step, watch: Stopwatch) -> Callable[[], None]:
    """The step with a lap of the watch at the end of each of PHASES."""
    def batches() -> Iterator:
        while True:
            watch.lap("backward")  # of the micro-batch before; nothing at the first
            yield next(step.batches)

    def mix(*arguments: Any) -> Any:
        mixed = step.mix(*arguments)
        watch.lap("data")
        return mixed

    def teacher(images: torch.Tensor) -> Any:
        output = step.teacher(images)
        watch.lap("teacher forward")
        return output

    def forward(*arguments: Any) -> Any:
        output = step.state.distiller(*arguments)
        watch.lap("student forward")
        return output

    state = dataclasses.replace(step.state, wrapped=forward)
    handed = (state, batches(), step.teacher and teacher, mix, step.options)

    def run() -> None:
        watch.start()
        engine.accumulate_gradients(*handed)
        watch.lap("backward")
        engine.optimizer_update(state, step.options.clip_grad)
        watch.lap("optimizer")

    return run


def time_steps(steps: dict[str, Step], repeats: int, device: torch.device, dtype: torch.dtype
               ) -> tuple[Seconds, dict[str, float | None]]:
    """Seconds of each step, of the ceilings, and by phase of ours; GiB that each step takes."""
    phases: Seconds = {name: [] for name in PHASES}
    watch = Stopwatch(device)
    run = lapped(steps["ours"], watch)

    def in_phases() -> None:
        watch.seconds = {}
        run()
        for name in PHASES:
            phases[name].append(watch.seconds.get(name, 0.0))

    actions = {**steps, "in phases": in_phases, **ceiling_actions(device, dtype)}
    seconds = time_interleaved(actions, repeats, device)
    memory = {name: memory_of(step, device) for name, step in steps.items()}
    return {**seconds, **{name: values[1:] for name, values in phases.items()}}, memory


def rows_of(seconds: Seconds, memory: dict[str, float | None], *, images: int, macs: int,
            matrix_rate: float) -> list[dict[str, Any]]:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    whole = sum(median[name] for name in PHASES)
    rows = []
    for name in memory:
        row: dict[str, Any] = {"step": name, "seconds": median[name], "ratio": None,
                               "images_per_second": images / median[name],
                               "gmacs_per_second": macs / median[name] / 1e9,
                               "matrix_share": macs / median[name] / 1e9 / matrix_rate,
                               "memory_gib": memory[name]}
        if "published" in median:
            row["ratio"] = median["published"] / median[name]
        row |= {phase: median[phase] / whole if name == "ours" else None for phase in PHASES}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    header = ["step", "ms", "ratio", "images/s", "G multiply-adds/s", "of matrix rate",
              "memory (GiB)", *PHASES]
    return markdown_table(header, [
        [row["step"], number(1000 * row["seconds"], 1), number(row["ratio"]),
         number(row["images_per_second"], 1), number(row["gmacs_per_second"], 1),
         percent(row["matrix_share"]), number(row["memory_gib"]),
         *(percent(row[phase]) for phase in PHASES)] for row in rows])


def build_steps(teacher_words: list[str], student_words: list[str], loss_specs: list[list[str]], *,
                batch_size: int, input_size: int, implementation: str, has_published: bool,
                options: engine.StepOptions) -> tuple[dict[str, Step], int]:
    """The steps to compare, and the multiply-adds that one image needs: one pass through the
    teacher and three through the student."""
    torch.manual_seed(0)
    name, student_options = parse_spec(student_words, "--student")
    student = models.create_model(name, **student_options)
    teacher, macs = None, 3 * count_macs(student, input_size)
    if teacher_words != ["none"]:
        name, teacher_options = parse_spec(teacher_words, "--teacher")
        teacher = models.create_model(name, **teacher_options)
        size = teacher.input_size or teacher.native_size
        if size not in (None, input_size):
            raise UserError(f"--teacher {name} sees pictures at {size} px. Set --input-size "
                            f"{size}, so that both arrangements do the same.")
        macs += count_macs(teacher, input_size)
    options = options._replace(prepare=data.BatchTransform(
        student.input_mean, student.input_std, options.device))
    batches = random_images(batch_size, input_size, student.num_classes,
                              pin_memory=options.device.type == "cuda")
    steps = {}
    if has_published:  # first: ours folds the teacher
        steps["published"] = published_step(student, teacher, loss_specs, batches=batches,
                                            options=options)
    steps["ours"] = our_step(student, teacher, loss_specs, batches=batches, options=options)
    operator.use(implementation, student, teacher)
    return steps, macs


def choices(step: Step, dtype: torch.dtype) -> str:
    """What computes the step's large kernels, for the end of a sentence."""
    networks = torch.nn.ModuleList(filter(None, [step.state.distiller, step.teacher]))
    return operator.describe_choice(networks, step.options.device, dtype)


def add_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--teacher", nargs="+", default=["slak_t"], metavar="NAME",
         help="NAME [key=value ...] with random weights, or none")
    flag("--student", nargs="+", metavar="NAME",
         help="NAME [key=value ...]; default: resnet50, and slak_t without a teacher")
    flag("--loss", nargs="+", action="append", metavar="NAME",
         help="NAME [weight=1 key=value ...]; default: nkd, and ce without a teacher")
    flag("--amp", choices=list(engine.AMP_DTYPES), default="none", help="mixed precision")
    flag("--accum-steps", type=int, default=1, help="micro-batches of --batch-size per update")
    flag("--large-kernel", choices=list(operator.CHOICES), default="auto",
         help="what computes the large kernels of ours")
    flag("--published", action=argparse.BooleanOptionalAction, default=True,
         help="measure the published arrangement, too")


def main(argv: list[str]) -> None:
    parser = new_parser("step", __doc__, batch_size=16)
    add_flags(parser)
    args: argparse.Namespace = parser.parse(argv)
    check_at_least({name: getattr(args, name) for name in (
        "input_size", "batch_size", "repeats", "threads", "accum_steps")}, smallest_batch=2)
    if args.batch_size % 2:
        raise UserError(f"mixup pairs the images of a batch: --batch-size must be even, got "
                        f"{args.batch_size}.")
    device, dtype = start(args.device, args.threads), PRECISIONS[args.amp]
    options = engine.StepOptions(
        device=device, amp_dtype=engine.AMP_DTYPES[args.amp], accum_steps=args.accum_steps,
        clip_grad=None, memory_format=torch.channels_last, seed=0)
    is_alone = args.teacher == ["none"]
    student = args.student or ["slak_t" if is_alone else "resnet50"]
    loss_specs = args.loss or [["ce" if is_alone else "nkd"]]
    steps, macs = build_steps(
        args.teacher, student, loss_specs, batch_size=args.batch_size, input_size=args.input_size,
        implementation=args.large_kernel, has_published=args.published, options=options)
    seconds, memory = time_steps(steps, args.repeats, device, dtype)
    best, images = ceilings(seconds, device, dtype), args.batch_size * args.accum_steps
    rows = rows_of(seconds, memory, images=images, macs=macs * images,
                   matrix_rate=best["matrix_gmacs_per_second"])
    loss = ", ".join(" ".join(words) for words in loss_specs)
    title = (f"Training step, {' '.join(args.teacher)} -> {' '.join(student)}, {loss}, AdamW, "
             f"{args.accum_steps} x {args.batch_size} images at {args.input_size} px, precision "
             f"{args.amp}{choices(steps['ours'], dtype)}, {place(device)}, medians of "
             f"{args.repeats} rounds")
    show(title, table(rows), [*NOTES, ceilings_text(best, dtype)],
         {"rows": rows, **best, "seconds": seconds}, device=device, json_path=args.json)
