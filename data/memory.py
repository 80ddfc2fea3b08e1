"""Loaders whose images are decoded once and kept as bytes, in the machine's memory or on the device
that trains, where batches are augmented: --data-on ram and device. No worker processes.

The pixels of a batch are a function of (seed, epoch, index), as those from disk are, but with other
draws (data/batched.py), so that a run from disk cannot be continued with them.
"""
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.batch import Batch, ImageBatch
from data.batched import BatchedTransform, check_policy, send
from data.datasets import InMemory, check_memory
from data.images import StorageFault, to_rgb
from data.loader import EvalKeys, Key, Loader, check_storage
from utils.distributed import num_cores, num_processes_here, rank, world_size
from utils.log import print_from_any, progress
from utils.registry import UserError

PLACES = ("disk", "ram", "device")
READ_AT_ONCE = 1024  # images handed to the threads before their faults are looked at
# Of these Pillow tells the size without decoding, as it will be; None: made by the data set.
SIZE_IS_TOLD = (None, "JPEG", "PNG", "BMP", "PPM", "GIF")


def check_data_on(data_on: str, auto_augment: str, given: Collection[str]) -> None:
    """Raises UserError for a policy of --aa, or one of the flags `given`, with which batches cannot
    be made where --data-on says."""
    if data_on == "disk":
        return
    for name in ("num_workers", "fast_decode"):
        if name in given:
            raise UserError(f"--{name.replace('_', '-')} does nothing with --data-on {data_on}: "
                            "every image is decoded once, whole, by threads. Leave it out.")
    check_policy(auto_augment)


def in_memory(loader: Loader, data_on: str, device: torch.device) -> "MemoryLoader":
    """The loader of the same samples and keys whose images are kept in `ram` or on the `device`.

    Raises UserError for an augmentation that is only done to single images.
    """
    kind = KeptForEvaluation if isinstance(loader.keys, EvalKeys) else KeptForTraining
    return kind(loader, data_on, device)


class MemoryLoader(Loader):
    """Decodes at `prepare`, or when it is first asked for a batch.

    In place of an image that cannot be read stands the next one that can, for the whole run.
    """

    def __init__(self, loader: Loader, data_on: str, device: torch.device) -> None:
        # Without the parent's, which would make a loader of processes.
        self.samples, self.keys = loader.samples, loader.keys
        self.skip_bad_images, self.bad = loader.skip_bad_images, set()
        self.data_on, self.device = data_on, device
        self.source = self.samples.source
        self.place = device if data_on == "device" else torch.device("cpu")
        self.is_prepared = False
        if isinstance(self.source, InMemory):
            raise UserError("cache=ram keeps the decoded images in memory, and --data-on "
                            f"{data_on} would keep them once more. Leave one of the two out.")

    def prepare(self) -> None:
        if not self.is_prepared:
            self._keep()
            self.is_prepared = True

    def first_batch(self, most: int) -> tuple[ImageBatch, Tensor]:
        self.prepare()
        batch = self._batch(next(iter(self.keys))[:most])
        return batch.images, batch.labels

    def __iter__(self) -> Iterator[Batch]:
        self.prepare()
        for keys in self.keys:
            yield self._batch(keys)

    def close(self) -> None:
        """There are no processes to end."""

    def _keep(self) -> None:
        """Decode the images."""
        raise NotImplementedError

    def _batch(self, keys: list[Key]) -> Batch:
        raise NotImplementedError

    def _check_room(self, num_bytes: int) -> None:
        """Raises UserError where the place has not so many bytes left."""
        if self.place.type != "cuda":
            return check_memory(num_bytes * num_processes_here(), f"--data-on {self.data_on}")
        free, _ = torch.cuda.mem_get_info(self.place)
        if num_bytes > free:
            raise UserError(f"--data-on device needs {num_bytes / 2 ** 30:.1f} GiB for the decoded "
                            f"images, and {free / 2 ** 30:.1f} GiB of {self.place} are left. Pass "
                            "--data-on ram, or leave it out.")

    def _read(self, indices: Sequence[int], act: Callable[[int, Image.Image], None],
              description: str, num_broken: int = 0) -> list[int]:
        """act(place, image) for the images at `indices`, many at a time; the places among them of
        what cannot be read. Raises UserError unless that is to be skipped, and where nothing is
        left: `num_broken` of the other images are known to be unreadable."""
        def attempt(place: int) -> OSError | None:
            try:
                act(place, self.source.load(indices[place])[0])
            except OSError as error:
                return error
            return None

        unreadable, num_faults = [], 0  # of the storage, one after the other
        with ThreadPoolExecutor(max(1, num_cores() // num_processes_here())) as pool, \
                progress(description, len(indices), unit="image") as bar:
            for first in range(0, len(indices), READ_AT_ONCE):
                places = range(first, min(first + READ_AT_ONCE, len(indices)))
                for place, error in zip(places, pool.map(attempt, places)):
                    bar.update()
                    num_faults = num_faults + 1 if isinstance(error, StorageFault) else 0
                    check_storage(num_faults, self.source.name_of(indices[place]), error)
                    if error is not None and self._stays_unreadable(attempt, place, indices[place]):
                        unreadable.append(place)
        if num_broken + len(unreadable) == len(self.source):
            raise UserError(f"none of the {len(self.source)} images could be read; the first one "
                            f"tried was {self.source.name_of(indices[0])}.")
        return unreadable

    def _stays_unreadable(self, attempt: Callable[[int], OSError | None], place: int, index: int
                          ) -> bool:
        error = attempt(place)
        if error is None:
            print_from_any(f"{self.source.name_of(index)} could be read at a second try")
        elif not self.skip_bad_images or index % world_size() == rank():  # one process counts it
            self.report(index, error)
        return error is not None


class KeptForTraining(MemoryLoader):
    """Images whole, (H, W, 3) each, end to end in one tensor; batches of them, augmented."""

    def __init__(self, loader: Loader, data_on: str, device: torch.device) -> None:
        super().__init__(loader, data_on, device)
        self.transform = BatchedTransform(self.samples.transform)

    def _keep(self) -> None:
        indices = range(len(self.source))
        self.sizes = torch.zeros(len(indices), 2, dtype=torch.int64)  # height, width
        broken = self._read(indices, self._note_size, "read sizes")
        areas = self.sizes.prod(1)
        common = self.sizes[areas.argmax()]
        # Whether batches can be taken out of one tensor (number, H, W, 3).
        self.are_equal = bool(((self.sizes == common).all(1) | (areas == 0)).all())
        if self.are_equal:
            self.sizes[:] = common
        ends = (3 * self.sizes.prod(1)).cumsum(0)
        self.starts = [0, *ends.tolist()]
        self._check_room(self.starts[-1])
        self.bytes = torch.zeros(self.starts[-1], dtype=torch.uint8, device=self.place)
        readable = sorted({*indices} - {*broken})
        broken += [readable[place] for place in self._read(
            readable, lambda place, image: self._put(readable[place], image), "decode",
            len(broken))]
        self.stand_in = stand_ins(len(indices), broken)
        self.labels = torch.tensor([self.source.label(index) for index in indices])[self.stand_in]

    def _note_size(self, index: int, image: Image.Image) -> None:
        image = image if image.format in SIZE_IS_TOLD else to_rgb(image)
        self.sizes[index] = torch.tensor([image.height, image.width])
        if index % READ_AT_ONCE == READ_AT_ONCE - 1:  # rather at once than after a million files
            self._check_room(int(3 * self.sizes.prod(1).sum()))

    def _put(self, index: int, image: Image.Image) -> None:
        self._image(index).copy_(torch.from_numpy(np.array(to_rgb(image))))

    def _image(self, index: int) -> Tensor:
        start, end = self.starts[index:index + 2]
        return self.bytes[start:end].view(*self.sizes[index].tolist(), 3)

    def _batch(self, keys: list[Key]) -> Batch:
        epoch, indices = keys[0][0], torch.tensor([index for _, index in keys])
        own = indices % len(self.source)
        places = self.stand_in[own]
        drawn = self.transform.draw(self.samples.seed, epoch, indices, self.sizes[places])
        if self.device.type == "cpu":
            pixels = self.transform.one_by_one([self._image(place) for place in places.tolist()],
                                               drawn)
        else:
            pixels, boxes = self._gather(places, drawn.boxes)
            drawn = drawn.to(self.device)
            pixels = self.transform.at_once(pixels, send(boxes, self.device), drawn)
        return Batch(ImageBatch(pixels, drawn.erased, drawn.num_erased),
                     send(self.labels[own], self.device), indices, places == own)

    def _gather(self, places: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, H, W, 3) on the device, in which is what the boxes cut out of those at
        `places`, and the boxes (N, 4) counted from their corners."""
        is_pinned = self.place.type != self.device.type == "cuda"
        if self.are_equal:
            images = self.bytes.view(-1, *self.sizes[0].tolist(), 3)
            if not is_pinned:
                return images.index_select(0, send(places, self.place)).to(self.device), boxes
            pixels = torch.empty(len(places), *images.shape[1:], dtype=torch.uint8, pin_memory=True)
            torch.index_select(images, 0, places, out=pixels)
        else:
            first = boxes[:, :2].clamp_min(0)
            extent = torch.minimum(boxes[:, :2] + boxes[:, 2:], self.sizes[places]) - first
            extent.clamp_min_(0)
            pixels = torch.zeros(len(places), *extent.amax(0).tolist(), 3, dtype=torch.uint8,
                                 device=self.place, pin_memory=is_pinned)
            for row, (place, (top, left), (height, width)) in enumerate(
                    zip(places.tolist(), first.tolist(), extent.tolist())):
                pixels[row, :height, :width] = self._image(place)[
                    top:top + height, left:left + width]
            boxes = torch.cat([boxes[:, :2] - first, boxes[:, 2:]], 1)
        return pixels.to(self.device, non_blocking=True), boxes


class KeptForEvaluation(MemoryLoader):
    """This process's share of the images as the network sees them, (number, size, size, 3)."""

    def _keep(self) -> None:
        transform, indices = self.samples.transform, self.keys.indices
        size = transform(Image.new("RGB", (8, 8))).shape[-1]
        shape = (len(indices), size, size, 3)
        self._check_room(int(np.prod(shape)))
        self.pixels = torch.zeros(shape, dtype=torch.uint8, device=self.place)

        def put(place: int, image: Image.Image) -> None:
            self.pixels[place] = transform(image).permute(1, 2, 0)

        self.is_readable = torch.ones(len(indices), dtype=torch.bool)
        self.is_readable[self._read(indices, put, "decode")] = False
        self.labels = torch.tensor([self.source.label(index) for index in indices],
                                   dtype=torch.int64)

    def _batch(self, keys: list[Key]) -> Batch:
        indices = [index for _, index in keys]
        first = self.keys.indices.index(indices[0])
        rows = slice(first, first + len(keys))
        pixels, labels = self.pixels[rows], self.labels[rows]
        if self.place != self.device:
            pixels = send(pixels, self.device)
        images = replace(ImageBatch.blank(0, 1), pixels=pixels.permute(0, 3, 1, 2))
        return Batch(images, send(labels, self.device), torch.tensor(indices),
                     self.is_readable[rows])


def stand_ins(number: int, broken: Sequence[int]) -> Tensor:
    """(number,) int64: for every image itself, or the next one that is not broken."""
    found = torch.arange(number)
    missing = {*broken}
    for index in broken:
        while int(found[index]) in missing:
            found[index] = (found[index] + 1) % number
    return found
