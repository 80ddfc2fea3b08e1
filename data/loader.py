"""Batches for training and for evaluation, each sample's randomness a function of its key."""
import math
import signal
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.batch import Batch, ImageBatch, Sample, collate
from data.datasets import ImageSource
from data.images import StorageFault, to_rgb
from data.transforms import Transform
from utils.distributed import num_cores, rank, world_size
from utils.log import print_from_any
from utils.registry import UserError
from utils.rng import generator, seeded

Key = tuple[int, int]  # (epoch, index); an image's repetition number r is index + r * samples
REPEATS = 3  # of repeated augmentation, as in DeiT
MOST_FAULTS = 3  # of the storage, one after the other, before it is given up
FREED_BLOCKS = 8  # images of a worker whose memory is used again


class Samples(Dataset):
    """Key (epoch, index) -> Sample.

    The transform's randomness depends on (seed, epoch, index) alone. In place of an image that
    cannot be read stands the next one that can, so that batches keep their shape, and the sample
    says so. Whether that is an error is for the loader to decide.
    """

    def __init__(self, source: ImageSource, transform: Transform, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        first, num_faults, reason = index % len(self.source), 0, ""
        for offset in range(len(self.source)):
            with seeded(self.seed, "augment", epoch, index):
                try:
                    image, label = self.source.load((first + offset) % len(self.source))
                    image = self.transform.read(image)
                except OSError as error:
                    reason = reason or str(error)
                    num_faults += isinstance(error, StorageFault)
                    check_storage(num_faults, self.source.name_of(first), error)
                    continue
                pixels, erasure = self.transform.finish(image)
                return Sample(pixels, erasure, label, index, readable=offset == 0)
        raise UserError(f"none of the {len(self.source)} images could be read; the first one tried "
                        f"was {self.source.name_of(first)} ({reason}).")


def check_storage(num_faults: int, name: str, error: OSError) -> None:
    """Raises UserError after so many faults of the storage, of which `error` is the last, from the
    image `name` on."""
    if num_faults >= MOST_FAULTS:
        raise UserError(f"{num_faults} images after {name} could not be read in several tries "
                        f"({error}): what they lie on fails, not they. Look at the disk or the "
                        "network, then start again.") from None


class TrainKeys:
    """Batches of keys of this process for one epoch, from any micro-batch on, without touching the
    samples before it. The global batches do not depend on how many processes share them.

    `repeated`: repeated augmentation (Hoffer et al. 2020, arXiv 1901.09335). An epoch takes a part
    of the images, each REPEATS times in a row with other augmentations; as in DeiT, neighbours go
    to different processes.
    """

    def __init__(self, num_samples: int, batch_size: int, num_batches: int, seed: int,
                 repeated: bool = False) -> None:
        self.num_samples, self.batch_size, self.num_batches = num_samples, batch_size, num_batches
        self.seed, self.repeated = seed, repeated
        self.epoch, self.start, self.stop = 0, 0, num_batches

    def __len__(self) -> int:
        return self.stop - self.start

    def places(self, batch: int, process: int) -> range:
        """Where the images of a process's micro-batch stand in the epoch's order, of which the
        micro-batches of all processes together are a stretch."""
        number = self.batch_size * world_size()
        if self.repeated:
            first = batch * number + process
            return range(first, first + number, world_size())
        first = batch * number + process * self.batch_size
        return range(first, first + self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        order = torch.randperm(self.num_samples,
                               generator=generator(self.seed, "shuffle", self.epoch))
        for batch in range(self.start, self.stop):
            places = torch.tensor(self.places(batch, rank()))
            if self.repeated:
                indices = order[places // REPEATS] + places % REPEATS * self.num_samples
            else:
                indices = order[places]
            yield [(self.epoch, index) for index in indices.tolist()]


class EvalKeys:
    """Every sample exactly once over all processes: rank r takes r, r + world, r + 2 world, ..."""

    epoch = 0

    def __init__(self, num_samples: int, batch_size: int) -> None:
        self.indices = range(rank(), num_samples, world_size())
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, len(self.indices), self.batch_size):
            yield [(self.epoch, index) for index in self.indices[first:first + self.batch_size]]


class Loader:
    """Iterates over the batches that `keys` names.

    An unreadable image ends the run with its name unless `skip_bad_images`; then it is reported
    once, and the batch says where another stands in for it. What can be read at a second try is in
    its place again. More workers than processor cores are not started.
    """

    def __init__(self, samples: Samples, keys: TrainKeys | EvalKeys, *, num_workers: int,
                 skip_bad_images: bool = False, pin_memory: bool = False) -> None:
        self.samples, self.keys, self.skip_bad_images = samples, keys, skip_bad_images
        self.bad: set[int] = set()
        num_workers = min(num_workers, num_cores())
        self.loader = DataLoader(samples, batch_sampler=keys, num_workers=num_workers,
                                 persistent_workers=num_workers > 0, collate_fn=_collate,
                                 pin_memory=pin_memory, worker_init_fn=_start_worker)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_samples(self) -> int:
        return len(self.samples.source)

    def start_at(self, epoch: int, batch: int, stop: int | None = None) -> "Loader":
        """The loader itself, its next iteration starting there and ending before the micro-batch
        `stop`; None: with the epoch."""
        self.keys.epoch, self.keys.start = epoch, batch
        self.keys.stop = self.keys.num_batches if stop is None else stop
        return self

    def first_batch(self, most: int) -> tuple[ImageBatch, Tensor]:
        """Images and labels that the iteration begins with, `most` at most, without beginning it.
        """
        keys = next(iter(self.keys))[:most]
        batch = self._checked(collate([self.samples[key] for key in keys]))
        return batch.images, batch.labels

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in self.loader:
                yield self._checked(batch)
        except UserError as error:  # from a worker it comes wrapped in the worker's traceback
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None

    def prepare(self) -> None:
        """Do what the first batch would wait for: nothing, as images are read when they are asked
        for."""

    def close(self) -> None:
        """End the worker processes."""
        if self.loader._iterator is not None:  # what keeps persistent workers, hence the underscore
            self.loader._iterator._shutdown_workers()
            self.loader._iterator = None

    def report(self, index: int, error: OSError) -> None:
        """Count and print an unreadable image. Raises UserError unless these are to be skipped."""
        message = f"cannot read the image {self.samples.source.name_of(index)} ({error})"
        if not self.skip_bad_images:
            raise UserError(f"{message}. Repair or remove it, or pass --skip-bad-images.") from None
        self.bad.add(index)
        print_from_any(f"{message}; skipped, {len(self.bad)} so far")

    def _checked(self, batch: Batch) -> Batch:
        """The batch, read once more where what could not be read by now can be. Reports each
        unreadable image once. Raises UserError unless they are to be skipped."""
        source, has_passed = self.samples.source, False
        for index in (batch.indices[~batch.readable] % len(source)).tolist():
            if index in self.bad:
                continue
            try:
                to_rgb(source.load(index)[0])
            except OSError as error:
                self.report(index, error)
            else:
                print_from_any(f"{source.name_of(index)} could be read at a second try")
                has_passed = True
        if not has_passed:
            return batch
        keys = [(self.keys.epoch, index) for index in batch.indices.tolist()]
        return self._checked(collate([self.samples[key] for key in keys]))


def train_loader(source: ImageSource, transform: Transform, *, batch_size: int, num_batches: int,
                 seed: int, num_workers: int, skip_bad_images: bool, pin_memory: bool,
                 repeated_aug: bool = False) -> Loader:
    """`num_batches` batches of `batch_size` per process and epoch; the rest of the epoch's samples
    is left out, as in the published runs."""
    keys = TrainKeys(len(source), batch_size, num_batches, seed, repeated_aug)
    return Loader(Samples(source, transform, seed), keys, num_workers=num_workers,
                  skip_bad_images=skip_bad_images, pin_memory=pin_memory)


def eval_loader(source: ImageSource, transform: Transform, *, batch_size: int, num_workers: int,
                skip_bad_images: bool = False, pin_memory: bool = False) -> Loader:
    """Every sample once, in order, shared among the processes without padding."""
    return Loader(Samples(source, transform, seed=0), EvalKeys(len(source), batch_size),
                  num_workers=num_workers, skip_bad_images=skip_bad_images, pin_memory=pin_memory)


def _collate(samples: Sequence[Sample]) -> Batch:
    batch = collate(samples)
    if get_worker_info() is not None:
        # Here a lack of shared memory is an error that reaches the main process. The thread that
        # hands batches over, which would do it otherwise, drops the batch, and the loader waits.
        images = batch.images
        for tensor in (images.pixels, images.erased, batch.labels, batch.indices, batch.readable):
            tensor.share_memory_()
    return batch


def _start_worker(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group, but the main process needs its
    # workers until it has saved. It ends them; come what may, they end a minute later.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))
    keep_freed_memory(FREED_BLOCKS)


def keep_freed_memory(num_blocks: int) -> None:
    """Let Pillow use the memory of freed images again instead of asking the system for new pages,
    at 16 MiB a block at most. 0, Pillow's default, gives it back."""
    Image.core.set_blocks_max(num_blocks)
