"""What a teacher said is kept: the same bits come back, or a sentence says why not."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import train_kd
from data.loader import TrainKeys
from models import teacher_manifest
from models.base import ModelOutput
from models.kept_logits import columns_kept, compact, dense, describe_saving
from models.teacher_cache import CachedTeacher
from tests.helpers import make_batch, make_options
from tests.test_train import REPOSITORY, Killed, assert_identical, kill_at, torchrun
from utils import files, lock, row_files
from utils.checkpoint import load_file, save_atomically
from utils.registry import UserError
from utils.rng import Position, position_of
from utils.row_files import RowFiles, within

CLASSES, BATCH, NUM_BATCHES = 6, 4, 6
ROWS = BATCH * NUM_BATCHES


# What is kept of logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_logits_come_back_to_the_bit(dtype):
    logits = torch.randn(5, 7).to(dtype)
    assert dense(compact(logits, 0), 7) is logits


@pytest.mark.parametrize("num_classes, dtype", [(40, torch.int16), (2 ** 15 + 1, torch.int32)])
def test_the_likeliest_classes_are_kept_and_the_rest_is_spread_evenly(num_classes, dtype):
    logits = 4 * torch.randn(3, num_classes, generator=torch.Generator().manual_seed(0))
    kept = compact(logits, 5)
    assert {name: (values.dtype, values.shape[1]) for name, values in kept.items()} == (
        columns_kept(num_classes, 5, torch.float32))
    assert kept["classes"].dtype is dtype
    probs, again = logits.softmax(1), dense(kept, num_classes).exp()
    for image in range(3):
        top = probs[image].topk(5).indices
        others = torch.ones(num_classes, dtype=torch.bool).index_fill(0, top, False)
        torch.testing.assert_close(again[image, top], probs[image, top], rtol=5e-3, atol=0)
        rest = probs[image, others].double().sum() / (num_classes - 5)
        torch.testing.assert_close(again[image, others].double(),
                                   rest.expand(num_classes - 5), rtol=1e-5, atol=0)


def test_a_teacher_that_is_sure_leaves_finite_numbers():
    logits = torch.zeros(1, 20)
    logits[0, 3] = 500  # the others' probabilities are 0 in float32
    assert dense(compact(logits, 4), 20).isfinite().all()


# Rows


@pytest.mark.parametrize("repeated", [False, True])
def test_places_tile_the_order_whatever_the_processes(repeated, monkeypatch):
    def keys_of(rank: int, world: int, batch_size: int) -> TrainKeys:
        monkeypatch.setattr("data.loader.world_size", lambda: world)
        monkeypatch.setattr("data.loader.rank", lambda: rank)
        return TrainKeys(60, batch_size, 24 // world // batch_size, 5, repeated)

    seen = []
    for world, batch_size in ((1, 4), (2, 2), (3, 4)):
        order: dict[int, tuple] = {}
        for rank in range(world):
            keys = keys_of(rank, world, batch_size)
            for number, batch in enumerate(keys):
                places = keys.places(number, rank)
                assert {*places} <= {*range(number * world * batch_size,
                                            (number + 1) * world * batch_size)}
                order.update(zip(places, batch))
        assert sorted(order) == [*range(24)]
        seen.append(order)
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("rows", [range(3, 11), range(2, 23, 3)])
def test_rows_within_a_part(rows):
    for start in range(0, 25, 3):
        for stop in range(start, 30, 4):
            part = range(start, stop)
            assert [*rows[within(rows, part)]] == [row for row in rows if row in part]


class Network:
    """A teacher whose logits are the first pixels of an image."""

    def __init__(self) -> None:
        self.num_asked = 0

    def teach(self, images: Tensor, position: Position) -> ModelOutput:
        self.num_asked += 1
        return ModelOutput(images.flatten(1)[:, :CLASSES] * 3, [])


class Images:
    """A loader: images that are a function of their epoch and place."""

    def __init__(self) -> None:
        self.num_read = 0

    def start_at(self, epoch: int, batch: int, stop: int) -> Iterator:
        for number in range(batch, stop):
            self.num_read += 1
            yield make_batch(images_of(epoch, number), torch.zeros(BATCH, dtype=torch.long))


def images_of(epoch: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * epoch + batch)
    return torch.randn(BATCH, 3, 4, 4, generator=generator)


def opened(folder: Path, network: Network | None, *, top: int = 0, epochs: int = 2,
           key: str = "key", **begin) -> CachedTeacher:
    """An epoch of 24 rows in blocks of 10, so that micro-batches of 4 stand in two of them."""
    kept = RowFiles(folder, key, ROWS, columns_kept(CLASSES, top, torch.float32))
    kept.rows_per_block, kept.blocks_per_epoch = 10, 3
    manifest = {"teacher_checksum": "0", teacher_manifest.SAID: {}}
    teacher = CachedTeacher(
        kept, manifest, network, lambda batch, process: range(batch * BATCH, (batch + 1) * BATCH),
        folder / "validation.pt", num_classes=CLASSES, top=top, epochs=epochs, num_epochs=2,
        options=make_options(steps_per_epoch=NUM_BATCHES, epochs_kept=epochs % 2))
    teacher.begin(**begin)
    return teacher


def run(folder: Path, network: Network | None, *, first: int = 0, last: int = 2 * NUM_BATCHES,
        **options) -> list[Tensor]:
    """The logits of the micro-batches `first` to `last` of two epochs, from the folder or not."""
    said = []
    with closing(opened(folder, network, **options)) as teacher:
        for step in range(first, last):
            position = position_of(step, 0, 0, steps_per_epoch=NUM_BATCHES, accum_steps=1,
                                   epochs_kept=options.get("epochs", 2))
            said.append(teacher.teach(images_of(position.epoch, position.batch), position).logits)
    return said


def asked(epochs: int = 2, top: int = 0) -> list[Tensor]:
    """The same without a cache."""
    logits = [images_of(step // NUM_BATCHES % epochs, step % NUM_BATCHES).flatten(1)[:, :CLASSES]
              * 3 for step in range(2 * NUM_BATCHES)]
    return [dense(compact(values, top), CLASSES) for values in logits]


def fill(folder: Path, *, images: Images | None = None, mix=None, **options) -> int:
    with closing(opened(folder, Network(), must_write=True, **options)) as teacher:
        mix = mix or (lambda images, labels, position: (images, labels))
        return teacher.fill(images or Images(), mix, lambda: write_evaluation(teacher))


def write_evaluation(teacher: CachedTeacher) -> None:
    teacher.evaluated(lambda network: (12.5, torch.tensor([1, -1, 3])))


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(left, right, strict=True))


def blocks(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("epoch-*"))}


@pytest.mark.parametrize("top", [0, 2])
@pytest.mark.parametrize("epochs", [2, 1])
def test_what_is_said_filled_and_read_is_the_same(tmp_path, top, epochs):
    network, expected = Network(), asked(epochs, top)
    options = {"top": top, "epochs": epochs}
    assert same(run(tmp_path / "a", network, **options), expected)
    assert network.num_asked == epochs * NUM_BATCHES  # of one kept epoch the second turn is read
    assert same(run(tmp_path / "a", network, **options), expected)
    assert network.num_asked == epochs * NUM_BATCHES
    assert fill(tmp_path / "b", **options) == 0
    assert same(run(tmp_path / "b", None, **options), expected)
    assert blocks(tmp_path / "a") == blocks(tmp_path / "b") and len(blocks(tmp_path / "a")) == (
        3 * epochs)


def test_any_number_of_processes_and_batches_reads_the_same_rows(tmp_path, monkeypatch):
    """As with --mixup-mode pair."""
    assert fill(tmp_path) == 0
    everything = torch.cat(asked()[:NUM_BATCHES])
    monkeypatch.setattr("models.teacher_cache.world_size", lambda: 2)
    for process in range(2):
        with closing(opened(tmp_path, None)) as teacher:
            teacher.places = lambda batch, process: range(6 * batch + process, 6 * batch + 6, 2)
            teacher.rows_per_batch, teacher.batches_per_epoch = 6, 4
            for batch in range(4):
                position = Position(0, batch, batch, 0, process)
                logits = teacher.teach(torch.zeros(3, 3, 4, 4), position).logits
                assert logits.equal(everything[6 * batch + process:6 * batch + 6:2])


def test_a_run_that_begins_within_a_block_writes_the_next_ones(tmp_path):
    network = Network()
    assert same(run(tmp_path, network, first=1), asked()[1:])
    assert len(blocks(tmp_path)) == 5 and "epoch-0000-block-0000.pt" not in blocks(tmp_path)
    images = Images()
    assert fill(tmp_path, images=images) == 0
    assert images.num_read == 3  # the micro-batches with rows 0 to 9
    assert same(run(tmp_path, None), asked())


def test_a_block_of_which_some_rows_are_passed_is_not_written(tmp_path):
    with closing(opened(tmp_path, Network(), epochs=1, must_write=True)) as teacher:
        teacher.files.rows_per_block = 9  # none begins with a micro-batch
        teacher.files.faulty = lambda epoch: [0, 2]  # the first process alone sees block 1
        assert teacher.fill(Images(), lambda images, labels, position: (images, labels),
                            lambda: None) == 0
    assert [*blocks(tmp_path)] == ["epoch-0000-block-0000.pt", "epoch-0000-block-0002.pt"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, Killed])
def test_filling_that_was_stopped_goes_on(tmp_path, how, capsys):
    def mix(images: Tensor, labels: Tensor, position: Position) -> tuple[Tensor, Tensor]:
        if position.epoch == 1 and position.batch == 3:
            if how is Killed:
                raise Killed
            os.kill(os.getpid(), how)
        return images, labels

    if how is Killed:
        with pytest.raises(Killed):
            fill(tmp_path, mix=mix)
    else:
        assert fill(tmp_path, mix=mix) == 143
        assert "stopped on request, to be continued: teacher cache: " in capsys.readouterr().out
    assert len(blocks(tmp_path)) == 4
    before, images = blocks(tmp_path), Images()
    (tmp_path / "epoch-0001-block-0001.pt.node-7.tmp").touch()  # as a kill while writing leaves
    assert fill(tmp_path, images=images) == 0
    assert images.num_read == 4  # with rows 10 to 23 of the last epoch
    assert before.items() <= blocks(tmp_path).items() and len(blocks(tmp_path)) == 6
    assert same(run(tmp_path, None), asked())


# Faults


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def overwrite(path: Path) -> None:
    path.write_text("no archive")


def flip(path: Path) -> None:
    """A bit of the logits."""
    content, values = bytearray(path.read_bytes()), load_file(path)["logits"].numpy().tobytes()
    content[content.index(values) + 5] ^= 4
    path.write_bytes(content)


def of_another_format(path: Path) -> None:
    save_atomically({**stripped(load_file(path)), "format": 99}, path)


def of_another_teacher(path: Path) -> None:
    save_atomically({**stripped(load_file(path)), "key": "another"}, path)


def of_another_epoch(path: Path) -> None:
    shutil.copy(path.with_name(path.name.replace("epoch-0001", "epoch-0000")), path)


def without_checksums(path: Path) -> None:
    torch.save(stripped(load_file(path)), path)


def stripped(content: dict) -> dict:
    return {name: value for name, value in content.items() if name != "checksums"}


@pytest.mark.parametrize("fault, telling", [
    (Path.unlink, "is not there"), (cut, "damaged or not whole"),
    (overwrite, "it is no archive of torch.save"), (flip, "sha256 differs"),
    (of_another_format, "its format is 99, expected 1"),
    (of_another_teacher, "its key is another"), (of_another_epoch, "its epoch is 0, expected 1"),
    (without_checksums, "no file of this program")])
def test_a_fault_of_a_block_is_noticed_before_a_number_is_used(tmp_path, fault, telling, capsys):
    """It is computed and written anew where there is a teacher, and refused where there is none."""
    assert fill(tmp_path) == 0
    before, path = blocks(tmp_path), tmp_path / "epoch-0001-block-0001.pt"
    fault(path)
    said = []
    if fault is Path.unlink:  # told before anything begins
        with pytest.raises(UserError, match=r"lacks 1 of the files .* epoch-0001-block-0001.pt"):
            opened(tmp_path, None)
    else:
        with closing(opened(tmp_path, None)) as teacher, \
                pytest.raises(UserError, match=f"{telling}.*--fill-cache in place of"):
            for step in range(2 * NUM_BATCHES):
                position = position_of(step, 0, 0, steps_per_epoch=NUM_BATCHES, accum_steps=1)
                said.append(teacher.teach(torch.zeros(BATCH, 3, 4, 4), position).logits)
        assert same(said, asked()[:NUM_BATCHES + 2])
    capsys.readouterr()
    shutil.copytree(tmp_path, tmp_path / "copy")
    network = Network()
    assert same(run(tmp_path, network), asked()) and network.num_asked == 3
    if fault is not Path.unlink:
        printed = capsys.readouterr().out
        assert telling in printed and "asked again, and the file written anew." in printed
    assert blocks(tmp_path) == before
    images = Images()
    assert fill(tmp_path / "copy", images=images) == 0 and images.num_read == 3
    assert blocks(tmp_path / "copy") == before


def test_a_block_is_checked_once_and_again_when_it_was_replaced(tmp_path, monkeypatch):
    assert fill(tmp_path, epochs=1) == 0
    checked = []
    original = row_files.checksums
    monkeypatch.setattr(row_files, "checksums", lambda content: checked.append(
        content["block"]) or original(content))
    assert same(run(tmp_path, None, epochs=1), asked(1)) and sorted(checked) == [0, 1, 2]
    kept = opened(tmp_path, None, epochs=1).files
    kept.read(0, 0)
    flip(kept.path_of(0, 0))
    with pytest.raises(UserError, match="sha256 differs"):
        kept.read(0, 0)


@pytest.mark.parametrize("number, telling", [
    (errno.ENOSPC, "Make room"), (errno.EROFS, "Make the file system writable")])
@pytest.mark.parametrize("written", ["filled_by.txt", "manifest.yaml", "epoch-0000-block-0001.pt"])
def test_a_disk_that_takes_nothing_ends_the_keeping_and_not_the_run(
        tmp_path, number, telling, written, monkeypatch, capsys):
    def open_(path, mode="r", **options):
        if "r" not in mode and Path(path).name.startswith(written):
            raise OSError(number, os.strerror(number), str(path))
        return open(path, mode, **options)

    for module in (lock, files):
        monkeypatch.setattr(module, "open", open_, raising=False)
    assert same(run(tmp_path, Network()), asked())
    printed = capsys.readouterr().out
    assert printed.count("warning: from here on nothing is kept") == 1 and telling in printed
    assert len(blocks(tmp_path)) == (written == "epoch-0000-block-0001.pt")
    with pytest.raises(UserError, match=telling):
        fill(tmp_path)


def test_logits_that_are_not_numbers_are_never_written(tmp_path):
    class Broken(Network):
        def teach(self, images: Tensor, position: Position) -> ModelOutput:
            return ModelOutput(super().teach(images, position).logits / 0, [])

    with closing(opened(tmp_path, Broken(), must_write=True)) as teacher, \
            pytest.raises(UserError, match="NaN or infinite"):
        teacher.fill(Images(), lambda images, labels, position: (images, labels), lambda: None)
    assert not blocks(tmp_path)


HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from utils.lock import FolderLock
lock = FolderLock(Path({folder!r}), "manifest.yaml", name="filled_by.txt")
lock.acquire("1 process(es)")
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(lock.fcntl is None, reason="this system has no such locks")
def test_one_run_fills_a_cache_and_the_other_only_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    run(tmp_path, Network(), last=3)  # a block
    code = HOLDER.format(root=str(REPOSITORY), folder=str(tmp_path))
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        network = Network()
        assert same(run(tmp_path, network), asked()) and len(blocks(tmp_path)) == 1
        assert network.num_asked == 2 * NUM_BATCHES - 2  # of the third, two rows were there
        (line,) = capsys.readouterr().out.splitlines()
        assert f"is being filled by process {holder.pid} on " in line and "keeps nothing" in line
        with pytest.raises(UserError, match="in use by process .* or set another --teacher-cache"):
            fill(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    assert fill(tmp_path) == 0
    capsys.readouterr()
    assert same(run(tmp_path, Network()), asked())  # all is there: nobody holds it
    assert not capsys.readouterr().out


def test_the_result_on_validation_images_is_kept(tmp_path, capsys):
    assert fill(tmp_path) == 0
    with closing(opened(tmp_path, None)) as teacher:
        acc1, classes = teacher.evaluated(None)
        assert acc1 == 12.5 and classes.tolist() == [1, -1, 3]
    path = tmp_path / "validation.pt"
    cut(path)
    with closing(opened(tmp_path, None)) as teacher, \
            pytest.raises(UserError, match="validation.pt.*--fill-cache in place of"):
        teacher.evaluated(None)
    with closing(opened(tmp_path, Network())) as teacher:
        write_evaluation(teacher)
    assert "The teacher is asked again" in capsys.readouterr().out
    path.unlink()
    with pytest.raises(UserError, match="lacks 1 of the files .* validation.pt"):
        opened(tmp_path, None)


def test_what_it_saves_is_arithmetic():
    text = describe_saving(0.5, 1.0, batches_per_epoch=720, num_epochs=10, epochs_kept=5,
                           missing=0.5)
    for words in ("(500.0 ms)", "(1000.0 ms)", "15 min to fill what is missing", "takes 3 h with",
                  "saves 1 h of it", "costs what 0.50 student(s) save, so it pays with the first"):
        assert words in text, words


# Whose logits they are


def settings_of(**changes) -> dict:
    """Of a run, as train_kd resolves them."""
    args = train_kd.build_parser().parse(["--teacher", "slak_nano", "--teacher-weights", "random"])
    settings = train_kd.plain(args) | {
        "num_classes": 10, "train_size": 160, "world_size": 1, "git": "x", "steps_per_epoch": 10,
        "accum_steps": 1, "batch_size": 16, "effective_batch": 16, "compile_teacher": False,
        "teacher_checksum": "0"}
    return settings | changes


class Sources:
    """A data set of two images."""

    classes = ["a", "b"]

    def __init__(self, folder: str = "/data", names: str = "xy") -> None:
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return 2

    def label(self, index: int) -> int:
        return index

    def name_of(self, index: int) -> str:
        return f"{self.folder}/train/{self.names[index]}.png"


class Described:
    """Stands for a FrozenTeacher."""

    def describe_input(self) -> dict:
        return {"mean": [0.5], "std": [0.5], "size": None, "filter": "bicubic"}


HERE = Sources()


def manifest_of(*, images: Sources = HERE, mean: tuple = (0.5,), **changes) -> dict:
    settings = settings_of(**{"data_path": "/data", **changes})
    return teacher_manifest.describe(
        settings, teacher=Described(), images=images, normalisation=(mean, (0.5,)),
        device=torch.device("cpu"), logits_dtype=torch.float32)


def refusal(folder: Path, **changes) -> str:
    """Of a run with these changes at the cache of one without; empty where it may use it."""
    if not (folder / "manifest.yaml").exists():
        teacher_manifest.write(manifest_of(), folder)
    try:
        teacher_manifest.find(folder, manifest_of(**changes))
    except UserError as error:
        return str(error)
    return ""


CHANGES = {"aa": "none", "amp": "bf16", "hflip": 0.0, "input_size": 64, "mixup": 0.0, "seed": 1,
           "repeated_aug": True, "reprob": 0.1, "scale": [0.5, 1.0], "teacher": ["slak_t"],
           "teacher_cache_top": 3, "teacher_checksum": "1", "mixup_mode": "pair", "data_on": "ram",
           "fast_decode": True, "batch_size": 8, "world_size": 2, "accum_steps": 2,
           "data_set": ["outlines", "seed=1"], "num_classes": 11, "mean": (0.4,),
           "images": Sources(names="yx")}


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_the_logits_is_compared(name, tmp_path):
    told = {"mean": "student_mean"}.get(name, name)
    message = refusal(tmp_path, **{name: CHANGES[name]})
    assert f"keeps the logits of another run ({told}: " in message or f"; {told}: " in message
    assert " there, " in message and message.endswith("name another folder with --teacher-cache.")


def test_all_else_is_free_and_is_a_setting_of_a_run(tmp_path):
    settings = settings_of()
    assert teacher_manifest.FREE <= settings.keys()
    told_otherwise = {"teacher_checksum", "steps_per_epoch", "data_path"}
    for name in sorted(teacher_manifest.FREE - told_otherwise):
        assert not refusal(tmp_path, **{name: "changed"}), name
    assert not refusal(tmp_path, images=Sources("/moved"), data_path="/moved/")
    assert not refusal(tmp_path, data_set=["imagefolder", "cache=ram"])


@pytest.mark.parametrize("changes", [{"mixup_mode": "pair"}, {"mixup": 0.0, "cutmix": 0.0},
                                     {"mixup_prob": 0.0}])
def test_where_batches_are_not_mixed_as_a_whole_their_size_is_free(tmp_path, changes):
    teacher_manifest.write(manifest_of(**changes), tmp_path)
    assert not refusal(tmp_path, batch_size=8, world_size=2, **changes)
    assert "rows_per_epoch: 160 there, 320 here" in refusal(tmp_path, effective_batch=32, **changes)


def test_without_the_network_its_file_is_compared(tmp_path, capsys):
    weights, cache = tmp_path / "teacher.pth", tmp_path / "cache"
    cache.mkdir()
    weights.write_bytes(b"weights")
    teacher_manifest.write(manifest_of(teacher_weights=str(weights)), cache)

    def refused(**changes) -> str:
        changes = {"teacher_weights": str(weights), **changes}
        settings = settings_of(data_path="/data", teacher_checksum=None, **changes)
        here = teacher_manifest.describe(
            settings, teacher=None, images=HERE, normalisation=((0.5,), (0.5,)),
            device=torch.device("cpu"), logits_dtype=None)
        try:
            teacher_manifest.find(cache, here)
        except UserError as error:
            return str(error)
        return ""

    assert not refused()
    assert "teacher_weights_key: None there, model_ema here" in refused(
        teacher_weights_key="model_ema")
    assert "teacher_weights: " in refused(teacher_weights="published")
    copy = tmp_path / "copy.pth"
    shutil.copy(weights, copy)
    assert not refused(teacher_weights=str(copy)) and not capsys.readouterr().out
    weights.write_bytes(b"others")
    assert "teacher_file_sha256: " in refused()
    weights.unlink()
    assert not refused()
    assert "cannot be told" in capsys.readouterr().out


def test_other_software_is_told_and_not_refused(tmp_path, capsys):
    assert not refusal(tmp_path) and not capsys.readouterr().out
    manifest = manifest_of()
    manifest["said"] |= {"torch": "1.0", "device": "cuda"}
    manifest["said"].pop("pillow")
    teacher_manifest.write(manifest, tmp_path)
    assert not refusal(tmp_path)
    printed = capsys.readouterr().out
    assert f"(device: cuda there, cpu here; torch: 1.0 there, {torch.__version__} here)" in printed


@pytest.mark.parametrize("text, telling", [("format: [", "not readable YAML"), ("a: 1", "is not "
                                           "the manifest of a teacher cache")])
def test_a_manifest_that_is_none_is_refused(text, telling, tmp_path):
    (tmp_path / "manifest.yaml").write_text(text)
    with pytest.raises(UserError, match=f"manifest.yaml: .*{telling}"):
        teacher_manifest.find(tmp_path, manifest_of())


# The program

SMALL = ["--data-set", "outlines", "train_size=80", "val_size=11", "--input-size", "32",
         "--batch-size", "4", "--effective-batch", "8", "--epochs", "2", "--warmup-epochs", "1",
         "--num-workers", "0", "--lr", "1e-3", "--teacher", "slak_pico", "dims=8,16",
         "--teacher-weights", "random", "--student", "slak_pico", "dims=8,24",
         "--model-ema", "--model-ema-decay", "0.9", "--loss", "kd", "alpha=0.5", "--loss", "nkd",
         "--loss", "dkd", "--save-freq", "0"]


def train(folder: Path, *words: str) -> int:
    return train_kd.main([*SMALL, *words, "--output-dir", str(folder)])


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    """All that a run leaves, but for its settings and speed."""
    saved = load_file(folder / "checkpoint-last.pth")
    records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    for record in records:
        record.pop("images_per_second"), record.pop("peak_memory_gib", None)
    return {name: value for name, value in saved.items()
            if name not in ("args", "git", "checksums")}, records


def assert_same_runs(left: Path, *others: Path) -> None:
    state, records = outcome(left)
    assert {"train_kd", "train_nkd", "train_dkd", "train_teacher_acc1", "agreement", "teacher_acc1",
            "test_acc1_ema"} <= records[1].keys() and state["step"] == 20
    for other in others:
        assert outcome(other)[1] == records, other
        assert_identical(outcome(other)[0], state)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """`live`, a run of 20 updates of two micro-batches; `filling` and its `cache`."""
    folder = tmp_path_factory.mktemp("trained")
    assert train(folder / "live") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_files, "BLOCK_BYTES", 30 * 40)  # of 30 rows: within a micro-batch of 4
        assert train(folder / "filling", "--teacher-cache", str(folder / "cache")) == 0
    return folder


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(row_files, "BLOCK_BYTES", 30 * 40)


def never(*args, **kwargs) -> None:
    raise AssertionError("the teacher was loaded")


def test_live_filling_and_cached_runs_are_one(trained, tmp_path, small_blocks, monkeypatch, capsys):
    assert len(blocks(trained / "cache")) == 6
    assert train(tmp_path / "cached", "--teacher-cache", str(trained / "cache")) == 0
    monkeypatch.setattr(train_kd, "load_teacher", never)
    capsys.readouterr()
    words = ["--teacher-cache", str(trained / "cache"), "--teacher-cache-only"]
    assert train(tmp_path / "only", *words) == 0
    assert "10 classes, 40 bytes an image" in capsys.readouterr().out
    assert_same_runs(trained / "live", trained / "filling", tmp_path / "cached", tmp_path / "only")
    saved = load_file(tmp_path / "only" / "checkpoint-last.pth")["args"]
    assert saved["teacher_checksum"] == yaml.safe_load(
        (trained / "cache" / "manifest.yaml").read_text())["teacher_checksum"]
    assert train(tmp_path / "other", *words, "--seed", "1") == 2
    assert "(seed: 0 there, 1 here)" in capsys.readouterr().err
    assert train(tmp_path / "other", *words[:1], str(tmp_path), *words[2:]) == 2
    assert "holds no logits of a teacher" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_cache_filled_by_the_program_is_that_of_a_student(trained, tmp_path, small_blocks,
                                                            capsys):
    """And a run that was killed goes on with or without it."""
    words = ["--teacher-cache", str(tmp_path / "cache")]
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step=14)
        with pytest.raises(Killed):
            train(tmp_path / "run", *words, "--save-every-steps", "3")
    assert len(blocks(tmp_path / "cache")) == 4  # the second epoch came to row 32
    assert train(tmp_path / "unused", *words, "--fill-cache") == 0
    assert not (tmp_path / "unused").exists() and capsys.readouterr().out.count("done: ") == 1
    assert blocks(tmp_path / "cache") == blocks(trained / "cache")
    shutil.copytree(tmp_path / "run", tmp_path / "live")
    assert train(tmp_path / "run", *words, "--teacher-cache-only") == 0
    assert train(tmp_path / "live") == 0
    assert_same_runs(trained / "live", tmp_path / "run", tmp_path / "live")


def test_epochs_that_come_back_and_few_classes(tmp_path, monkeypatch, capsys):
    """They are one run, too, if not that of the teacher itself, whose resume is refused."""
    words = ["--teacher-cache", str(tmp_path / "cache"), "--teacher-cache-epochs", "1",
             "--teacher-cache-top", "3"]
    assert train(tmp_path / "filling", *words) == 0
    assert [*blocks(tmp_path / "cache")] == ["epoch-0000-block-0000.pt"]
    monkeypatch.setattr(train_kd, "load_teacher", never)
    assert train(tmp_path / "only", *words, "--teacher-cache-only") == 0
    assert_same_runs(tmp_path / "filling", tmp_path / "only")
    capsys.readouterr()
    assert train(tmp_path / "only") == 2
    message = capsys.readouterr().err
    assert "teacher_cache_top: 3 there, 0 here" in message and "teacher_cache_epochs: 1" in message


def test_a_dry_run_says_what_a_cache_takes_and_saves(tmp_path, capsys):
    words = ["--teacher-cache", str(tmp_path / "cache"), "--teacher-cache-top", "3", "--dry-run"]
    assert train(tmp_path / "run", *words) == 0
    printed = capsys.readouterr().out
    for text in ("3 of 10 classes, 16 bytes an image, 1.2 KiB an epoch, 2.5 KiB in 2 epoch(s); 0 "
                 "of 2 files are there", "reckoned from one timed micro-batch",
                 "to fill what is missing", "costs what 1.00 student(s) save"):
        assert text in printed, text
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("words, telling", [
    (["--teacher-cache-only"], "need --teacher-cache DIR"),
    (["--fill-cache"], "need --teacher-cache DIR"),
    (["--teacher-cache-top", "3"], "--teacher-cache-top does nothing without --teacher-cache"),
    (["--teacher-cache", "x", "--teacher", "none"], "Name it with --teacher"),
    (["--teacher-cache", "x", "--teacher-cache-only", "--fill-cache"], "Leave one of them out"),
    (["--teacher-cache", "x", "--skip-bad-images"], "Repair or remove such images"),
    (["--teacher-cache", str(REPOSITORY / "README.md")], "README.md is a file, and a folder is"),
    (["--teacher-cache", "x", "--loss", "fd"], "--loss fd compares feature maps"),
    (["--teacher-cache", "x", "--loss", "mgd"], "--loss mgd compares feature maps")])
def test_flags_that_do_not_go_together(words, telling, tmp_path, capsys):
    assert train(tmp_path, *words) == 2
    assert telling in capsys.readouterr().err


# Started by torchrun: a live run, the filling of a cache, and a run from it, in blocks of 30 rows.
THREE_RUNS = """
import sys
sys.path.insert(0, {root!r})
import train_kd
from utils import distributed, row_files

row_files.BLOCK_BYTES = 30 * 40
distributed.shutdown, shutdown = lambda: None, distributed.shutdown  # the processes stay together
for words in {runs!r}:
    assert train_kd.main(words) == 0, words
shutdown()
"""


def test_two_processes_are_taught_the_same_live_and_cached(tmp_path):
    """Processes and micro-batches do not divide the blocks."""
    words, cached = [*SMALL, "--batch-size", "2"], ["--teacher-cache", str(tmp_path / "cache")]
    program = tmp_path / "program.py"
    program.write_text(THREE_RUNS.format(root=str(REPOSITORY), runs=[
        [*words, "--output-dir", str(tmp_path / "live")], [*words, *cached, "--fill-cache"],
        [*words, *cached, "--teacher-cache-only", "--output-dir", str(tmp_path / "only")]]))
    torchrun(program=str(program))
    assert len(blocks(tmp_path / "cache")) == 6
    assert_same_runs(tmp_path / "live", tmp_path / "only")
