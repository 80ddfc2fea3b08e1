"""One file per loss, each readable beside its paper. A new one is a file here and its import."""
from collections.abc import Mapping
from math import isfinite

from losses import bce, ce, dist, dkd, fd, kd, mgd, nkd  # noqa: F401  (importing registers them)
from losses.base import LOSSES, Loss, Stages
from utils.log import print_once
from utils.registry import UserError, parse_spec

__all__ = ["Loss", "check_kept_logits", "create_loss", "create_losses", "describe_losses",
           "list_losses", "need_teacher_logits", "warn_of_softening"]


def list_losses() -> list[str]:
    return LOSSES.names()


def create_loss(name: str, student_info: Stages, teacher_info: Stages | None = None, /,
                **options) -> Loss:
    """The registered loss `name` for a pair of networks with these stages.

    Raises UnknownName, or UserError for unknown options and for a missing teacher.
    """
    if LOSSES.builder(name).needs_teacher and teacher_info is None:
        raise UserError(f"loss {name!r} compares with a teacher, but there is none. "
                        "Name one with --teacher, or train with --loss ce.")
    stages = {"student_info": student_info, "teacher_info": teacher_info}
    return LOSSES.create(name, stages, **options)


def need_teacher_logits(specs: list[list[str]]) -> bool:
    """Whether a loss of `NAME key=value ...` compares with a teacher's logits."""
    kinds = [LOSSES.builder(parse_spec(spec, "--loss")[0]) for spec in specs]
    return any(kind.needs_teacher and kind.needs_teacher_logits for kind in kinds)


def check_kept_logits(specs: list[list[str]]) -> None:
    """Raises UserError for a loss of `NAME key=value ...` that needs more than a teacher's logits.
    """
    for spec in specs:
        name = parse_spec(spec, "--loss")[0]
        if LOSSES.builder(name).needs_teacher_features:
            raise UserError(f"--loss {name} compares feature maps, and --teacher-cache keeps "
                            "logits alone. Leave one of them out.")


def warn_of_softening(losses: Mapping[str, Loss], top: int) -> None:
    """Print a warning where the teacher's `top` likeliest classes are kept (0: all) and a
    temperature above 1 lifts the others, whose logits are not known: docs/teacher_cache.md."""
    soft = [name for name, loss in losses.items() if loss.needs_teacher and loss.temperature > 1]
    if top and soft:
        print_once(f"warning: --loss {soft[0]} softens the teacher's logits by a temperature above "
                   f"1, and of its classes {top} are kept: the others matter then. Keep all, with "
                   "--teacher-cache-top 0.")


def create_losses(specs: list[list[str]], student_info: Stages, teacher_info: Stages | None
                  ) -> tuple[dict[str, Loss], dict[str, float]]:
    """Losses and weights by name, from one `NAME weight=1 key=value ...` each.

    Raises UserError where they leave the student's head untrained or the teacher unused.
    """
    losses, weights = {}, {}
    for spec in specs:
        name, options = parse_spec(spec, "--loss")
        if name in losses:
            raise UserError(f"--loss {name} is given twice; give it once with all its options.")
        weight = options.pop("weight", 1.0)
        if type(weight) not in (int, float) or not isfinite(weight):
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


def describe_losses(specs: list[list[str]], weights: dict[str, float]) -> str:
    """'1 x ce + 0.5 x fd features=-1'"""
    return " + ".join(" ".join([f"{weights[spec[0]]:g} x", *(
        word for word in spec if not word.startswith("weight="))]) for spec in specs)
