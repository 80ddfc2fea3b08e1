"""What a run will be, in sentences: networks, their cost, the share of the teacher."""
import math

from torch import nn

from analysis.complexity import count_macs
from models.base import VisionModel
from models.distiller import FrozenTeacher

GIB = 4 / 2 ** 30  # of a float32


def describe_network(role: str, words: list[str], model: nn.Module, weights: str,
                     input_size: int) -> str:
    """`model` declares feature_info, input_size and num_parameters, as a FrozenTeacher does."""
    size = model.input_size or input_size
    stages = " | ".join(f"{channels}x{math.ceil(size / stride)}^2"
                        for channels, stride in model.feature_info)
    return (f"{role}: {' '.join(words)}, weights {weights}, {model.num_parameters:,} parameters, "
            f"stages {stages}")


def describe_cost(student: VisionModel, teacher: FrozenTeacher | None, input_size: int,
                  keeps_average: bool) -> str:
    """Memory of parameters in GiB of float32, and the teacher's share of a step's multiply-
    accumulates: its forward against that plus three times the student's (a backward is two
    forwards)."""
    copies = 4 + keeps_average  # weights, gradients, two moments of AdamW; the average
    macs = count_macs(student, input_size)
    text = (f"student: {copies * student.num_parameters * GIB:.2f} GiB of weights, gradients, "
            f"optimizer state{' and average' if keeps_average else ''}; {macs / 1e9:.3f} G "
            f"multiply-accumulates forward at {input_size} px")
    if teacher is None:
        return text
    size = teacher.input_size or input_size
    teacher_macs = count_macs(teacher.model, size)
    share = teacher_macs / (teacher_macs + 3 * macs)
    held = sum(value.numel() for value in teacher.state_dict().values()
               if value.is_floating_point())
    return (f"{text}\nteacher: {held * GIB:.2f} GiB of weights; {teacher_macs / 1e9:.3f} G "
            f"multiply-accumulates forward at {size} px, {share:.0%} of a step (its forward, and "
            "forward and backward of the student)")
