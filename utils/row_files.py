"""Rows of numbers on disk, in blocks: files that are whole or not there, each with checksums, and
mapped into memory."""
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from utils.checkpoint import save_atomically
from utils.content import CHECKSUMS, check_form, checksums
from utils.files import version_of
from utils.registry import UserError, one_line

FORMAT = 1  # of the files
BLOCK_BYTES = 2 ** 25  # of a full block, about
Columns = dict[str, Tensor]  # name -> (rows, width)


class RowFiles:
    """The rows of any number of epochs, `rows_per_epoch` each, in the files of `folder`.

    `columns`: name -> (dtype, width), what a row has. `key` says what the rows are of; a file with
    another one is refused. A block is a file of as many consecutive rows of an epoch as make about
    32 MiB; the last one of an epoch has fewer. Nothing here depends on who wrote which row.
    """

    def __init__(self, folder: Path, key: str, rows_per_epoch: int,
                 columns: dict[str, tuple[torch.dtype, int]]) -> None:
        self.folder, self.key, self.rows_per_epoch = folder, key, rows_per_epoch
        self.columns = columns
        self.bytes_per_row = sum(width * dtype.itemsize for dtype, width in columns.values())
        self.rows_per_block = min(max(BLOCK_BYTES // self.bytes_per_row, 1), rows_per_epoch)
        self.blocks_per_epoch = math.ceil(rows_per_epoch / self.rows_per_block)
        self._checked: dict[Path, tuple[int, ...] | None] = {}  # files and their versions

    def path_of(self, epoch: int, block: int) -> Path:
        return self.folder / f"epoch-{epoch:04}-block-{block:04}.pt"

    def rows_of(self, block: int) -> range:
        first = block * self.rows_per_block
        return range(first, min(first + self.rows_per_block, self.rows_per_epoch))

    def blocks_of(self, first: int, stop: int) -> range:
        """Those that have some of the rows `first` to `stop` of an epoch."""
        return range(first // self.rows_per_block, (stop - 1) // self.rows_per_block + 1)

    def missing(self, epochs: Iterable[int]) -> list[tuple[int, int]]:
        """(epoch, block) of every file that is not there."""
        there = set(os.listdir(self.folder)) if self.folder.is_dir() else ()
        return [(epoch, block) for epoch in epochs for block in range(self.blocks_per_epoch)
                if self.path_of(epoch, block).name not in there]

    def faulty(self, epoch: int) -> list[int]:
        """The blocks of an epoch that are not there, or damaged, which is looked for once."""
        blocks = []
        for block in range(self.blocks_per_epoch):
            try:
                self.read(epoch, block)
            except (FileNotFoundError, UserError):
                blocks.append(block)
        return blocks

    def read(self, epoch: int, block: int) -> Columns:
        """The rows of a block, mapped; every bit of them is checked when a file is first read.
        Raises FileNotFoundError, or UserError for a file that is not what was written."""
        path, rows = self.path_of(epoch, block), len(self.rows_of(block))
        version = version_of(path)
        content = read_mapped(path)
        form = {"format": int, "key": str, "epoch": int, "block": int,
                **{name: torch.empty(rows, width, dtype=dtype, device="meta")
                   for name, (dtype, width) in self.columns.items()}}
        sums = content.pop(CHECKSUMS)
        try:
            check_form(content, form, "")
            for name, value in (("format", FORMAT), ("key", self.key), ("epoch", epoch),
                                ("block", block)):
                if content[name] != value:
                    raise ValueError(f"its {name} is {content[name]}, expected {value}")
        except ValueError as error:
            raise UserError(f"{path} is not the block of that name: {error}.") from None
        if version is None or self._checked.get(path) != version:
            if sums != checksums(content):
                raise UserError(f"{path} is damaged: its values are not those that were written "
                                "(sha256 differs).")
            self._checked[path] = version
        return {name: content[name] for name in self.columns}

    def write(self, epoch: int, block: int, columns: Columns) -> None:
        """Raises UserError where the file cannot be written."""
        save_atomically({"format": FORMAT, "key": self.key, "epoch": epoch, "block": block,
                         **columns}, self.path_of(epoch, block))


def read_mapped(path: Path) -> dict:
    """The content of a file of `save_atomically`, its tensors mapped; whether they are what was
    saved is not looked at. Raises FileNotFoundError, or UserError for another file."""
    try:
        content = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise almost anything inside torch.load
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be read ({error.strerror}).") from None
        reason = one_line(error)[:100]
        if "mmap can only be used" in reason:  # torch's advice on how to save it follows
            reason = "it is no archive of torch.save"
        raise UserError(f"{path} is damaged or not whole ({reason}).") from None
    if not isinstance(content, dict) or CHECKSUMS not in content:
        raise UserError(f"{path} is no file of this program with checksums.")
    return content


def within(rows: range, part: range) -> slice:
    """Where the rows of `part` are among `rows`, an ascending range."""
    def place(limit: int) -> int:
        return min(max(-(-(limit - rows.start) // rows.step), 0), len(rows))

    return slice(place(part.start), place(part.stop))


def columns_of(packed: Tensor, columns: dict[str, tuple[torch.dtype, int]]) -> Columns:
    """What `packed_rows` made one of: (n, bytes) uint8 -> columns."""
    result, start = {}, 0
    for name, (dtype, width) in columns.items():
        stop = start + width * dtype.itemsize
        result[name] = packed[:, start:stop].contiguous().view(dtype)
        start = stop
    return result


def packed_rows(columns: Columns) -> Tensor:
    """(n, bytes) uint8: the values of each row, end to end, on their device."""
    return torch.cat([values.contiguous().view(torch.uint8) for values in columns.values()], 1)
