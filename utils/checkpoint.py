"""Files that are either whole or not there."""
import argparse
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write `content` beside `path`, flush it to the disk, then rename: a kill or a full disk at
    any moment leaves the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into the latter
        temporary.unlink(missing_ok=True)
        kept = " The one there is kept." if path.exists() else ""
        raise UserError(f"could not write {path}: {str(error).splitlines()[0]}.{kept} "
                        "Free some space or set --output-dir, then start the same command again."
                        ) from error


def load_file(path: Path) -> dict[str, Any]:
    """A file written by torch.save, without running code from it: tensors, plain values, and
    argparse's Namespace, which published checkpoints carry."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a readable PyTorch checkpoint ({reason}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of tensors.")
    return content


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
