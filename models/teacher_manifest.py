"""What the kept logits of a teacher are of: all that decides which images it was shown and what it
said of them, in a file that people can read, and compared with every run that would use them."""
import hashlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from models.distiller import FrozenTeacher
from utils.checkpoint import TEACHER, describe_changes
from utils.content import DTYPES, checksum
from utils.files import write_text_atomically
from utils.log import print_once
from utils.records import as_read, read_yaml, yaml_text
from utils.registry import UserError, short

FORMAT = 1
NAME = "manifest.yaml"
SAID = "said"  # the entry of what is told and not compared

# Settings of a run that decide neither the images nor what the teacher says of them. A setting that
# is not here counts.
FREE = frozenset({
    "student", "student_weights", "student_weights_key", "freeze", "loss", "bce", "smoothing",
    "crop_pct", "interpolation", "data_path", "num_workers", "skip_bad_images",
    "epochs", "opt", "lr", "min_lr", "warmup_epochs", "warmup_steps", "weight_decay",
    "weight_decay_end", "layer_decay", "opt_betas", "opt_eps", "momentum", "nesterov", "clip_grad",
    "model_ema", "model_ema_decay", "model_ema_warmup",
    "sparsity", "sparse_init", "sparse_layers", "prune_rate", "prune_every", "growth",
    "config", "output_dir", "resume", "auto_resume", "save_freq", "save_num", "save_best",
    "save_every_steps", "print_every", "dry_run", "log_to", "tensorboard", "device",
    "channels_last", "compile", "compile_teacher", "cuda_graphs", "large_kernel", "git",
    "steps_per_epoch", "teacher_cache", "teacher_cache_only", "teacher_cache_epochs", "fill_cache",
    "teacher_weights", "teacher_weights_key", TEACHER})  # see describe
# These count where a batch is mixed as a whole: its images are mixed with one another.
BATCHES = frozenset({"batch_size", "effective_batch", "accum_steps", "world_size"})
MIXING = ("mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_mode")
# Of what is told: with other ones bits may differ, of logits or of images.
MADE_WITH = ("device", "torch", "torchvision", "pillow")


def describe(settings: Mapping[str, Any], *, teacher: FrozenTeacher | None,
             normalisation: tuple[Sequence[float], Sequence[float]], images: Any,
             device: torch.device, logits_dtype: torch.dtype | None) -> dict[str, Any]:
    """The manifest of a run with these settings.

    `teacher`: None where it is not loaded; then what only the network tells is left out, as
    in a dry run, where it may have other weights. `normalisation`: of the student, mean and std.
    `images`: the training set. `logits_dtype`: of the teacher's own.
    """
    is_mixed = settings["mixup_prob"] > 0 and (settings["mixup"] > 0 or settings["cutmix"] > 0)
    free = FREE | (BATCHES if settings["mixup_mode"] != "batch" or not is_mixed else frozenset())
    free |= frozenset() if is_mixed else frozenset(MIXING)
    counted = {name: value for name, value in settings.items() if name not in free}
    counted["data_set"] = [word for word in counted["data_set"] if not word.startswith("cache=")]
    result = {"format": FORMAT, **counted, "images": images_checksum(images, settings["data_path"]),
              "rows_per_epoch": settings["steps_per_epoch"] * settings["effective_batch"],
              "student_mean": list(normalisation[0]), "student_std": list(normalisation[1])}
    if teacher is not None and settings[TEACHER] is not None:
        result |= {TEACHER: settings[TEACHER], "teacher_input": teacher.describe_input(),
                   "logits_dtype": str(logits_dtype).removeprefix("torch.")}
    result[SAID] = {
        **{name: settings[name] for name in ("teacher_weights", "teacher_weights_key",
                                             "teacher_cache_epochs", "epochs", "git")},
        "teacher_file_sha256": file_sha256(settings["teacher_weights"]),
        "device": device.type, "torch": str(torch.__version__),
        **{name: _version(name) for name in ("torchvision", "pillow")},
        "python": platform.python_version(), "written": time.strftime("%Y-%m-%d %H:%M:%S")}
    return as_read(result)


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):  # it was installed in another way
        return metadata.version(package)
    return None


def images_checksum(images: Any, data_path: str | None) -> str:
    """sha256 of the names of a data set's images, below `data_path`, and of their labels."""
    result = hashlib.sha256("\n".join(images.classes).encode(errors="backslashreplace"))
    folder = os.path.join(Path(data_path).expanduser(), "") if data_path else ""
    for index in range(len(images)):
        name = images.name_of(index).removeprefix(folder).replace(os.sep, "/")
        result.update(f"\n{images.label(index)} {name}".encode(errors="backslashreplace"))
    return result.hexdigest()


def file_sha256(source: str) -> str | None:
    """Of a file; None where `source` names none."""
    path = Path(source).expanduser()
    if not path.is_file():
        return None
    result = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2 ** 20):
            result.update(part)
    return result.hexdigest()


def key_of(manifest: Mapping[str, Any]) -> str:
    """What the files say that they belong to."""
    return checksum({name: value for name, value in manifest.items() if name != SAID})


def find(folder: Path, here: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest there, which is that of the run `here`; None where there is none. What cannot be
    compared is said. Raises UserError for another one, and for one that is unreadable."""
    path = folder / NAME
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--teacher-cache {folder} is a file, and a folder is needed. Name another "
                        "one.")
    if not path.exists():
        return None
    try:
        there = read_yaml(path)
        if not isinstance(there.get(SAID), dict) or TEACHER not in there:
            raise UserError("it is not the manifest of a teacher cache.")
    except UserError as error:
        raise UserError(f"{path}: {error} Put it back, or name another folder with --teacher-cache."
                        ) from None
    _compare(there, here, folder)
    old, new = ({name: said[name] for name in MADE_WITH if name in there[SAID].keys() & said}
                for said in (there[SAID], here[SAID]))
    changes = describe_changes(old, new, frozenset())
    if changes:
        print_once(f"note: the logits in {folder} were made with other software or on another "
                   f"device ({'; '.join(changes)}); a teacher asked here may differ from them in "
                   "the last bits")
    return there


def dtype_of(manifest: Mapping[str, Any], folder: Path) -> torch.dtype:
    """Of the teacher's own logits."""
    name = manifest.get("logits_dtype")
    for dtype in DTYPES:
        if str(dtype) == f"torch.{name}":
            return dtype
    raise UserError(f"{folder / NAME} is damaged or was changed: its logits_dtype is "
                    f"{short(name)}. Put it back as it was.")


def write(manifest: Mapping[str, Any], folder: Path) -> None:
    write_text_atomically("# What the logits in this folder are of; a run must have the same values"
                          f", but for those under '{SAID}'.\n"
                          + yaml_text(manifest), folder / NAME)


def _compare(there: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError with the list of differences where the logits that `there` describes are not
    those of the run `here`."""
    free, changes = {SAID}, []
    if TEACHER not in here:  # it was not loaded
        free |= {TEACHER, "teacher_input", "logits_dtype"}
        changes = _source_changes(there[SAID], here[SAID])
    changes = describe_changes(dict(there), dict(here), frozenset(free)) + changes
    if changes:
        raise UserError(f"{folder} keeps the logits of another run ({'; '.join(changes)}). Repeat "
                        "its settings, or name another folder with --teacher-cache.")


def _source_changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs in where the teacher's weights come from."""
    names = ("teacher_weights", "teacher_weights_key", "teacher_file_sha256")
    old, new = ([said.get(name) for name in names] for said in (there, here))
    if None not in (old[2], new[2]) and old[1:] == new[1:]:
        return []  # the same file, wherever it lies
    is_file = new[0] not in ("random", "published") and "://" not in new[0]
    if is_file and new[2] is None and old[2] is not None and old[1] == new[1]:
        print_once(f"note: {new[0]} is not there, so whether the teacher's weights are those whose "
                   f"logits are kept (from {old[0]}) cannot be told")
        return []
    return describe_changes(dict(zip(names, old)), dict(zip(names, new)), frozenset())
