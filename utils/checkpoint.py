"""Checkpoints and the folder of a run: files that are either whole or not there, what a start may
continue, and what it must not touch."""
import argparse
import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml

from utils.distributed import barrier, gather_objects, is_main
from utils.registry import UserError, one_line

# What torch's zip writer says, as a RuntimeError, when the disk is full.
WRITER_FAILED = ("PytorchStreamWriter", "inline_container", "unexpected pos")


def write_atomically(write: Callable[[BinaryIO], None], path: Path) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk, then rename: a kill or a full
    disk at any moment leaves the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        is_full = any(word in str(error) for word in WRITER_FAILED)
        if isinstance(error, RuntimeError) and not is_full:
            raise
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        kept = " The one there is kept." if path.exists() else ""
        raise UserError(f"could not write {path}: {str(error).splitlines()[0]}.{kept} Make room "
                        "for it or name another folder, then start the same command again."
                        ) from error


def save_atomically(content: dict[str, Any], path: Path) -> None:
    write_atomically(lambda file: torch.save(content, file), path)


def write_text_atomically(text: str, path: Path) -> None:
    write_atomically(lambda file: file.write(text.encode()), path)


def load_file(path: Path) -> dict[str, Any]:
    """A file written by torch.save, without running code from it: tensors, plain values, and
    argparse's Namespace, which published checkpoints carry. Or tensors in a .safetensors file."""
    if Path(path).suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}.") from None
    except pickle.UnpicklingError:  # torch's own text advises to run the file's code
        raise UserError(f"{path} is not a readable PyTorch checkpoint of tensors and plain values "
                        "(files that hold code are not opened).") from None
    except Exception as error:  # a damaged file can raise almost anything inside torch.load
        raise UserError(f"{path} is not a readable PyTorch checkpoint ({one_line(error)[:200]})."
                        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of tensors.")
    return content


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file as load
    except ImportError:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors.") from None
    try:
        return load(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable .safetensors file ({one_line(error)})."
                        ) from None


def keep_last(folder: Path, pattern: str, number: int) -> None:
    """Delete all but the `number` newest files of a numbered series; 0 keeps every one."""
    files = sorted(folder.glob(pattern), key=lambda path: int(path.stem.rpartition("-")[2]))
    for path in files[:-number] if number else []:
        path.unlink()


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
    return [f"{name}: {saved.get(name, 'not set')} there, {current.get(name, 'not set')} here"
            for name in names if saved.get(name) != current.get(name)]


LAST = "checkpoint-last.pth"

# What a resumed run may change: where and how it runs and reports, not what it computes. How many
# processes share an effective batch is free as long as the product is the same.
FREE_ON_RESUME = frozenset({
    "config", "output_dir", "resume", "auto_resume", "device", "num_workers", "print_every",
    "save_freq", "save_num", "save_every_steps", "tensorboard", "skip_bad_images", "data_path",
    "student_weights", "student_weights_key", "compile", "compile_teacher", "channels_last",
    "batch_size", "accum_steps", "world_size", "git", "dry_run", "large_kernel",
    "teacher_stream", "log_kd_health"})  # the last two: only files of older versions have them


def run_name(teacher: list[str], student: list[str], losses: list[list[str]], epochs: int,
             seed: int, sparsity: float = 0.0) -> str:
    """teacher-student-loss-epochs, each with the options given to it; after the student its
    sparsity and at the end the seed, where they are not 0."""
    loss = [word for spec in losses for word in spec]
    parts = ["_".join(spec) for spec in (teacher, student, loss)] + [f"{epochs}ep"]
    if sparsity:
        parts[1] += f"_sparsity{sparsity:g}"
    if seed:
        parts.append(f"seed{seed}")
    return re.sub(r"[^\w.-]+", ".", "-".join(parts).replace("=", ""))


def find_saved(folder: Path, resume: Path | None, auto_resume: bool, settings: dict[str, Any],
               defaults: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The file to continue and its content, checked against this start's `settings`; None for a
    new run: `resume`, else with `auto_resume` the folder's own checkpoint-last.pth.

    A setting that the file does not know had its default. Raises UserError where the folder holds
    another run: nothing in it is ever overwritten by a run that does not continue it; and where the
    processes do not all see the same.
    """
    saved = _read_saved(folder, resume, auto_resume)
    if saved is not None:
        path, content = saved
        changes = describe_changes({**defaults, **content["args"]}, settings, FREE_ON_RESUME)
        if changes:
            raise UserError(f"{path} is from a run with other settings ({'; '.join(changes)}). "
                            "Repeat its settings to continue it, or set another --output-dir.")
    steps = gather_objects(saved[1]["step"] if saved else None)
    if len(set(steps)) > 1:
        raise UserError(f"the processes do not see the same checkpoint in {folder} (updates "
                        f"{steps}). --output-dir must be on storage that all machines share.")
    return saved


def _read_saved(folder: Path, resume: Path | None, auto_resume: bool
                ) -> tuple[Path, dict[str, Any]] | None:
    last = folder / LAST
    remains = sorted(path.name for path in folder.glob("*")
                     if path.suffix == ".pth" or path.name == "log.txt")
    if resume is not None:
        if remains and resume.resolve().parent != folder.resolve():
            raise UserError(f"{folder} holds another run, which --resume {resume} would overwrite. "
                            "Set another --output-dir.")
        path = resume
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
        raise UserError(f"{error} Continue another file with --resume, or set another "
                        "--output-dir.") from None
    if "optimizer" not in saved or not isinstance(saved.get("args"), dict):
        raise UserError(f"{path} is not a checkpoint of this program's training. Weights alone are "
                        "loaded with --student-weights.")
    return path, saved


def restore(state: Any, path: Path, saved: dict[str, Any]) -> None:
    """Give a TrainState what the file at `path` saved of one. Raises UserError when it cannot."""
    try:
        if state.sparsity is not None and saved.get("sparsity") is None:
            raise ValueError("it holds no masks, and new ones would zero weights that were trained")
        state.load_state_dict(saved)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold the state of this run ({one_line(error)}). Continue "
                        "another file with --resume, or set another --output-dir.") from None


def checkpoint_names(epoch: int, is_last: bool, save_freq: int, best: Sequence[str]) -> list[str]:
    """The files that the state after `epoch` goes to. `best` has '' when the student and '_ema'
    when its average was never as good as now."""
    names = [LAST]
    if save_freq and ((epoch + 1) % save_freq == 0 or is_last):
        names.append(f"checkpoint-{epoch}.pth")
    return names + [f"checkpoint-best{suffix.replace('_', '-')}.pth" for suffix in best]


def save(content: dict[str, Any], folder: Path, names: list[str], keep: int) -> None:
    """Write `content` to each of `names`, and delete all but the `keep` newest of the numbered
    checkpoints (0: none). Called by all processes; the first one writes."""
    if is_main():
        for name in names:
            save_atomically(content, folder / name)
        keep_last(folder, "checkpoint-[0-9]*.pth", keep)
    barrier()


def write_run_files(folder: Path, settings: dict[str, Any]) -> None:
    """args.yaml with every resolved value, and command.txt with one line per start. Called by all
    processes; the first one writes."""
    if is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text_atomically(yaml.safe_dump(settings, sort_keys=False), folder / "args.yaml")
            with open(folder / "command.txt", "a") as file:
                file.write(f"{shlex.join(sys.argv)}  # {settings['world_size']} process(es), "
                           f"git {settings['git']}\n")
        except OSError as error:
            raise UserError(f"cannot write to the run folder {folder}: {error}.") from None
    barrier()
