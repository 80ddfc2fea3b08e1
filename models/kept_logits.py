"""What is kept of a teacher's logits, the logits that are made of it again, and what that saves.

Where not all classes are kept, the rest of the probability is spread evenly over the others, as FKD
(Shen and Xing, arXiv 2112.01528) and TinyViT (Wu et al., arXiv 2207.10666) do.
"""
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.base import ModelOutput
from models.distiller import Distiller, FrozenTeacher
from utils.registry import UserError
from utils.row_files import Columns

ALL_UP_TO = 128  # classes whose logits are all kept unless asked otherwise
DEFAULT_TOP = 64  # classes kept of each image where there are more


def check_kept(values: Mapping[str, Any]) -> None:
    """Raises UserError where the flags by name of what is kept contradict each other."""
    if not values["teacher_cache"] and (values["teacher_cache_only"] or values["fill_cache"]):
        raise UserError("--teacher-cache-only and --fill-cache need --teacher-cache DIR.")
    if values["teacher_cache"] and values["teacher"] == ["none"]:
        raise UserError("--teacher-cache keeps what a teacher says, and there is none. Name it "
                        "with --teacher.")
    if values["teacher_cache"] and values["skip_bad_images"]:
        raise UserError("--skip-bad-images puts another image in the place of one that cannot be "
                        "read. Were it readable in the next run, it would be taught with the "
                        "logits of the other. Repair or remove such images and leave this flag "
                        "out, or leave out --teacher-cache.")
    if values["teacher_cache_only"] and values["fill_cache"]:
        raise UserError("--fill-cache asks the teacher, and --teacher-cache-only never does. Leave "
                        "one of them out.")


def resolve_kept(values: Mapping[str, Any], chosen: Sequence[str]) -> dict[str, int]:
    """What the flags come to that say how much is kept, by name, given the values of all and which
    the user chose. Where the losses see what they see without a cache, both are 0."""
    top, epochs = values["teacher_cache_top"], values["teacher_cache_epochs"]
    num_classes = values["num_classes"]
    if "teacher_cache_top" not in chosen and num_classes > ALL_UP_TO:
        top = DEFAULT_TOP
    if not values["teacher_cache"]:
        top = epochs = 0
    return {"teacher_cache_top": top if top < num_classes else 0,
            "teacher_cache_epochs": epochs if epochs < values["epochs"] else 0}


def compact(logits: Tensor, top: int) -> Columns:
    """What is kept of logits (N, C): themselves, for `top` 0. Else the `top` largest
    log-probabilities in float16, their classes, and `rest`, the sum of the other probabilities."""
    if top == 0:
        return {"logits": logits}
    log_probs = logits.float().log_softmax(1)
    largest, classes = log_probs.topk(top, dim=1)
    rest = log_probs.exp().scatter(1, classes, 0).sum(1, keepdim=True)
    return {"log_probs": largest.half(), "classes": classes.to(_class_dtype(logits.shape[1])),
            "rest": rest}


def dense(kept: Columns, num_classes: int) -> Tensor:
    """(N, num_classes) from what `compact` kept: the logits; or, in float32, log-probabilities with
    the rest spread evenly over the classes that were not kept."""
    if "logits" in kept:
        return kept["logits"]
    log_probs, classes = kept["log_probs"].float(), kept["classes"].long()
    share = kept["rest"] / (num_classes - log_probs.shape[1])
    # A rest of 0 would make log-probabilities of -inf, with which no loss can compute.
    share = share.clamp_min(torch.finfo(torch.float32).tiny).log()
    return share.repeat(1, num_classes).scatter(1, classes, log_probs)


def columns_kept(num_classes: int, top: int, logits_dtype: torch.dtype
                 ) -> dict[str, tuple[torch.dtype, int]]:
    """Name -> (dtype, width) of what `compact` keeps of an image."""
    if top == 0:
        return {"logits": (logits_dtype, num_classes)}
    return {"log_probs": (torch.float16, top), "classes": (_class_dtype(num_classes), top),
            "rest": (torch.float32, 1)}


def _class_dtype(num_classes: int) -> torch.dtype:
    return torch.int16 if num_classes <= 2 ** 15 else torch.int32


def time_micro_batches(teacher: FrozenTeacher, distiller: Distiller, *, number: int,
                       input_size: int, num_classes: int, options: Any) -> tuple[float, float]:
    """Seconds of a micro-batch of `number` images of noise: of the teacher, and of the student's
    forward and backward pass with its losses, in steps of these options."""
    images = torch.randn(number, 3, input_size, input_size, device=options.device)
    images = images.contiguous(memory_format=options.memory_format)
    labels = torch.zeros(number, dtype=torch.long, device=options.device)
    output = ModelOutput(torch.zeros(number, num_classes, device=options.device), [])

    def teach() -> None:
        with options.autocast():
            teacher(images)

    def learn() -> None:
        with options.autocast():
            total, *_ = distiller(images, labels, output)
        total.backward()

    return _seconds_of(teach), _seconds_of(learn)


def _seconds_of(act: Callable[[], None]) -> float:
    """Of the second of two calls."""
    for _ in range(2):
        start = time.perf_counter()
        act()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter() - start


def describe_saving(teacher_seconds: float, student_seconds: float, *, batches_per_epoch: int,
                    num_epochs: int, epochs_kept: int, missing: float) -> str:
    """What filling takes and what a student saves, by the seconds of a micro-batch of each. A share
    `missing` of what is to be kept is not there."""
    batches = batches_per_epoch * num_epochs
    fill, saved = teacher_seconds * batches_per_epoch * epochs_kept, teacher_seconds * batches
    student = student_seconds * batches
    pays = "with the first" if epochs_kept < num_epochs else "from the second on"
    return (f"reckoned from one timed micro-batch of the teacher ({1000 * teacher_seconds:.1f} ms) "
            f"and one of the student, forward and backward ({1000 * student_seconds:.1f} ms), "
            f"without what loading takes: {_duration(fill * missing)} to fill what is missing; a "
            f"student takes {_duration(student + saved)} with the teacher and saves "
            f"{_duration(saved)} of it; a full cache costs what {fill / saved:.2f} student(s) save,"
            f" so it pays {pays}")


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def in_bytes(number: float) -> str:
    for unit, length in (("GiB", 2 ** 30), ("MiB", 2 ** 20)):
        if number >= length:
            return f"{number / length:.2f} {unit}"
    return f"{number / 2 ** 10:.1f} KiB"
