"""Folders of images: classes and their order, what is left out, near misses of --data-path."""
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder as TorchvisionFolder

import data
import eval as evaluation
import train_kd
from data.folders import Names, images_below
from utils.classes import imagenet_wnids
from utils.registry import UserError

IMAGE = Image.new("RGB", (8, 8), (200, 30, 30))
JUNK = [".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/._a.jpg", ".ipynb_checkpoints/a.jpg",
        "lost+found/a.jpg", "@eaDir/a.jpg/SYNO_THUMB_M.jpg", "._a.jpg", "$RECYCLE.BIN/a.jpg"]


def put(root: Path, *names: str) -> Path:
    """Images under these names, or what else they are by their ending."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".gif", ".jfif"):
            kind = {".jfif": "JPEG", ".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower())
            IMAGE.save(path, kind)
        else:
            path.write_bytes(b"no image")
    return root


def folder_set(root: Path, split: str = "val") -> data.ImageSource:
    return data.create_dataset("imagefolder", split, str(root))


def contents(source: data.ImageSource, root: Path) -> list[tuple[str, int]]:
    return [(os.path.relpath(source.path_of(index), root), source.load(index)[1])
            for index in range(len(source))]


def test_classes_and_order_are_torchvisions(tmp_path):
    root = put(tmp_path / "val", "n02/b.jpg", "n02/a.JPG", "n02/deep/c.png", "n02/deep-er/d.png",
               "n02/a/z.png", "n01/x.png", "n10/B.png", "n10/a.png", "n10/notes.txt")
    put(tmp_path / "elsewhere", "one.png")
    (root / "n03").symlink_to(tmp_path / "elsewhere")
    (root / "n10" / "linked.png").symlink_to(root / "n01" / "x.png")
    source, theirs = folder_set(tmp_path), TorchvisionFolder(str(root))
    assert source.classes == theirs.classes == ["n01", "n02", "n03", "n10"]
    assert contents(source, root) == [(os.path.relpath(path, root), label)
                                      for path, label in theirs.samples]


@pytest.mark.parametrize("names, expected, is_said", [
    (["10", "2", "0", "100"], ["0", "2", "10", "100"], True),
    (["03", "10", "02"], ["02", "03", "10"], False),
    (["1", "01", "3"], ["01", "1", "3"], False),
    (["10", "2", "x"], ["10", "2", "x"], False),
    (["-1", "2", "10"], ["-1", "10", "2"], False)])
def test_folders_that_are_all_numbers(names, expected, is_said, tmp_path, capsys):
    put(tmp_path / "val", *(f"{name}/a.png" for name in names))
    source = folder_set(tmp_path)
    assert source.classes == expected
    assert [source.load(index)[1] for index in range(len(names))] == [*range(len(names))]
    assert ("class folders are numbers" in capsys.readouterr().out) == is_said


def test_what_systems_and_tools_leave_is_nothing(tmp_path, capsys):
    put(tmp_path / "val", *JUNK, "ant/a.png", "bee/a.png", *(f"ant/{name}" for name in JUNK))
    source = folder_set(tmp_path)
    assert source.classes == ["ant", "bee"] and len(source) == 2
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("name, layout", [
    ("imagenet_a", "{}"), ("imagenet_r", "{}"), ("imagenet_sketch", "{}"), ("imagenet_v2", "{}"),
    ("imagenet_c corruptions=fog", "weather/fog/{}")])
def test_nor_in_the_robustness_sets(name, layout, tmp_path):
    name, *options = name.split()
    folders = ([layout.format(number) for number in range(1, 6)] if "_c" in name
               else [layout.format("").rstrip("/")])
    for folder in folders:
        put(tmp_path / folder, *JUNK, "n01440764/a.jpg", *(f"n01440764/{junk}" for junk in JUNK))
    put(tmp_path, *JUNK)
    source = data.create_dataset(name, "val", str(tmp_path),
                                 **dict(option.split("=") for option in options))
    assert source.classes == ["n01440764"] and len(source) == len(folders)


def test_what_is_no_image_by_its_ending_is_said(tmp_path, capsys):
    put(tmp_path / "val", "ant/a.gif", "ant/b.jfif", "ant/c.heic", "ant/d.heic", "ant/e",
        "bee/a.png")
    os.mkfifo(tmp_path / "val" / "ant" / "pipe.png")  # to read it would take for ever
    source = folder_set(tmp_path)
    assert [Path(source.name_of(index)).name for index in range(3)] == ["a.gif", "b.jfif", "a.png"]
    said = capsys.readouterr().out
    assert "left out 4 file(s)" in said and ".heic 2" in said and "none 1" in said


def test_a_link_to_a_folder_above_ends(tmp_path):
    root = put(tmp_path, "a.png", "deep/b.png", "other/c.png")
    (root / "deep" / "up").symlink_to(root)
    (root / "deep" / "self").symlink_to(root / "deep")
    (root / "deep" / "nowhere.png").symlink_to(root / "gone.png")
    assert images_below(str(root))[0] == [
        "a.png", "deep/b.png", "deep/nowhere.png", "other/c.png"]
    # Or a class would have the images of all others, too.
    assert images_below(str(root / "deep"))[0] == ["b.png", "nowhere.png"]


def test_names_are_kept_as_bytes():
    words = [b"a.png", b"", b"caf\xe9.jpg", b"x" * 300]
    names = Names(words)
    assert [names[index] for index in range(4)] == words and len(names) == 4
    with pytest.raises(IndexError, match="0 to 3; got -1"):
        names[-1]
    names.keep(np.array([False, False, True, True]))
    assert [names[index] for index in range(2)] == words[2:]


def test_an_image_costs_a_name_and_a_few_bytes(tmp_path):
    put(tmp_path / "val", *(f"ant/{number:03d}.png" for number in range(50)))
    source = folder_set(tmp_path)
    held = (len(source.names.text) + source.names.starts.nbytes + source.names.lengths.nbytes
            + source.class_of.nbytes)
    assert held == 50 * (len("000.png") + 8 + 2 + 4)


# Splits and classes


def test_a_class_without_validation_images_is_said(tmp_path, capsys):
    """Whether its folder is there or not; labels are those of training."""
    for name in ("ant", "bee", "cat"):
        put(tmp_path / "train", f"{name}/a.png")
    put(tmp_path / "val", "ant/a.png", "cat/a.png", "bee/.DS_Store", "dog/.DS_Store")
    for _ in range(2):
        train, val = data.create_splits(["imagefolder"], str(tmp_path))
        assert train.classes == val.classes == ["ant", "bee", "cat"] and len(val) == 2
        assert [val.load(index)[1] for index in range(2)] == [0, 2]
        assert "no images to evaluate on of 1 of the 3 classes: bee" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "val" / "bee", ignore_errors=True)


def test_a_part_of_the_models_classes_is_matched_by_name(tmp_path, capsys):
    wnids = imagenet_wnids()
    put(tmp_path / "val", *(f"{wnids[label]}/a.png" for label in (7, 500, 3)))
    source = folder_set(tmp_path)
    source.align(None, 1000)  # published weights say no names
    assert source.classes == wnids
    assert sorted(source.load(index)[1] for index in range(3)) == [3, 7, 500]
    assert "of 997 of the 1000 classes" in capsys.readouterr().out
    source = folder_set(tmp_path)
    source.align([wnids[500], wnids[3], "n0", wnids[7]], 4)
    assert [source.load(index)[1] for index in range(3)] == [1, 3, 0]
    with pytest.raises(UserError, match="lacks 1 of these: " + wnids[500]):
        folder_set(tmp_path).align([wnids[3], wnids[7]], 2)


def test_the_order_of_an_older_run_is_kept(tmp_path):
    """One that took numbers for words."""
    put(tmp_path / "val", *(f"{number}/a.png" for number in (0, 2, 10)))
    source = folder_set(tmp_path)
    source.align(["0", "10", "2"], 3)
    assert source.classes == ["0", "10", "2"]
    assert [source.load(index)[1] for index in range(3)] == [0, 2, 1]


def test_numbers_are_the_labels_of_imagenet(tmp_path):
    put(tmp_path / "val", *(f"{label}/a.png" for label in range(1000)))
    source = folder_set(tmp_path)
    source.align(imagenet_wnids(), 1000)
    assert [source.load(index)[1] for index in (2, 10, 999)] == [2, 10, 999]


def test_labels_by_place_are_said(tmp_path, capsys):
    put(tmp_path / "val", "ant/a.png", "bee/a.png")
    folder_set(tmp_path).align(None, 2)
    assert "do not name their classes" in capsys.readouterr().out


NEAR = {
    "the split": ("X/val", "X"), "a class": ("X/train/ant", "X"), "the folder above": (".", "X"),
    "two above": ("..", "X"), "misspelt": ("Y", "X"), "nothing near": ("nowhere", None)}


@pytest.mark.parametrize("case", NEAR)
def test_a_near_miss_gets_the_right_path(case, tmp_path, monkeypatch):
    given, near = NEAR[case]
    work = tmp_path / "here" / "there"
    put(work / "imagenet_X", "train/ant/a.png", "val/ant/a.png")
    monkeypatch.chdir(work)
    given = given.replace("X", "imagenet_X").replace("Y", "imagenet_x")
    with pytest.raises(UserError, match="is not a folder; --data-path must hold train/") as error:
        folder_set(Path(given))
    hint = f"Did you mean --data-path {work / 'imagenet_X'}?"
    assert (hint in str(error.value)) == (near is not None)
    assert near or "Did you mean" not in str(error.value)


def test_other_names_of_the_splits(tmp_path, capsys):
    put(tmp_path, "train/ant/a.png", "validation/ant/b.png", "test/ant/c.png")
    train, val = data.create_splits(["imagefolder"], str(tmp_path))
    assert "validation" in val.name_of(0) and "validation/ is taken" in capsys.readouterr().out


REFUSED = {
    "classes one level deeper": (["train/train/ant/a.png", "train/train/bee/a.png"],
                                 "has one class folder, .*2 folders .*Did you mean --data-path"),
    "and of another name": (["train/photos/ant/a.png", "train/photos/bee/a.png"], "Move them up"),
    "flat": (["train/a.png", "train/b.png"], "no class folders.*2 image.* sort them into folders"),
    "empty": (["train/ant/a.png", "train/bee/notes.txt"], "train/bee. Fill or remove them"),
    "all empty": (["train/ant/notes.txt"], "holds no images in its 1 class")}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    names, telling = REFUSED[case]
    put(tmp_path, *names)
    with pytest.raises(UserError, match=telling):
        folder_set(tmp_path, "train")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def scan(path: str):
        raise PermissionError(13, "Permission denied", path)

    put(tmp_path / "val", "ant/a.png")
    monkeypatch.setattr("data.folders.os.scandir", scan)
    with pytest.raises(UserError, match=r"val cannot be read \(Permission denied\)"):
        folder_set(tmp_path)


def test_names_that_are_no_text(tmp_path, monkeypatch, capsys):
    """In the path, in a class, in a file: trained on, evaluated, printed, saved."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9j\xe0"))
    strange = os.fsdecode(b"caf\xe9")
    for split in ("train", "val"):
        put(root / split, f"ant/{strange}.png", f"{strange}/a.png", f"ant/x.{strange}")
    monkeypatch.chdir(tmp_path)
    words = ["--data-path", str(root), "--num-workers", "0", "--device", "cpu"]
    assert train_kd.main([*words, "--teacher", "none", "--student", "resnet_nano", "--epochs", "1",
                          "--batch-size", "2", "--effective-batch", "2", "--warmup-epochs", "0",
                          "--input-size", "32", "--output-dir", "run", "--mixup", "0", "--cutmix",
                          "0"]) == 0
    assert evaluation.main([*words, "--checkpoint", "run/checkpoint-last.pth",
                            "--predictions", "p.npz"]) == 0
    capsys.readouterr()
    saved = np.load("p.npz")
    for name in (*saved["name"], *saved["classes"]):
        assert name.encode() and ("ant" in name or "caf\\udce9" in name)
