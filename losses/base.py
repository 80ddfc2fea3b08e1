"""The contract of every loss, and what several of them share."""
import torch
from torch import Tensor, nn

from models.base import FeatureInfo, ModelOutput
from utils.registry import Registry, UserError

Stages = tuple[FeatureInfo, ...]  # what a network declares of its feature maps
LOSSES = Registry("loss", home="losses/__init__.py")
register_loss = LOSSES.register


class Loss(nn.Module):
    """`loss(student, teacher, targets)` -> scalar; targets (N,) int64 or (N, K) float.

    It is called with autocast off and must compute in float32 whatever its inputs' dtype. No
    gradient may reach the teacher. What it learns itself (projections) are its parameters.
    A loss that needs to know the stages takes `student_info` and `teacher_info`.
    """

    needs_teacher = True  # False: `teacher` may be None
    needs_teacher_logits = True  # False: those of `teacher` may be None
    temperature = 1.0  # that logits are divided by before their softmax
    needs_teacher_features = False  # False: `teacher` may have none
    trains_logits = True  # False: the student's head gets no gradient from this loss alone

    def __init__(self) -> None:  # its arguments are the options of a loss; here, none
        super().__init__()

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor) -> Tensor:
        raise NotImplementedError


def hard_labels(targets: Tensor) -> Tensor:
    """(N,) class indices; the arg-max class of mixed targets (N, K)."""
    return targets if targets.dim() == 1 else targets.argmax(1)


def stage_pairs(name: str, features: int | tuple[int, ...], student_info: Stages,
                teacher_info: Stages) -> list[tuple[int, FeatureInfo, FeatureInfo]]:
    """(stage, the student's, the teacher's) for every stage that the option `features` of the loss
    `name` asks for. Raises UserError."""
    stages = features if isinstance(features, (tuple, list)) else (features,)
    for network, info in (("student", student_info), ("teacher", teacher_info)):
        if not info:
            raise UserError(f"--loss {name} compares feature maps, and the {network} does not say "
                            "which it has (feature_info of a VisionModel). Use losses of logits.")
        wrong = [s for s in stages if type(s) is not int or not -len(info) <= s < len(info)]
        if wrong or not stages:
            raise UserError(f"{name} features={','.join(map(str, stages))}: the {network} has "
                            f"{len(info)} stage(s), so indices lie in [{-len(info)}, "
                            f"{len(info) - 1}]. Match the last one only with the option "
                            "features=-1.")
    return [(stage, student_info[stage], teacher_info[stage]) for stage in stages]


def check_fraction(what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{what} must lie in [0, 1], got {value}.")


def check_positive(what: str, value: float) -> None:
    if not 0 < value < torch.inf:
        raise UserError(f"{what} must be a positive number, got {value}.")


def check_not_negative(what: str, value: float) -> None:
    if not 0 <= value < torch.inf:
        raise UserError(f"{what} must not be negative or infinite, got {value}.")


def resolve_losses(specs: list[list[str]] | None, *, adds_bce: bool, has_teacher: bool
                   ) -> list[list[str]]:
    """The losses of a run: where none is named, nkd with a teacher and ce without."""
    if adds_bce and ["bce"] not in (specs or []):
        specs = [*(specs or []), ["bce"]]
    return specs or [["nkd" if has_teacher else "ce"]]
