"""--data-on ram and device: the batches of the loader from disk, out of decoded bytes."""
import numpy as np
import pytest
import torch
from PIL import Image

import data
import engine
import train_kd
from data import loader as loading
from data import memory
from data.images import StorageFault
from utils.checkpoint import load_file
from utils.registry import UserError

CPU = torch.device("cpu")
BASE = ["--data-set", "outlines", "train_size=40", "val_size=8", "--input-size", "32",
        "--batch-size", "10", "--effective-batch", "10", "--warmup-epochs", "1", "--student",
        "slak_pico", "dims=8,16", "--teacher", "none", "--aa", "3a"]


class Images(data.ImageSource):
    """Smooth images of the sizes (width, height) given; `bad` ones cannot be read, `faulty` ones
    not at the first try."""

    classes = ["even", "odd"]

    def __init__(self, sizes: list[tuple[int, int]], bad: set[int] = frozenset(),
                 faulty: set[int] = frozenset(), error: type = OSError) -> None:
        self.bad, self.faulty, self.error = {*bad}, {*faulty}, error
        rng = np.random.default_rng(0)
        self.images = [Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
            size, Image.BICUBIC) for size in sizes]

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, int]:
        if index in self.bad | self.faulty:
            self.faulty.discard(index)
            raise self.error("truncated")
        return self.images[index], self.label(index)

    def label(self, index: int) -> int:
        return index % 2

    def name_of(self, index: int) -> str:
        return f"sample {index}"


EQUAL, RAGGED = [(50, 40)] * 12, [(50, 40), (33, 80), (64, 64)] * 4


def disk_loader(source: data.ImageSource, size: int = 40, policy: str = "3a", **options
                ) -> data.Loader:
    return data.train_loader(source, data.train_transform(size, auto_augment=policy), **{
        "batch_size": 4, "num_batches": 3, "seed": 1, "num_workers": 0, "skip_bad_images": False,
        "pin_memory": False, **options})


def kept(source: data.ImageSource, device: torch.device = CPU, data_on: str = "ram", **options
         ) -> memory.MemoryLoader:
    return data.in_memory(disk_loader(source, **options), data_on, device)


def be_process(monkeypatch, rank: int, world: int) -> None:
    for module in (loading, memory):
        monkeypatch.setattr(module, "rank", lambda: rank)
        monkeypatch.setattr(module, "world_size", lambda: world)


def assert_same(left: list, right: list) -> None:
    assert len(left) == len(right) > 0
    for (images, *rest), (others, *other_rest) in zip(left, right):
        assert torch.equal(images.pixels, others.pixels)
        assert torch.equal(images.erased, others.erased)
        assert images.num_erased == others.num_erased
        assert all(torch.equal(x, y) for x, y in zip(rest, other_rest))


# Training


@pytest.mark.parametrize("repeated", [False, True])
def test_order_and_labels_are_those_from_disk(repeated):
    loader = kept(Images(RAGGED), repeated_aug=repeated)
    for epoch in (0, 3):
        ours = list(loader.start_at(epoch, 0))
        theirs = list(disk_loader(Images(RAGGED), repeated_aug=repeated).start_at(epoch, 0))
        for batch, other in zip(ours, theirs, strict=True):
            assert batch.indices.equal(other.indices) and batch.labels.equal(other.labels)
            assert batch.readable.all() and len(batch.images) == 4
            assert batch.images.pixels.shape == other.images.pixels.shape
            assert batch.images.pixels.stride() == other.images.pixels.stride()
    if repeated:  # the same image three times, each time another
        assert len({int(index) % 12 for index in ours[0].indices[:3]}) == 1
        assert not ours[0].images.pixels[0].equal(ours[0].images.pixels[1])


def test_an_epoch_can_be_entered_anywhere_and_depends_on_its_number():
    loader = kept(Images(RAGGED))
    whole = list(loader.start_at(1, 0))
    for start in (1, 2):
        assert_same(list(kept(Images(RAGGED)).start_at(1, start)), whole[start:])
        assert len(loader.start_at(1, start)) == 3 - start
    assert not list(loader.start_at(2, 0))[0].images.pixels.equal(whole[0].images.pixels)
    images, labels = loader.start_at(1, 0).first_batch(most=3)
    assert images.pixels.equal(whole[0].images.pixels[:3]) and labels.equal(whole[0].labels[:3])


def test_an_image_does_not_depend_on_its_batch_nor_on_the_processes(monkeypatch):
    whole = list(kept(Images(RAGGED)))
    by_index = {int(index): pixels for batch in whole
                for index, pixels in zip(batch.indices, batch.images.pixels)}
    for rank in (0, 1):
        be_process(monkeypatch, rank, 2)
        for number, batch in enumerate(kept(Images(RAGGED), batch_size=2)):
            assert batch.indices.equal(whole[number].indices[2 * rank:2 * rank + 2])
            for index, pixels in zip(batch.indices.tolist(), batch.images.pixels):
                assert pixels.equal(by_index[index])


@pytest.mark.parametrize("sizes", [EQUAL, RAGGED])
@pytest.mark.parametrize("size", [40, 32])  # resized, and padded
def test_batches_of_a_device_are_those_of_a_processor(sizes, size):
    loader = kept(Images(sizes), size=size, policy="none")
    for epoch in range(3):
        (batch, *_), keys = loader.start_at(epoch, 0), next(iter(loader.keys))
        places = torch.tensor([index for _, index in keys])
        drawn = loader.transform.draw(1, epoch, places, loader.sizes[places])
        pixels, boxes = loader._gather(places, drawn.boxes)
        together = loader.transform.at_once(pixels, boxes, drawn)
        away = (together.int() - batch.images.pixels).abs()
        assert away.float().mean() < 0.3 and (away > 2).float().mean() < 1e-3
        assert size > 32 or not away.any()


@pytest.mark.parametrize("data_on", ["ram", "device"])
@pytest.mark.parametrize("sizes", [EQUAL, RAGGED])
def test_no_batch_waits_for_the_device(sizes, data_on):
    """On torch's meta device, which has no values, asking for one is an error."""
    meta = torch.device("meta")
    for loader in (kept(Images(sizes), meta, data_on),
                   data.in_memory(eval_loader(Images(sizes)), data_on, meta)):
        for batch in loader:
            assert batch.images.pixels.is_meta and batch.labels.is_meta
            assert batch.images.pixels.shape == (4, 3, 40, 40)


# Evaluation


def eval_loader(source: data.ImageSource, **options) -> data.Loader:
    return data.eval_loader(source, data.eval_transform(40), **{
        "batch_size": 4, "num_workers": 0, **options})


def folder(path) -> data.ImageSource:
    """Images of all kinds: grey, palette, transparent, of 16 bits, of several sizes and formats."""
    rng = np.random.default_rng(0)
    for number, (mode, ending) in enumerate([("L", "png"), ("P", "gif"), ("RGBA", "png"),
                                             ("RGB", "jpg"), ("CMYK", "jpg"), ("RGB", "tif"),
                                             ("1", "png"), ("RGB", "webp")]):
        place = path / "val" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (50 + number, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(place / f"{number}.{ending}")
    Image.fromarray(rng.integers(0, 2 ** 16, (60, 60), dtype=np.uint16)).save(place / "deep.png")
    return data.create_dataset("imagefolder", "val", str(path))


def test_evaluation_has_the_bits_from_disk(tmp_path, monkeypatch):
    source = folder(tmp_path)
    for rank in (0, 1, 2):
        be_process(monkeypatch, rank, 3)
        expected = list(eval_loader(source, batch_size=2))
        loader = data.in_memory(eval_loader(source, batch_size=2), "ram", CPU)
        assert_same(list(loader), expected)
        assert loader.num_samples == 9 and len(loader) == len(expected)
        strides = [batch.images.pixels.stride() for batch in (*loader, *expected)]
        assert len({*strides}) == 1


def test_all_kinds_of_images_are_trained_on(tmp_path):
    source = folder(tmp_path)
    loader = kept(source, policy="none", batch_size=9, num_batches=1)
    (batch,) = loader
    assert batch.labels.tolist() == [source.label(index) for index in batch.indices.tolist()]
    for index in range(9):
        expected = torch.from_numpy(np.array(data.to_rgb(source.load(index)[0])))
        assert loader._image(index).equal(expected)


# What cannot be read


def test_unreadable_images_end_the_run_by_their_name():
    for loader in (kept(Images(EQUAL, bad={5})),
                   data.in_memory(eval_loader(Images(EQUAL, bad={5})), "ram", CPU)):
        with pytest.raises(UserError, match=r"sample 5 \(truncated\).*--skip-bad-images"):
            loader.prepare()


def truncated(path) -> data.ImageSource:
    """A JPEG that says its size and ends early, between two whole ones."""
    (path / "val" / "ant").mkdir(parents=True)
    for number in range(3):
        place = path / "val" / "ant" / f"{number}.jpg"
        Images(EQUAL).images[number].resize((300, 300)).save(place)
    place = path / "val" / "ant" / "1.jpg"
    place.write_bytes(place.read_bytes()[:-2000])
    return data.create_dataset("imagefolder", "val", str(path))


def test_the_next_image_stands_in_for_one_that_is_skipped(tmp_path, capsys):
    loader = kept(truncated(tmp_path), skip_bad_images=True, batch_size=3, num_batches=1)
    for _ in range(2):
        (batch,) = loader
        assert batch.readable.tolist() == [index != 1 for index in batch.indices.tolist()]
    assert loader._image(int(loader.stand_in[1])).equal(loader._image(2))
    assert loader.bad == {1}
    assert capsys.readouterr().err.count("1.jpg") == 1


def test_skipped_images_are_counted_by_one_process(monkeypatch, capsys):
    counts = []
    for rank in (0, 1):
        be_process(monkeypatch, rank, 2)
        loaders = (kept(Images(EQUAL, bad={0, 4, 5}), skip_bad_images=True, batch_size=2),
                   data.in_memory(eval_loader(Images(EQUAL, bad={0, 4, 5}), skip_bad_images=True),
                                  "ram", CPU))
        seen = [list(loader) for loader in loaders]
        assert seen[1][0].indices.tolist() == [rank, rank + 2, rank + 4, rank + 6]
        assert seen[1][0].readable.tolist() == [rank == 1, True, False, True]
        counts.append([len(loader.bad) for loader in loaders])
    assert [sum(count) for count in zip(*counts)] == [3, 3]


def test_what_can_be_read_at_a_second_try_is_in_its_place(capsys):
    loader = kept(Images(EQUAL, faulty={2}))
    loader.prepare()
    assert "sample 2 could be read at a second try" in capsys.readouterr().err
    assert loader.stand_in.equal(torch.arange(12)) and not loader.bad


def test_storage_that_fails_and_data_without_an_image_end_the_run():
    with pytest.raises(UserError, match="3 images after sample 4 .*what they lie on fails"):
        kept(Images(EQUAL, bad={2, 3, 4}, error=StorageFault), skip_bad_images=True).prepare()
    with pytest.raises(UserError, match="none of the 12 images could be read"):
        kept(Images(EQUAL, bad={*range(12)}), skip_bad_images=True).prepare()


def test_images_that_are_all_damaged_in_one_way_or_another_end_the_run(tmp_path):
    source = truncated(tmp_path)
    for number in (0, 2):  # of which not even the size is known
        (tmp_path / "val" / "ant" / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 images could be read"):
        kept(source, skip_bad_images=True).prepare()


def test_stand_ins_go_round():
    assert memory.stand_ins(5, [1, 4, 2]).tolist() == [0, 3, 3, 3, 0]


def test_what_does_not_fit_into_memory_is_refused(monkeypatch):
    with pytest.raises(UserError, match="--data-on ram needs .* GiB for the decoded images"):
        kept(Images(EQUAL))._check_room(2 ** 50)
    asked = []
    monkeypatch.setattr(memory, "check_memory", lambda number, what: asked.append((number, what)))
    monkeypatch.setattr(memory, "READ_AT_ONCE", 5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each process keeps its own
    kept(Images(EQUAL)).prepare()
    whole = 2 * 12 * 3 * 50 * 40
    assert asked[-1] == (whole, "--data-on ram") and len(asked) == 3  # and while sizes are read


def test_images_are_not_kept_twice():
    source = data.create_dataset("outlines", "train", None, cache="ram", train_size=12)
    with pytest.raises(UserError, match="cache=ram .*Leave one of the two out"):
        kept(source)


# The program


def train(folder, *words: str) -> int:
    return train_kd.main([*BASE, *words, "--output-dir", str(folder)])


@pytest.mark.parametrize("words, telling", [
    ("--data-on ram --aa rand-m9-mstd0.5-inc1", "augment by --aa 3a or none, not by rand-m9"),
    ("--data-on device --aa ta", "augment by --aa 3a or none, not by ta"),
    ("--data-on ram --num-workers 2", "--num-workers does nothing with --data-on ram"),
    ("--data-on device --fast-decode", "--fast-decode does nothing with --data-on device"),
    ("--data-on gpu", "invalid choice: 'gpu'"),
])
def test_flags_that_do_not_go_together(tmp_path, words, telling, capsys):
    assert train(tmp_path / "run", *words.split()) == 2
    error = capsys.readouterr().err
    assert telling in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


class Killed(BaseException):
    """Stands for a power cut: nothing of the program runs after it."""


def test_killed_and_resumed_equals_never_stopped(tmp_path, monkeypatch, capsys):
    words = ["--epochs", "2", "--save-every-steps", "3", "--data-on"]
    assert train(tmp_path / "whole", *words, "ram") == 0
    update = engine.optimizer_update

    def stop_at_seven(state, clip_grad):
        if state.step == 7:
            raise Killed
        update(state, clip_grad)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "optimizer_update", stop_at_seven)
        with pytest.raises(Killed):
            train(tmp_path / "cut", *words, "ram")
    assert load_file(tmp_path / "cut" / "checkpoint-last.pth")["step"] == 6
    assert train(tmp_path / "cut", *words, "disk") == 2  # which augments by other draws
    assert "data_on: ram there, disk here" in capsys.readouterr().err
    assert train(tmp_path / "cut", *words, "device") == 0  # the same bytes elsewhere
    whole, cut = (load_file(tmp_path / name / "checkpoint-last.pth") for name in ("whole", "cut"))
    for name, value in whole["model"].items():
        assert value.equal(cut["model"][name]), name
    assert whole["best_acc1"] == cut["best_acc1"]


def test_a_dry_run_and_a_complete_run_decode_nothing(tmp_path, monkeypatch, capsys):
    assert train(tmp_path / "run", "--epochs", "1", "--data-on", "ram", "--save-freq", "0") == 0
    monkeypatch.setattr(memory.MemoryLoader, "_read", None)
    assert train(tmp_path / "run", "--epochs", "1", "--data-on", "ram", "--save-freq", "0") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert train(tmp_path / "other", "--epochs", "1", "--data-on", "ram", "--dry-run") == 0


def test_checkpoints_that_do_not_know_the_flag_are_from_disk(tmp_path, capsys):
    words = ["--epochs", "1", "--save-freq", "0", "--num-workers", "0"]
    assert train(tmp_path, *words) == 0
    path = tmp_path / "checkpoint-last.pth"
    content = torch.load(path, weights_only=True)
    assert content["args"].pop("data_on") == "disk"
    content.pop("checksums")
    torch.save(content, path)
    assert train(tmp_path, *words) == 0
    assert train(tmp_path, *words[:-2], "--data-on", "ram") == 2
    assert "data_on: disk there, ram here" in capsys.readouterr().err
