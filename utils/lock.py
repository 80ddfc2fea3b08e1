"""The owner of a folder, a run's or a cache's: one start at a time writes into it."""
import errno
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import BinaryIO

from utils.files import could_not_write, host_name, version_of
from utils.registry import UserError, short

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HELD = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
PATIENCE = 3.0  # seconds for a process that was killed to end; a large one takes its time
LINE = re.compile(r"(?P<command>.*)  # .*process (?P<pid>\d+) on (?P<host>\S+) "
                  r"since (?P<start>\S+ \S+)")


class FolderInUse(UserError):
    """Another start holds the folder: `holder`, in words."""

    def __init__(self, message: str, holder: str = "another start") -> None:
        super().__init__(message)
        self.holder = holder


class FolderLock:
    """The right to write into a folder, held from `acquire` until `close` or until the process
    ends, however it does.

    It is a POSIX record lock on a file of the folder, whose last line says who holds it. The
    system drops it together with the process. Processes forked from it do not inherit it, unlike
    with flock: a loader's worker that outlives a killed run keeps nobody out. Network disks pass
    it on to their server where they were mounted so. Where there are no locks, `missing` says so
    in a sentence, and nothing is refused. No other code may open the file in this process:
    closing any such file would drop the lock.

    `guarded`: a file in the folder that must not change between now and `acquire`, for what is
    continued is read before the folder is held. `name`: of the locked file. `flag`: what names the
    folder on the command line.
    """

    def __init__(self, folder: Path, guarded: str, *, name: str = "command.txt",
                 flag: str = "--output-dir") -> None:
        self.folder, self.path, self.flag = folder, folder / name, flag
        self.guarded, self.seen = folder / guarded, version_of(folder / guarded)
        self.missing = ""
        self._file: BinaryIO | None = None

    def check(self) -> None:
        """Raises UserError when another start holds the folder. Leaves no trace."""
        try:
            file = open(self.path, "r+b")
        except OSError:  # no run is there, or none that this start could continue
            return
        with file:
            try:
                self._lock(file)
            except OSError as error:
                raise could_not_write(self.path, error, "lock") from None

    def acquire(self, note: str) -> None:
        """Hold the folder, which must exist, and add a line to the file: the command, `note`, and
        who runs it. Raises FolderInUse when another start holds it, or UserError when one has held
        it since."""
        try:
            while self._file is None or not _is_there(self._file, self.path):
                self.close()  # of a file that was deleted meanwhile
                self._file = open(self.path, "a+b", buffering=0)
                self._lock(self._file)
            if version_of(self.guarded) != self.seen:
                raise UserError(f"another start has written {self.guarded} while this one was "
                                "getting ready. Start the same command again to continue from it.")
            start = time.strftime("%Y-%m-%d %H:%M:%S")
            self._file.write(f"{shlex.join(sys.argv)}  # {note}, process {os.getpid()} on "
                             f"{host_name()} since {start}\n".encode(errors="surrogateescape"))
            os.fsync(self._file.fileno())  # for readers on other machines
        except OSError as error:
            raise could_not_write(self.path, error) from None

    def close(self) -> None:
        """Let others in."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lock(self, file: BinaryIO) -> None:
        if fcntl is None:
            self._note_missing("this system has no locks that end with their process")
            return
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno in NO_LOCKS:
                    self._note_missing(f"the file system of {self.folder} has no locks "
                                       f"({error.strerror})")
                    return
                if error.errno not in HELD:
                    raise
            if time.monotonic() > deadline:
                holder = self._holder()
                raise FolderInUse(f"{self.folder} is in use by {holder}. Wait for its end or stop "
                                  f"it, or set another {self.flag}.", holder)
            time.sleep(0.1)

    def _note_missing(self, reason: str) -> None:
        self.missing = (f"note: {reason}; nothing but you keeps a second start of this command out "
                        f"of {self.folder}")

    def _holder(self) -> str:
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        match = LINE.fullmatch(lines[-1]) if lines else None
        if match is None:
            return "another start"
        return (f"process {match['pid']} on {match['host']}, started {match['start']} as "
                f"{short(match['command'])}")


def _is_there(file: BinaryIO, path: Path) -> bool:
    """Whether `path` still is the file that was opened."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False
