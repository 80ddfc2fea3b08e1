"""Images in tar files: the samples of files, at any place, in order, resumed anywhere."""
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import shards
from tests.test_data import WORKERS, assert_same
from utils.registry import UserError


def image_bytes(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (36, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_shards(root: Path, part: str = "train", number: int = 3, size: int = 8) -> Path:
    """Labels 0, 1, 2, 0, ... of images 0, 1, ...; and what else such tars hold."""
    for shard in range(number):
        files = {"._junk.jpg": b"x"}
        for index in range(shard * size, (shard + 1) * size):
            files[f"{index:04d}.cls"] = str(index % 3).encode()
            files[f"{index:04d}.png"] = image_bytes(index)
            files[f"{index:04d}.json"] = b"{}"
        write_tar(root / f"set-{part}-{shard:06d}.tar", files)
    return root


def of(root: Path, part: str = "train") -> data.ImageSource:
    return data.create_dataset("shards", part, str(root))


def test_samples_are_those_of_files(tmp_path, capsys):
    source = of(write_shards(tmp_path / "tars"))
    assert len(source) == 24 and source.classes == ["0", "1", "2"]
    for index in (23, 0, 9):
        image, label = source.load(index)
        assert label == index % 3 and image.tobytes() == Image.open(
            io.BytesIO(image_bytes(index))).tobytes()
    assert source.name_of(9).endswith("set-train-000001.tar/0009.png")
    assert "looking through 3 tar file(s)" in capsys.readouterr().out
    of(tmp_path / "tars")  # the index is kept
    assert "looking" not in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_continue_anywhere(workers, tmp_path):
    source = of(write_shards(tmp_path))
    arguments = dict(batch_size=4, num_batches=6, seed=0) | WORKERS
    whole = list(data.train_loader(source, data.train_transform(33), **arguments).start_at(1, 0))
    arguments["num_workers"] = workers
    loader = data.train_loader(of(tmp_path), data.train_transform(33), **arguments)
    assert_same(list(loader.start_at(1, 0)), whole)
    assert_same(list(loader.start_at(1, 4)), whole[4:])
    loader.close()


def test_parts_in_folders_and_names_of_classes(tmp_path):
    write_shards(tmp_path / "train", "x", number=2)
    write_shards(tmp_path / "val", "x", number=1)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\nnever\n")
    train, val = data.create_splits(["shards"], str(tmp_path))
    assert (len(train), len(val)) == (16, 8)
    assert train.classes == val.classes == ["ant", "bee", "cat", "never"]
    val.align(["cat", "bee", "ant"], 3)
    assert val.load(0)[1] == 2


def test_folders_in_a_tar_are_classes(tmp_path):
    write_tar(tmp_path / "a-val.tar", {f"{name}/{i}.v2.png" if i else f"{name}/{i}.png":
                                       image_bytes(i) for name in ("wolf", "ant") for i in (0,)})
    source = of(tmp_path, "val")
    assert source.classes == ["ant", "wolf"]
    assert [source.load(index)[1] for index in range(2)] == [1, 0]


def test_a_changed_tar_is_looked_through_again(tmp_path):
    assert len(of(write_shards(tmp_path))) == 24
    write_shards(tmp_path, number=1, size=5)
    assert len(of(tmp_path)) == 5 + 16
    (tmp_path / ".shards-train.npz").write_bytes(b"damaged")
    assert len(of(tmp_path)) == 21


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    def full(write, path: Path) -> None:
        raise UserError("no")

    monkeypatch.setattr(shards, "write_atomically", full)
    assert len(of(write_shards(tmp_path))) == 24 and len([*tmp_path.iterdir()]) == 3


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    write_tar(tmp_path / "train.tar", {"a.png": b"no image", "a.cls": b"0", "b.png": image_bytes(0),
                                       "b.cls": b"1"})
    loader = data.eval_loader(of(tmp_path), data.eval_transform(32), batch_size=2, num_workers=0)
    with pytest.raises(UserError, match="train.tar/a.png .*no image"):
        list(loader)
    source = of(tmp_path)
    os.truncate(tmp_path / "train.tar", 2000)  # while it is in use
    with pytest.raises(OSError, match="ends before it"):
        source.load(1)


SPOILT = {
    "nothing": (lambda root: None, "no tar files of train"),
    "packed": (lambda root: (root / "train.tar.gz").write_bytes(b"x"), "Packed ones, .tar.gz"),
    "no tar": (lambda root: (root / "train.tar").write_bytes(b"x" * 600), "is no whole tar"),
    "cut off": (lambda root: os.truncate(write_shards(root) / "set-train-000001.tar", 5000),
                "set-train-000001.tar is no whole tar"),
    "no samples": (lambda root: write_tar(root / "train.tar", {"a.txt": b"x"}), "hold no samples"),
    "no label": (lambda root: write_tar(root / "train.tar", {"a.png": b"x"}),
                 "no label for a.png"),
    "few names": (lambda root: (write_shards(root) / "classes.txt").write_text("ant\n"),
                  "has 1 names, and the labels of train go to 2"),
    "no folder": (lambda root: root.rmdir(), "is not a folder"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_refused(case, tmp_path):
    change, telling = SPOILT[case]
    (tmp_path / "set").mkdir()
    change(tmp_path / "set")
    with pytest.raises(UserError, match=telling):
        of(tmp_path / "set")
