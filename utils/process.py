"""The process of a program: what SIGTERM and Ctrl-C do to it, and output that nobody can read any
more. Imports no PyTorch, so that a program can begin with it."""
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 3.0  # seconds that a handler has, once its signal came, before another thread calls it


class Leave:
    """A handler that ends the process there and then, in a sentence. Files are written beside
    their name and renamed, so what is saved is whole at every moment.

    `code`: of a process that is at its end, and says nothing more; None: 128 and the signal's
    number, as shells have it. `should_print(message)` says whether this process is to tell.
    """

    def __init__(self, code: int | None = None,
                 should_print: Callable[[str], bool] | None = None) -> None:
        self.code, self.should_print = code, should_print or _is_first
        self._has_begun = threading.Lock()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self._has_begun.acquire(blocking=False):
            return
        with suppress(Exception):  # the signal may have come in the middle of a print
            sys.stdout.flush()
        if self.code is not None:
            os._exit(self.code)
        word = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
        message = f"{word}; what was saved before is kept."
        if self.should_print(message):
            with suppress(OSError):
                os.write(2, f"\n{Path(sys.argv[0]).name}: {message}\n".encode(
                    errors="backslashreplace"))
        os._exit(128 + number)


def begin(should_print: Callable[[str], bool] | None = None) -> None:
    """Prepare the process of a program: from here on SIGTERM and Ctrl-C end it in a sentence, and
    it lives on when nobody reads its output. May be called again, for another `should_print`."""
    if threading.current_thread() is not threading.main_thread():
        return  # others have no say in signals
    is_first = not isinstance(signal.getsignal(signal.SIGTERM), Leave)
    signal.signal(signal.SIGTERM, Leave(should_print=should_print))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as for what runs in the background
        signal.signal(signal.SIGINT, Leave(should_print=should_print))
    if is_first:
        _listen()
        _keep_output()


def finish(code: int) -> None:
    """From here on a signal ends the process with `code`, which is decided."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, Leave(code))


def _is_first(message: str) -> bool:
    return os.environ.get("RANK", "0") == "0"


def _listen() -> None:
    """Call a Leave from another thread where the main one does not come to it: Python runs handlers
    between two of its own steps, and waiting for processes to join is a single step."""
    ours, systems = socket.socketpair()
    systems.setblocking(False)
    signal.set_wakeup_fd(systems.fileno(), warn_on_full_buffer=False)
    if hasattr(os, "register_at_fork"):  # a fork has no such thread, and signals of its own
        os.register_at_fork(after_in_child=_forget)

    def run() -> None:
        while systems.fileno() >= 0:
            for number in ours.recv(64):
                handler = signal.getsignal(number)
                if isinstance(handler, Leave):
                    time.sleep(PATIENCE)
                    if signal.getsignal(number) is handler:
                        handler(number, None)

    threading.Thread(target=run, name="signals", daemon=True).start()


def _forget() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _keep_output() -> None:
    # Where a standard stream was closed, the next file opened would take its number.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout, sys.stderr = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)


def _lasting(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:  # closed by whoever started the program
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    if not isinstance(stream, io.TextIOWrapper):  # a notebook's, say
        return stream
    is_lines, encoding = stream.line_buffering or stream.isatty(), stream.encoding
    return LastingOutput(stream.detach(), encoding, errors="backslashreplace",
                         line_buffering=is_lines)


class LastingOutput(io.TextIOWrapper):
    """Standard output that any text can be printed to, and that a program outlives: when its reader
    is gone, or its disk full, what is printed from then on is lost."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # takes what is still in the buffer, too
        os.close(nowhere)
        if self.fileno() == 1:
            with suppress(OSError):
                os.write(2, f"standard output is lost ({error.strerror}); the program goes on.\n"
                         .encode())
