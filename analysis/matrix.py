"""Every teacher with every student and every kind of loss: one training step and one evaluation.

    python -m analysis.matrix                                     # at full size, batch 2
    python -m analysis.matrix --teachers slak_t swin_t --students resnet50 --input-size 224
"""
import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

import engine
import models
from analysis.benchmark.common import no_mix, random_batches, random_state
from models.distiller import FrozenTeacher
from utils.config import Parser
from utils.distributed import setup
from utils.log import progress
from utils.registry import UserError

TEACHERS = ("slak_t", "slak_s", "slak_b", "convnext_t", "convnext_s", "swin_t", "deit_s", "vit_s",
            "vit_b", "cswin_t", "resnet50d", "efficientnet_b3")
STUDENTS = ("resnet18", "resnet34", "resnet50", "convnext_t", "convnext_s", "convnext_t_bn",
            "convnext_s_bn", "convnextv2_t", "convnextv2_s", "mobilenetv3_l")
LOSSES = {"kd": [["kd"]], "nkd": [["nkd"]], "ce + fd": [["ce"], ["fd"]],
          "fd + nkd": [["nkd"], ["fd"]]}


class Cell(NamedTuple):
    teacher: str
    student: str
    losses: str
    loss: float  # of the first step
    teacher_map: str  # the last, channels x height x width
    student_map: str
    seconds: float  # of the step and the evaluation


class OneBatch:
    """What engine.evaluate asks of a loader."""

    def __init__(self, batch: tuple) -> None:
        self.batch, self.num_samples = batch, len(batch[0])

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[tuple]:
        return iter([self.batch])


def run_cell(teacher_name: str, student_name: str, losses: str, *, teacher: FrozenTeacher,
             num_classes: int, batch_size: int, input_size: int,
             options: engine.StepOptions) -> Cell:
    """One step and one evaluation with random weights and pictures. Raises FloatingPointError when
    the loss is not finite."""
    student = models.create_model(student_name, num_classes)
    state = random_state(student, teacher, LOSSES[losses], options, keeps_average=False)
    size = student.input_size or input_size
    batches = random_batches(options, batch_size, size, num_classes)
    start = time.perf_counter()
    engine.accumulate_gradients(state, batches, teacher, no_mix, options)
    engine.optimizer_update(state, options.clip_grad)
    loss = engine.checked_means(state)["loss"]
    images, labels, indices = next(batches)
    engine.evaluate(student, OneBatch((images, labels.cpu(), indices)), options=options)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        maps = [model(images).features[-1] for model in (
            teacher, student.eval().forward_with_features)]
    shapes = ["x".join(map(str, value.shape[1:])) for value in maps]
    return Cell(teacher_name, student_name, losses, loss, *shapes, seconds)


def run_matrix(teachers: list[str], students: list[str], losses: list[str], *, num_classes: int,
               batch_size: int, input_size: int, options: engine.StepOptions) -> Iterator[Cell]:
    """The cells of the whole matrix, teacher by teacher."""
    for name in teachers:
        model = models.create_model(name, num_classes)
        teacher = FrozenTeacher(model, models.VisionModel.input_mean, models.VisionModel.input_std)
        teacher.to(options.device)
        for student, loss in itertools.product(students, losses):
            yield run_cell(name, student, loss, teacher=teacher, num_classes=num_classes,
                           batch_size=batch_size, input_size=input_size, options=options)


def build_parser() -> Parser:
    parser = Parser(prog="analysis.matrix", description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--teachers", nargs="+", default=list(TEACHERS), metavar="NAME", help="registered names")
    flag("--students", nargs="+", default=list(STUDENTS), metavar="NAME", help="registered names")
    flag("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES), help="which")
    flag("--input-size", type=int, default=224, help="pixels")
    flag("--batch-size", type=int, default=2, help="images")
    flag("--num-classes", type=int, default=1000, help="classes")
    flag("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run")
    flag("--amp", choices=list(engine.AMP_DTYPES), default="none", help="mixed precision")
    return parser


def main(argv: list[str] | None = None) -> int:
    try:
        args: argparse.Namespace = build_parser().parse(sys.argv[1:] if argv is None else argv)
        if args.input_size < 32 or min(args.num_classes, args.batch_size) < 2:
            raise UserError("--input-size must be at least 32, --num-classes and --batch-size 2.")
        options = engine.StepOptions(
            device=setup(args.device), amp_dtype=engine.AMP_DTYPES[args.amp], accum_steps=1,
            clip_grad=None, memory_format=torch.channels_last, seed=0)
        cells = run_matrix(args.teachers, args.students, args.losses, num_classes=args.num_classes,
                           batch_size=args.batch_size, input_size=args.input_size, options=options)
        total = len(args.teachers) * len(args.students) * len(args.losses)
        print("| teacher | student | loss | first value | teacher's map | student's map | s |\n"
              "|---|---|---|---:|---|---|---:|")
        with progress("cells", total, unit="cell") as bar:
            for cell in cells:
                print(f"| {cell.teacher} | {cell.student} | {cell.losses} | {cell.loss:.3f} | "
                      f"{cell.teacher_map} | {cell.student_map} | {cell.seconds:.1f} |", flush=True)
                bar.update()
    except UserError as error:
        print(f"analysis.matrix: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
