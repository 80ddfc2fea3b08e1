"""Checkpoints and the folder of a run: files that are either whole or not there, what a start may
continue, and what it must not touch."""
import filecmp
import pickle
import re
import subprocess
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from utils.content import (
    CHECKSUMS,
    check_checksums,
    check_form,
    checksums,
    is_list_of_words,
)
from utils.distributed import gather_objects, on_main
from utils.extras import HARMLESS, refused_global
from utils.files import could_not_write, delete_leftovers, write_atomically, write_text_atomically
from utils.lock import FolderLock
from utils.log import print_once
from utils.registry import UserError, one_line, short


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write `content` by torch.save, with the checksums of its entries as one more entry."""
    content = {**content, CHECKSUMS: checksums(content)}
    write_atomically(lambda file: torch.save(content, file), path)


def load_file(path: Path) -> dict[str, Any]:
    """A file written by torch.save, without running code from it: tensors, plain values, and
    stand-ins for what else holds data only (utils/extras.py). Or tensors in a .safetensors file.

    Of a file of this project every entry must be the one that was saved, by its checksum."""
    if Path(path).suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old or strange files, beside the error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}.") from None
    except Exception as error:  # a damaged file can raise almost anything inside torch.load
        raise UserError(f"{path} is not a readable PyTorch checkpoint of tensors and plain values "
                        f"({_why_unreadable(error, path)}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of tensors.")
    if CHECKSUMS in content:
        check_checksums(content, path)
    elif isinstance(content.get("args"), dict) and "optimizer" in content:
        print_once(f"note: {path} was written before checkpoints had checksums; whether it is "
                   "damaged cannot be told")
    return content


# What people give in place of a checkpoint, by how it begins.
MISTAKEN = (
    (rb"version https://git-lfs",
     "it is a pointer of Git LFS; fetch the file itself, with git lfs pull"),
    (rb"\s*<", "it is a web page or other text; fetch the file itself"),
    (rb'(?s).{8}\{"', "it is a .safetensors file; give it that ending"))


def _why_unreadable(error: Exception, path: Path) -> str:
    """Without torch's own advice, which is to run the file's code."""
    refused = refused_global(error)
    if refused:
        return (f"it holds {refused}, and no code is run to read a file. Save its state dict "
                "alone, with the program that wrote it")
    if isinstance(error, OSError):
        return error.strerror or one_line(error)
    with suppress(OSError), open(path, "rb") as file:
        start = file.read(64)
        if not start:
            return "the file is empty"
        for pattern, sentence in MISTAKEN:
            if re.match(pattern, start):
                return sentence
    if "PytorchStreamReader" in str(error):  # a page of advice follows
        return "it is damaged, or not whole"
    if "TorchScript" in str(error):
        return "it is a TorchScript archive, a program. Save its state dict alone"
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, was not written by torch.save, or holds code, which is never run"
    return one_line(error)[:200]


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file as load
    except ImportError:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors.") from None
    try:
        return load(path)
    except Exception as error:  # SafetensorError, and what odd contents raise
        raise UserError(f"{path} is not a readable .safetensors file ({one_line(error)[:200]})."
                        ) from None


def keep_last(folder: Path, number: int, epoch: int) -> None:
    """Delete all but the `number` newest of the numbered checkpoints up to `epoch`; 0 keeps every
    one. Later ones, which a run continued from an earlier epoch has yet to write again, stay."""
    numbered = {int(path.stem.rpartition("-")[2]): path for path in folder.iterdir()
                if re.fullmatch(r"checkpoint-\d+\.pth", path.name)}
    done = sorted(number for number in numbered if number <= epoch)
    for old in done[:-number] if number else []:
        try:
            numbered[old].unlink(missing_ok=True)
        except OSError as error:
            raise could_not_write(numbered[old], error, "delete") from None


def git_revision(folder: Path) -> str:
    """The commit of the code in `folder`, '-dirty' when it was changed; 'unknown' outside git."""
    try:
        result = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"],
                                cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def describe_changes(saved: dict[str, Any], current: dict[str, Any],
                     free: frozenset[str]) -> list[str]:
    """'lr: 0.004 there, 0.001 here' for every value that differs, but for the names in `free`."""
    names = [name for name in {**saved, **current} if name not in free]
    return [f"{name}: {str(saved.get(name, 'not set'))[:200]} there, "
            f"{str(current.get(name, 'not set'))[:200]} here"
            for name in names if saved.get(name) != current.get(name)
            and not all(values.get(name) in SAME_ON_RESUME.get(name, ())
                        for values in (saved, current))]


LAST = "checkpoint-last.pth"
# What is kept to be used, not continued: a student's weights, and what they are of.
WEIGHTS = ("model", "model_ema", "classes", "args", "git", "epoch", "step", "best_acc1",
           "best_acc1_ema")
TEACHER = "teacher_checksum"  # of its weights, among the settings
# What a killed process may leave a temporary file of.
WRITTEN = ("checkpoint-", "log.txt", "args.yaml")

# What a resumed run may change: where and how it runs and reports, not what it computes. How many
# processes share an effective batch is free as long as the product is the same.
FREE_ON_RESUME = frozenset({
    "config", "output_dir", "resume", "auto_resume", "device", "num_workers", "print_every",
    "save_freq", "save_num", "save_best", "save_every_steps", "log_to", "tensorboard",
    "skip_bad_images", "data_path", "student_weights", "student_weights_key", "compile",
    "compile_teacher", "channels_last", "batch_size", "accum_steps", "world_size", "git", "dry_run",
    "large_kernel", "cuda_graphs", "teacher_cache", "teacher_cache_only", "fill_cache",
    "teacher_stream", "log_kd_health",  # these two: only files of older versions have them
    TEACHER})  # what the teacher's weights are is compared by `restore`, wherever they lie


# Values of a setting that compute the same: the bytes of the images lie elsewhere.
SAME_ON_RESUME = {"data_on": ("ram", "device")}


def run_name(teacher: list[str], student: list[str], losses: list[list[str]], epochs: int,
             seed: int, sparsity: float = 0.0) -> str:
    """teacher-student-loss-epochs, each with the options given to it; after the student its
    sparsity and at the end the seed, where they are not 0."""
    loss = [word for spec in losses for word in spec]
    parts = ["_".join(word.removeprefix("model=") for word in spec)
             for spec in (teacher, student, loss)] + [f"{epochs}ep"]
    if sparsity:
        parts[1] += f"_sparsity{sparsity:g}"
    if seed:
        parts.append(f"seed{seed}")
    return re.sub(r"[^\w.-]+", ".", "-".join(parts).replace("=", ""))


OTHER_FILE = "Continue another file with --resume, or set another --output-dir."


def find_saved(folder: Path, resume: Path | None, auto_resume: bool, settings: dict[str, Any],
               defaults: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The file to continue and its content, checked against this start's `settings`; None for a
    new run: `resume`, else with `auto_resume` the folder's own checkpoint-last.pth.

    A setting that the file does not know had its default. Where the teacher's weights come from may
    differ: `restore` compares what they are. Raises UserError where the folder holds
    another run: nothing in it is ever overwritten by a run that does not continue it; and where the
    processes do not all see the same.
    """
    saved = _read_saved(folder, resume, auto_resume)
    if saved is not None:
        path, content = saved
        changes = describe_changes({**defaults, **content["args"]}, settings,
                                   FREE_ON_RESUME | {"teacher_weights", "teacher_weights_key"})
        if changes:
            raise UserError(f"{path} is from a run with other settings ({'; '.join(changes)}). "
                            "Repeat its settings to continue it, or set another --output-dir.")
        _check_counters(path, content, settings)
    steps = gather_objects(saved[1]["step"] if saved else None)
    if len(set(steps)) > 1:
        raise UserError(f"the processes do not see the same checkpoint in {folder} (updates "
                        f"{steps}). --output-dir must be on storage that all machines share.")
    return saved


def _check_counters(path: Path, content: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises UserError unless the file stands within the run and knows where."""
    step, epoch, per_epoch = content.get("step"), content.get("epoch"), settings["steps_per_epoch"]
    are_numbers = type(step) is int and type(epoch) is int
    if not are_numbers or not (0 <= epoch <= settings["epochs"]
                               and epoch * per_epoch <= step <= (epoch + 1) * per_epoch
                               and step <= settings["epochs"] * per_epoch):
        raise UserError(f"{path} does not stand within this run of {settings['epochs']} epochs of "
                        f"{per_epoch} updates (epoch {short(epoch)}, update {short(step)}). "
                        f"{OTHER_FILE}")


def _read_saved(folder: Path, resume: Path | None, auto_resume: bool
                ) -> tuple[Path, dict[str, Any]] | None:
    last = folder / LAST
    remains = sorted(path.name for path in folder.glob("*")
                     if path.suffix == ".pth" or path.name == "log.txt")
    if resume is not None:
        path = resume
        if remains and resume.resolve().parent != folder.resolve():
            if not (auto_resume and _has_resumed(last, resume)):
                raise UserError(f"{folder} holds another run, which --resume {resume} would "
                                "overwrite. Set another --output-dir.")
            path = last  # the same command was started before: a cluster starts it again
    elif not last.exists():
        if remains:
            raise UserError(f"{folder} holds {', '.join(remains)} of another run but no {LAST}. "
                            "Continue one with --resume, or set another --output-dir.")
        return None
    elif auto_resume:
        path = last
    else:
        raise UserError(f"{folder} already holds a run. Leave out --no-auto-resume to continue it, "
                        "or set another --output-dir.")
    try:
        saved = load_file(path)
    except UserError as error:
        raise UserError(f"{error} {OTHER_FILE}") from None
    if isinstance(saved.get("args"), dict) and "optimizer" not in saved:
        raise UserError(f"{path} holds weights alone, with which no run can go on. Continue the "
                        f"{LAST} of its run, or begin a new one with --student-weights {path} in "
                        "place of --resume.")
    if "optimizer" not in saved or not isinstance(saved.get("args"), dict):
        raise UserError(f"{path} is not a checkpoint of this program's training. Weights alone are "
                        "loaded with --student-weights.")
    check_settings(saved["args"], path)
    return path, saved


def _has_resumed(last: Path, resume: Path) -> bool:
    """Whether the run whose newest checkpoint is `last` began as a continuation of `resume`."""
    settings = load_file(last).get("args") if last.exists() else None
    begun = settings.get("resume") if isinstance(settings, dict) else None
    return isinstance(begun, str) and Path(begun).resolve() == resume.resolve()


def check_settings(settings: Any, path: Path) -> None:
    """Raises UserError unless `settings`, the `args` of the file at `path`, are those of a run:
    plain values by name, of their types where a program reads one."""
    if not isinstance(settings, dict):
        raise UserError(f"{path} does not say which run it is of: args is a "
                        f"{type(settings).__name__}, expected a dict.")
    for name, value in settings.items():
        if name in ("student", "teacher", "data_set"):
            is_right = is_list_of_words(value)
        elif name == "loss":
            is_right = isinstance(value, list) and all(map(is_list_of_words, value))
        elif name in ("num_classes", "input_size"):
            is_right = type(value) is int and 0 < value < 2 ** 31
        elif name == "crop_pct":
            is_right = value is None or isinstance(value, float)
        elif name == "interpolation":
            is_right = isinstance(value, str)
        else:
            is_right = isinstance(name, str) and _is_plain(value)
        if not is_right:
            raise UserError(f"{path} is damaged or was changed: its setting {short(name)} is "
                            f"{short(value)}. Use another copy of the file.")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    if isinstance(value, int):
        return -2 ** 63 <= value < 2 ** 64
    return value is None or isinstance(value, (float, str))


def restore(state: Any, path: Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """Give a TrainState what the file at `path` saved of one, all of it or nothing, and empty
    `saved`, which would stay in memory for the whole run. Raises UserError where the file does not
    hold the state of such a run, or where its teacher had other weights than that of `settings`."""
    _check_teacher(path, saved["args"], settings)
    content = {name: value for name, value in saved.items() if name not in ("args", "git")}
    is_checked = content.pop(CHECKSUMS, None) is not None
    content.setdefault("classes", state.classes)  # files written before these were kept
    try:
        if state.sparsity is not None and content.get("sparsity") is None:
            raise ValueError("it holds no masks, and new ones would zero weights that were trained")
        check_form(content, state.form(content, is_checked), "")
        if content["classes"] != state.classes:
            raise ValueError("its classes are not those of the data, or in another order")
        state.load_state_dict(content)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not hold the state of this run ({one_line(error)[:400]}). "
                        f"{OTHER_FILE}") from None
    saved.clear()


def _check_teacher(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises UserError where the file's run had a teacher of other weights. Where they lie is free.
    Files of older versions do not say what they are: then the same place, or a file of the same
    bytes, is the same teacher; and where the file is gone, a sentence says what is assumed."""
    if here.get(TEACHER) is None:  # there is no teacher, or a dry run did not load it
        return
    old, new = (str(settings["teacher_weights"]) for settings in (there, here))
    places = f"(teacher_weights: {old} there, {new} here)"
    if TEACHER in there:
        is_equal = there[TEACHER] == here[TEACHER]
    else:
        keys = [settings.get("teacher_weights_key") for settings in (there, here)]
        old_file, new_file = Path(old).expanduser().resolve(), Path(new).expanduser().resolve()
        is_equal = keys[0] == keys[1] and (old == new or old_file == new_file)
        if not is_equal and keys[0] == keys[1] and new_file.is_file():
            is_equal = old_file.is_file() and filecmp.cmp(old_file, new_file, shallow=False)
            if not old_file.exists() and "/" in old.replace("\\", "/"):
                print_once(f"note: {path} does not say what its teacher's weights were, and the "
                           f"file is gone: the other one is taken for the same {places}")
                return
    if not is_equal:
        raise UserError(f"{path} is from a run whose teacher had other weights {places}. Pass "
                        "those, or set another --output-dir.")
    if old != new:
        print_once(f"the teacher's weights are the same as before, in another place {places}")


def checkpoint_names(epoch: int, is_last: bool, save_freq: int, best: Sequence[str]) -> list[str]:
    """The files that the state after `epoch` goes to, in order. `best` has '' when the student and
    '_ema' when its average was never as good as now."""
    names = [f"checkpoint-best{suffix.replace('_', '-')}.pth" for suffix in best]
    if save_freq and ((epoch + 1) % save_freq == 0 or is_last):
        names.append(f"checkpoint-{epoch}.pth")
    return [*names, LAST]


def save(content: dict[str, Any], folder: Path, names: list[str], keep: int,
         is_whole: bool = False) -> None:
    """Write `content` to LAST, the last of `names`, and to the others its weights, or all of it if
    `is_whole`; delete all but the `keep` newest of the numbered checkpoints (0: none). Called by
    all processes; the first one writes.

    LAST comes after everything else of its epoch, the line of log.txt and what is deleted included:
    whatever a kill leaves undone, the LAST of before is continued, and it is done again.
    """
    def write() -> None:
        sums = checksums(content)
        for name in names:
            if name == LAST:
                keep_last(folder, keep, content["epoch"] - 1)
            kept = content if is_whole or name == LAST else {
                key: value for key, value in content.items() if key in WEIGHTS}
            whole = {**kept, CHECKSUMS: {key: sums[key] for key in kept}}
            write_atomically(partial(torch.save, whole), folder / name)

    on_main(write)


def lock_folder(folder: Path, is_dry_run: bool) -> FolderLock:
    """The lock of a run folder, not yet held. Called by all processes; raises UserError on all when
    another start writes into the folder, unless this one will write nothing."""
    lock = FolderLock(folder, LAST)
    if not is_dry_run:
        on_main(lock.check)
    return lock


def start_run(lock: FolderLock, settings: dict[str, Any]) -> None:
    """Hold the run folder from now on, and write args.yaml with every resolved value, and a line of
    command.txt, one per start. Called by all processes; the first one writes."""
    def write() -> None:
        try:
            lock.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise could_not_write(lock.folder, error) from None
        lock.acquire(f"{settings['world_size']} process(es), git {settings['git']}")
        delete_leftovers(lock.folder, WRITTEN)
        write_text_atomically(yaml.safe_dump(settings, sort_keys=False),
                              lock.folder / "args.yaml")
        if lock.missing:
            print_once(lock.missing)

    on_main(write)
