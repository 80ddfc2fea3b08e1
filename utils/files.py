"""Files that are either whole or not there; what keeps one from being written, in words."""
import errno
import os
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from utils.registry import UserError, one_line

# What is to be done about each cause; every other one is named in the system's own words alone.
REMEDIES = {
    errno.ENOSPC: "Make room on that disk, or name another folder",
    errno.EDQUOT: "Delete other files or have your quota raised, or name another folder",
    errno.EFBIG: "Neither a limit of the shell (ulimit -f) nor the file system may be smaller than "
                 "the file; raise it, or name another folder",
    errno.EROFS: "Make the file system writable, or name another folder",
    errno.EACCES: "Get the permission to write there, or name another folder",
    errno.EPERM: "Get the permission to write there, or name another folder",
    errno.ENOENT: "Its folder is not there, or was moved or deleted meanwhile: put it back, or "
                  "name the folder where it is",
    errno.ENOTDIR: "A part of its path is a file, where a folder is needed; move it away, or name "
                   "another folder",
    errno.EEXIST: "A file is where a folder is needed; move it away, or name another folder",
    errno.EISDIR: "A folder has that name; move it away, or give another name",
    errno.ENAMETOOLONG: "Give a shorter name",
    errno.EMFILE: "Raise the number of files that a process may have open (ulimit -n)",
    errno.EIO: "The disk or its server failed: have it mended, or name another folder",
    errno.ESTALE: "The server of that disk lost the folder: mount it anew, or name another folder",
}


def could_not_write(path: Path, error: OSError, action: str = "write") -> UserError:
    """The sentence for a file that could not be written: its cause, and what to do about that."""
    kept = " The file there is kept." if os.path.isfile(path) else ""
    remedy = REMEDIES.get(error.errno, "Mend that, or name another folder")
    return UserError(f"could not {action} {path}: {error.strerror or one_line(error)}.{kept} "
                     f"{remedy}, then start the same command again.")


def write_atomically(write: Callable[[BinaryIO], None], path: Path) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk, then rename: a kill or a full
    disk at any moment leaves the old file or the new one, never half of one. Processes that write
    the same path do not meet in the file beside it.

    Raises UserError where the file cannot be written."""
    if not path.name or path.is_dir():
        raise could_not_write(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    if os.path.exists(path) and not os.path.isfile(path):  # /dev/stdout: no content to keep whole
        try:
            with open(path, "wb") as file:
                write(file)
        except OSError as error:
            raise could_not_write(path, error) from error
        return
    temporary = path.with_name(f"{path.name}.{_this_process()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save says in words of its own, as a RuntimeError, that the file could not grow.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise could_not_write(path, cause) from error


def write_text_atomically(text: str, path: Path) -> None:
    # A path's bytes that are no UTF-8 are written as such escapes as print makes of them.
    write_atomically(lambda file: file.write(text.encode(errors="backslashreplace")), path)


def delete_leftovers(folder: Path, patterns: tuple[str, ...]) -> None:
    """Delete what killed processes left of files whose names match one of `patterns`. Only for
    whoever alone writes into the folder."""
    for pattern in patterns:
        for path in folder.glob(f"{pattern}*.tmp"):
            with suppress(OSError):
                path.unlink()


def version_of(path: Path) -> tuple[int, ...] | None:
    """What changes whenever a file is replaced; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def host_name() -> str:
    return re.sub(r"[^\w.-]+", "_", platform.node()) or "unknown"


def _this_process() -> str:
    return f"{host_name()}-{os.getpid()}"
