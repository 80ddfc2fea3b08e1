"""A teacher whose logits are kept: what is on disk is read, what is not is asked of the network and
written, so that every further student is taught at the price of supervised training.

Every image that a network sees is a function of (seed, epoch, index), and every mix of its place in
the run. So no random seed is kept, and a run from the cache is, where all logits are kept, the run
with the network itself to the last bit. (FKD and TinyViT keep the seeds, see kept_logits.py.)
"""
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import teacher_manifest
from models.base import ModelOutput, VisionModel
from models.distiller import Distiller, FrozenTeacher
from models.kept_logits import (
    columns_kept,
    compact,
    dense,
    describe_saving,
    in_bytes,
    time_micro_batches,
)
from utils.checkpoint import load_file, save_atomically
from utils.content import CHECKSUMS, check_form, checksum
from utils.distributed import (
    StopRequest,
    broadcast_object,
    gather_rows,
    is_main,
    on_main,
    sum_over_ranks,
    world_size,
)
from utils.files import could_not_write, delete_leftovers
from utils.lock import FolderInUse, FolderLock
from utils.log import print_once, progress
from utils.registry import UserError
from utils.rng import Position
from utils.row_files import Columns, RowFiles, columns_of, packed_rows, within

FILL = ("Run the same command with --fill-cache in place of --teacher-cache-only, which writes "
        "what is missing.")
WRITTEN = ("epoch-", "validation-", teacher_manifest.NAME)


class CachedTeacher:
    """What the step asks in place of a FrozenTeacher: the same logits, from `files` where they are
    there, else from the `network`, when they are kept for later runs. It has no feature maps.

    `network`: None where it must not be asked. `places(batch, process)`: where the images of a
    micro-batch stand in an epoch's order, which is where their rows are. `evaluation`: the file of
    the network's result on the validation images. `epochs`: how many of the run's `num_epochs`
    differ. `options`: of its steps. All processes call all methods, in the same order.
    """

    feature_info = ()

    def __init__(self, files: RowFiles, manifest: Mapping[str, Any], network: FrozenTeacher | None,
                 places: Callable[[int, int], range], evaluation: Path, *, options: Any,
                 num_classes: int, top: int, epochs: int, num_epochs: int) -> None:
        self.files, self.folder, self.manifest = files, files.folder, manifest
        self.network, self.places = network, places
        self.num_classes, self.top, self.options = num_classes, top, options
        self.epochs, self.num_epochs = epochs, num_epochs
        self.rows_per_batch = len(places(0, 0)) * world_size()
        self.batches_per_epoch = files.rows_per_epoch // self.rows_per_batch
        self.evaluation, self._evaluation_key = evaluation, f"{files.key}/{evaluation.stem}"
        self.keeps = False  # whether what the network says is written
        self.is_filling = False  # whether it must be
        self.has_tried = False  # to hold the folder
        self._lock: FolderLock | None = None
        # By (epoch, block), while the run is in it: the rows on disk, None where they are not
        # used; and what the network said so far of the rows that are to be written.
        self._met: dict[tuple[int, int], Columns | None] = {}
        self._said: dict[tuple[int, int], list[Columns]] = {}
        # Two: a block is checked beside the reading of rows.
        self._threads = ThreadPoolExecutor(2, "teacher cache")
        self._opening: dict[tuple[int, int], Future] = {}
        self._ahead: tuple[tuple[int, int] | None, Future | None] = None, None

    def begin(self, batches_done: int = 0, *, must_write: bool = False) -> None:
        """Look at what a run needs, of which so many micro-batches are done. Raises UserError where
        the network must not be asked and something is not there; with `must_write`, where the
        folder cannot be written to."""
        self.is_filling = must_write
        if self.network is None:
            self._check_complete(batches_done)
        elif must_write:
            self._try_to_hold()

    def _check_complete(self, batches_done: int) -> None:
        first, batch = divmod(batches_done, self.batches_per_epoch)
        missing = self.files.missing(sorted({epoch % self.epochs
                                             for epoch in range(first, self.num_epochs)}))
        if self.num_epochs <= self.epochs:  # what is behind the run does not come back
            passed = first, self._blocks_of(batch).start
            missing = [key for key in missing if key >= passed]
        names = [self.files.path_of(*key).name for key in missing]
        if not self.evaluation.exists():
            names.append(self.evaluation.name)
        if names:
            raise UserError(f"{self.folder} lacks {len(names)} of the files that this run needs, "
                            f"the first is {names[0]}, and with --teacher-cache-only nobody asks "
                            f"the teacher. {FILL}")

    def _try_to_hold(self) -> None:
        """Hold the folder, so that what the network says is kept. Where another run holds it, or it
        cannot be written to, nothing is kept, and that is said. Raises UserError where by now it
        has the logits of another run."""
        if self.has_tried:
            return
        self.has_tried = True
        try:
            on_main(self._hold)
            self.keeps = True
        except FolderInUse as error:
            if self.is_filling:
                raise
            print_once(f"teacher cache: {self.folder} is being filled by {error.holder}; this run "
                       "reads what is there, asks the teacher for the rest, and keeps nothing")
        except UserError as error:
            self._give_up(error)
        teacher_manifest.find(self.folder, self.manifest)

    def _hold(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise could_not_write(self.folder, error) from None
        self._lock = FolderLock(self.folder, teacher_manifest.NAME, name="filled_by.txt",
                                flag="--teacher-cache")
        self._lock.acquire(f"{world_size()} process(es)")
        if self._lock.missing:
            print_once(self._lock.missing)
        delete_leftovers(self.folder, WRITTEN)
        if not (self.folder / teacher_manifest.NAME).exists():
            teacher_manifest.write(self.manifest, self.folder)

    def _give_up(self, error: UserError) -> None:
        if self.is_filling:
            raise error
        print_once(f"warning: from here on nothing is kept in the teacher cache: {error} This run "
                   "reads what is there and asks the teacher for the rest.")
        self.keeps = False
        self._said.clear()

    def close(self) -> None:
        """Let others write."""
        self._threads.shutdown(cancel_futures=True)
        if self._lock is not None:
            self._lock.close()

    # The step

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        """For images of no run, (N, 3, H, W): logits of the form that `teach` gives them."""
        if self.network is None:
            return ModelOutput(images.new_zeros(len(images), self.num_classes), [])
        kept = compact(self.network.forward_with_features(images).logits, self.top)
        return ModelOutput(dense(kept, self.num_classes), [])

    def teach(self, images: Tensor, position: Position) -> ModelOutput:
        """The logits for a micro-batch (N, 3, H, W), from disk or from the network; no maps."""
        epoch, batch = position.epoch, position.batch
        blocks = self._blocks_of(batch)
        for block in blocks:
            if (epoch, block) not in self._met:
                self._meet(epoch, block, batch)
        if all(self._met[epoch, block] is not None for block in blocks):
            kept = self._read(position, images.device)
        else:
            kept = compact(self.network.teach(images, position).logits, self.top)
            for block in blocks:
                if (epoch, block) in self._said:
                    rows = within(self.places(batch, position.rank), self.files.rows_of(block))
                    self._said[epoch, block].append(
                        {name: values[rows].clone() for name, values in kept.items()})
        for block in blocks:
            if self._batches_of(block).stop == batch + 1:
                self._leave(epoch, block)
        self._look_ahead(position, images.device)
        return ModelOutput(dense(kept, self.num_classes), [])

    def _blocks_of(self, batch: int) -> range:
        """Those that any process's part of a micro-batch has rows in."""
        first = batch * self.rows_per_batch
        return self.files.blocks_of(first, first + self.rows_per_batch)

    def _batches_of(self, block: int) -> range:
        """The micro-batches that have its rows."""
        rows = self.files.rows_of(block)
        return range(rows.start // self.rows_per_batch, (rows.stop - 1) // self.rows_per_batch + 1)

    def _meet(self, epoch: int, block: int, batch: int) -> None:
        """Decide, at the first micro-batch with rows of a block, whether all processes read it."""
        content, fault = self._opened(epoch, block)
        num_missing, num_faulty = sum_over_ranks(
            torch.tensor([float(content is None), float(bool(fault))])).tolist()
        self._met[epoch, block] = None if num_missing else content
        if not num_missing:
            return
        if self.network is None:
            path = self.files.path_of(epoch, block)
            raise UserError(f"{fault or f'{path} is not there.'} {FILL}")
        self._try_to_hold()
        is_kept = self.keeps and batch * self.rows_per_batch <= self.files.rows_of(block).start
        if num_faulty:
            print_once(f"teacher cache: {fault or 'another process could not read a block.'} The "
                       f"teacher is asked again{', and the file written anew' * is_kept}.")
        if is_kept:
            self._said[epoch, block] = []

    def _opened(self, epoch: int, block: int) -> tuple[Columns | None, str]:
        """The rows of a block; or None and why they cannot be read, '' where they are not there."""
        opening = self._opening.pop((epoch, block), None)
        try:
            with suppress(FileNotFoundError):  # it may be there by now
                if opening is not None:
                    return opening.result(), ""
            return self.files.read(epoch, block), ""
        except FileNotFoundError:
            return None, ""
        except UserError as error:
            return None, str(error)

    def _leave(self, epoch: int, block: int) -> None:
        """The run has passed a block: write what was said of it, if that is to be kept."""
        del self._met[epoch, block]
        said = self._said.pop((epoch, block), None)
        if said is None:
            return
        packed = self._gathered(block, said)

        def write() -> None:
            columns = columns_of(packed, self.files.columns)
            if not all(values.isfinite().all() for values in columns.values()):
                raise UserError("the teacher's logits are NaN or infinite. Its weights are broken, "
                                "or too large for this --amp.")
            self.files.write(epoch, block, columns)

        try:
            on_main(write)
        except UserError as error:
            self._give_up(error)

    def _gathered(self, block: int, said: list[Columns]) -> Tensor | None:
        """(rows, bytes) uint8 on the CPU of the first process: all rows of a block; None on the
        others."""
        rows, places = self.files.rows_of(block), []  # in the block, of each process
        for process in range(world_size()):
            parts = [self.places(batch, process) for batch in self._batches_of(block)]
            places.append(torch.tensor([place - rows.start for part in parts
                                        for place in part[within(part, rows)]], dtype=torch.long))
        shares = gather_rows(torch.cat([packed_rows(columns) for columns in said]),
                             [len(part) for part in places])
        if shares is None:
            return None
        packed = torch.empty(len(rows), self.files.bytes_per_row, dtype=torch.uint8)
        for part, share in zip(places, shares):
            packed[part] = share.cpu()
        return packed

    # Reading, beside the step

    def _read(self, position: Position, device: torch.device) -> Columns:
        """The rows of a micro-batch, on their way to the device."""
        (wanted, reading), self._ahead = self._ahead, (None, None)
        if wanted == (position.epoch, position.batch):
            kept = reading.result()
        else:
            kept = self._rows(position.epoch, position.batch, position.rank, device)()
        return {name: values.to(device, non_blocking=True) for name, values in kept.items()}

    def _rows(self, epoch: int, batch: int, process: int, device: torch.device
              ) -> Callable[[], Columns]:
        """What copies the rows of a micro-batch, whose blocks are all met, out of the files: into
        pinned memory for a GPU."""
        place, views = self.places(batch, process), []
        for block in self._blocks_of(batch):
            rows, content = self.files.rows_of(block), self._met[epoch, block]
            part = place[within(place, rows)]
            views.append({name: values[part.start - rows.start:part.stop - rows.start:part.step]
                          for name, values in content.items()})

        def copy() -> Columns:
            joined = {name: torch.cat([view[name] for view in views]) for name in views[0]}
            if device.type == "cuda":
                with torch.cuda.device(device):  # of this thread
                    joined = {name: values.pin_memory() for name, values in joined.items()}
            return joined

        return copy

    def _look_ahead(self, position: Position, device: torch.device) -> None:
        """Begin to copy the rows of the next micro-batch, and to check the next block."""
        epoch, batch = position.epoch, position.batch + 1
        if batch == self.batches_per_epoch:
            epoch, batch = (epoch + 1) % self.epochs, 0
        blocks = self._blocks_of(batch)
        if all(self._met.get((epoch, block)) is not None for block in blocks):
            copy = self._rows(epoch, batch, position.rank, device)
            self._ahead = (epoch, batch), self._threads.submit(copy)
        after = epoch, blocks.stop
        if blocks.stop == self.files.blocks_per_epoch:
            after = (epoch + 1) % self.epochs, 0
        for key in (*((epoch, block) for block in blocks), after):
            if key not in self._met and key not in self._opening:
                self._opening[key] = self._threads.submit(self.files.read, *key)

    # All of it, without a student

    def fill(self, loader: Any, mix: Callable, evaluate: Callable[[], object]) -> int:
        """Ask the network for every block of the epochs that is not there or damaged, and write it;
        images of the others are not read. `begin` comes before. `loader` and `mix` are the run's;
        `evaluate()` calls `evaluated`. Returns the program's exit code: 143 where it was asked to
        stop before the end."""
        with StopRequest() as stop, progress("fill", self.epochs * self.batches_per_epoch) as bar:
            with stop.at_once():
                evaluate()
            for epoch in range(self.epochs):
                missing = broadcast_object(is_main() and self.files.faulty(epoch))
                stretches = list(self._stretches(missing))
                bar.update(self.batches_per_epoch - sum(map(len, stretches)))
                for batches in stretches:
                    self._met, self._said = {}, {}  # of blocks that the one before ended in
                    loaded = loader.start_at(epoch, batches.start, batches.stop)
                    for number, batch in zip(batches, loaded):
                        if stop.agreed():
                            print_once(f"stopped on request, to be continued: {self.describe()}")
                            return 143
                        self._ask(batch, epoch * self.batches_per_epoch + number, mix)
                        bar.update()
        print_once(f"done: {self.describe()}")
        return 0

    def _ask(self, batch: Any, number: int, mix: Callable) -> None:
        """`teach` as the step does it. `number`: of the micro-batch in the run."""
        images, labels = self.options.to_device(batch.images, batch.labels)
        position = self.options.position(*divmod(number, self.options.accum_steps))
        images, _ = mix(images, labels, position)
        with self.options.autocast():
            self.teach(images, position)

    def _stretches(self, blocks: list[int]) -> Iterator[range]:
        """Micro-batches without a gap, that have all rows of these blocks and begin with them."""
        first = stop = 0
        for block in blocks:
            batches = self._batches_of(block)
            if batches.start > stop or stop == 0:
                if stop:
                    yield range(first, stop)
                first = batches.start
            stop = batches.stop
        if stop:
            yield range(first, stop)

    # The validation images

    def evaluated(self, evaluate: Callable[[FrozenTeacher], tuple[float, Tensor]]
                  ) -> tuple[float, Tensor]:
        """What `evaluate(network)` gives, from disk where it is there: top-1 on the validation
        images in percent, and their classes by the network (data set size,), of which `evaluate`
        gives -1 for those of other processes."""
        kept, fault = broadcast_object(self._read_evaluation() if is_main() else None)
        if kept is not None:
            print_once(f"teacher: top-1 {kept['acc1']:.2f} % on the validation images, as kept")
            return kept["acc1"], kept["classes"]
        if self.network is None:
            raise UserError(f"{fault} {FILL}")
        if self.evaluation.exists():
            print_once(f"teacher cache: {fault} The teacher is asked again.")
        self._try_to_hold()
        acc1, classes = evaluate(self.network)
        classes = sum_over_ranks(classes + 1) - 1
        if self.keeps:
            try:
                on_main(lambda: save_atomically(
                    {"key": self._evaluation_key, "acc1": acc1, "classes": classes},
                    self.evaluation))
            except UserError as error:
                self._give_up(error)
        return acc1, classes

    def _read_evaluation(self) -> tuple[dict[str, Any] | None, str]:
        if not self.evaluation.exists():
            return None, f"{self.evaluation} is not there."
        try:
            kept = load_file(self.evaluation)
            form = {"key": str, "acc1": float, "classes": torch.int64, CHECKSUMS: dict}
            check_form(kept, form, "")
            if kept["key"] != self._evaluation_key:
                raise ValueError("it is of another teacher")
        except (UserError, ValueError) as error:
            return None, f"{self.evaluation} cannot be used: {str(error).removesuffix('.')}."
        return kept, ""

    # In words

    def describe(self, distiller: Distiller | None = None) -> str:
        """What is kept, and how much of it is there. Given the student: what it saves, too, for
        which a micro-batch of it and of the network are timed."""
        files, epochs = self.files, self.epochs
        num_files = epochs * files.blocks_per_epoch
        num_there = num_files - len(files.missing(range(epochs)))
        size = files.bytes_per_row * files.rows_per_epoch
        text = (f"teacher cache: {self.folder}, {self.top or 'all'} of {self.num_classes} classes, "
                f"{files.bytes_per_row:,} bytes an image, {in_bytes(size)} an epoch, "
                f"{in_bytes(size * epochs)} in {epochs} epoch(s); {num_there:,} of {num_files:,} "
                "files are there")
        if distiller is None or self.network is None:
            return text
        seconds = time_micro_batches(
            self.network, distiller, number=len(self.places(0, 0)), options=self.options,
            input_size=self.manifest["input_size"], num_classes=self.num_classes)
        return f"{text}\n" + describe_saving(
            *seconds, batches_per_epoch=self.batches_per_epoch, epochs_kept=epochs,
            num_epochs=self.num_epochs, missing=1 - num_there / num_files)


def open_cache(folder: Path, settings: Mapping[str, Any], teacher: FrozenTeacher | None,
               student: VisionModel, loaders: tuple[Any, Any], options: Any) -> CachedTeacher:
    """The logits in `folder` for a run with these settings; nothing is written yet. `teacher`: None
    where it must not be asked. `loaders`: of training and validation. Raises UserError where the
    logits are those of another run, or where without a teacher there are none."""
    train, val = loaders
    dtype = teacher and teacher.logits_dtype(settings["input_size"], options)
    here = teacher_manifest.describe(
        settings, teacher=teacher, device=options.device, images=train.samples.source,
        normalisation=(student.input_mean, student.input_std), logits_dtype=dtype)
    manifest = teacher_manifest.find(folder, here)
    if teacher is None:
        if manifest is None:
            raise UserError(f"{folder} holds no logits of a teacher (no {teacher_manifest.NAME}). "
                            f"{FILL}")
        dtype = teacher_manifest.dtype_of(manifest, folder)
    manifest = manifest or here
    top, num_classes = settings["teacher_cache_top"], settings["num_classes"]
    files = RowFiles(folder, teacher_manifest.key_of(manifest), manifest["rows_per_epoch"],
                     columns_kept(num_classes, top, dtype))
    shown = checksum([teacher_manifest.images_checksum(val.samples.source, settings["data_path"]),
                      *(settings[name] for name in ("input_size", "crop_pct", "interpolation"))])
    return CachedTeacher(
        files, manifest, teacher, train.keys.places, folder / f"validation-{shown[:8]}.pt",
        options=options, num_classes=num_classes, top=top, num_epochs=settings["epochs"],
        epochs=settings["teacher_cache_epochs"] or settings["epochs"])
