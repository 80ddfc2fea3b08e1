"""The contract of every loss."""
from math import isfinite

import torch
from torch import Tensor, nn

from models.base import FeatureInfo, ModelOutput
from utils.registry import Registry, UserError, parse_spec

Stages = tuple[FeatureInfo, ...]  # what a network declares of its maps
LOSSES = Registry("loss", home="losses/__init__.py")
register_loss = LOSSES.register


class Loss(nn.Module):
    """`loss(student, teacher, targets)` -> scalar; targets (N,) int64 or (N, K) float.

    It is called with autocast off and must compute in float32 whatever its inputs' dtype. No
    gradient may reach the teacher. What it learns itself (projections) are its parameters.
    """

    needs_teacher = True  # False: `teacher` may be None
    trains_logits = True  # False: the student's head gets no gradient from this loss alone

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor) -> Tensor:
        raise NotImplementedError


def hard_labels(targets: Tensor) -> Tensor:
    """(N,) class indices; the arg-max class of mixed targets (N, K)."""
    return targets if targets.dim() == 1 else targets.argmax(1)


def create_loss(name: str, student_info: tuple[FeatureInfo, ...],
                teacher_info: tuple[FeatureInfo, ...] | None = None, **options) -> Loss:
    """The registered loss `name` for a pair of networks with these stages.

    Raises UnknownName, or UserError for unknown options and for a missing teacher.
    """
    loss = LOSSES.create(name, student_info, teacher_info, **options)
    if loss.needs_teacher and teacher_info is None:
        raise UserError(f"loss {name!r} compares with a teacher, but there is none. "
                        "Name one with --teacher, or train with --loss ce.")
    return loss


def create_losses(specs: list[list[str]], student_info: tuple[FeatureInfo, ...],
                  teacher_info: tuple[FeatureInfo, ...] | None
                  ) -> tuple[dict[str, Loss], dict[str, float]]:
    """Losses and weights by name, from one `NAME weight=1 key=value ...` each.

    Raises UserError where they leave the student's head untrained or the teacher unused.
    """
    losses, weights = {}, {}
    for words in specs:
        name, options = parse_spec(words, "--loss")
        if name in losses:
            raise UserError(f"--loss {name} is given twice; give it once with all its options.")
        weight = options.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not isfinite(weight):
            raise UserError(f"--loss {name} weight must be a number, got {weight!r}.")
        losses[name] = create_loss(name, student_info, teacher_info, **options)
        weights[name] = weight
    if not any(loss.trains_logits for loss in losses.values()):
        raise UserError(f"--loss {' '.join(losses)} alone leaves the student's head untrained. "
                        "Add --loss ce, kd or nkd.")
    if teacher_info is not None and not any(loss.needs_teacher for loss in losses.values()):
        raise UserError(f"the teacher is not used by --loss {' '.join(losses)}. Add a loss that "
                        "compares with it, or set --teacher none.")
    return losses, weights


def list_losses() -> list[str]:
    return LOSSES.names()


def check_fraction(what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{what} must lie in [0, 1], got {value}.")


def check_positive(what: str, value: float) -> None:
    if not 0 < value < torch.inf:
        raise UserError(f"{what} must be a positive number, got {value}.")


def check_not_negative(what: str, value: float) -> None:
    if not 0 <= value < torch.inf:
        raise UserError(f"{what} must not be negative or infinite, got {value}.")
