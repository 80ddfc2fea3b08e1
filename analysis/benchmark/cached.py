"""A teacher cache in a temporary folder, filled and read as a run does it, for the benchmark of a
step."""
import io
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import engine
from data.batch import Batch
from models.distiller import FrozenTeacher
from models.kept_logits import columns_kept
from models.teacher_cache import CachedTeacher
from models.teacher_manifest import SAID
from utils.row_files import RowFiles

# Of an epoch, which comes back in turn: so many that opening its file is seldom, as in a run. And
# of the cache whose filling is timed.
UPDATES_KEPT = {"cpu": 32, "cuda": 64}
UPDATES_FILLED = {"cpu": 4, "cuda": 64}


class Batches(NamedTuple):
    """The batches of a benchmark as CachedTeacher.fill asks for them."""

    batches: Iterator[Batch]

    def start_at(self, epoch: int, batch: int, stop: int) -> Iterator[Batch]:
        return (next(self.batches) for _ in range(batch, stop))


class Cache(NamedTuple):
    teacher: CachedTeacher  # reads UPDATES_KEPT updates
    options: engine.StepOptions  # of a run with this cache
    fill: Callable[[], None]  # asks the network for UPDATES_FILLED updates, and writes them
    num_batches: int  # of these
    num_images: int


def open_cache(folder: Path, network: FrozenTeacher, batches: Iterator[Batch], mix: Callable,
               options: engine.StepOptions, *, batch_size: int, input_size: int, top: int) -> Cache:
    """What `network` says of `batches`, kept below `folder`. `top`: classes kept of an image, 0 for
    all."""
    columns = columns_kept(network.num_classes, top, network.logits_dtype(input_size, options))

    def opened(name: str, updates: int) -> CachedTeacher:
        epoch = options._replace(steps_per_epoch=updates, epochs_kept=1)
        number = updates * options.accum_steps
        teacher = CachedTeacher(
            RowFiles(folder / name, "benchmark", number * batch_size, columns),
            {"teacher_checksum": "benchmark", SAID: {}}, network,
            lambda batch, process: range(batch * batch_size, (batch + 1) * batch_size),
            folder / name / "validation.pt", options=epoch, num_classes=network.num_classes,
            top=top, epochs=1, num_epochs=1)
        teacher.begin(must_write=True)
        return teacher

    def fill(name: str, updates: int) -> None:
        for path in (folder / name).glob("epoch-*"):
            path.unlink()
        silence = io.StringIO()
        with closing(opened(name, updates)) as teacher, \
                redirect_stdout(silence), redirect_stderr(silence):
            teacher.fill(Batches(batches), mix, lambda: None)

    kept, filled = (number[options.device.type] for number in (UPDATES_KEPT, UPDATES_FILLED))
    fill("read", kept)
    teacher, num_batches = opened("read", kept), filled * options.accum_steps
    return Cache(teacher, teacher.options, lambda: fill("filled", filled), num_batches,
                 num_batches * batch_size)
