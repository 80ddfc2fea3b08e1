"""Files that are either whole or not there."""
import argparse
import os
import pickle
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.errors import UserError, one_line

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
