"""Data as people have it: ImageNet as distributed, a share to evaluate on, lists, torchvision's
sets, images kept in memory; tiny imitations of each."""
import csv
import hashlib
import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

import data
from data.datasets import check_memory
from data.layouts import read_synsets
from tests.test_data import assert_same
from tests.test_folders import contents, put
from utils.classes import imagenet_wnids
from utils.registry import UserError

WNIDS = [imagenet_wnids()[label] for label in (7, 3, 999)]
NUMBERS = [2, 0, 1, 2, 0]  # of the validation images, among WNIDS
VAL = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 6)]
EXPECTED = sorted(zip(VAL, [{0: 7, 1: 3, 2: 999}[number] for number in NUMBERS]))


def labels_by_name(source: data.ImageSource) -> list[tuple[str, int]]:
    return sorted((Path(source.name_of(index)).name, source.load(index)[1])
                  for index in range(len(source)))


# ImageNet


def matlab(kind: int, content: bytes, small: bool = False) -> bytes:
    """An element of MATLAB's format 5."""
    if small:
        return struct.pack("<HH", kind, len(content)) + content.ljust(4, b"\0")
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def matrix(class_of: int, shape: tuple[int, int], *parts: bytes) -> bytes:
    flags, dimensions = struct.pack("<II", class_of, 0), struct.pack("<ii", *shape)
    return matlab(14, matlab(6, flags) + matlab(5, dimensions) + matlab(1, b"", small=True)
                  + b"".join(parts))


def meta_mat(synsets: dict[int, str]) -> bytes:
    """As the kit's: a compressed struct array of numbers and texts."""
    keys = ("ILSVRC2012_ID", "WNID", "children")
    fields = []
    for number, wnid in synsets.items():
        fields += [matrix(6, (1, 1), matlab(4, struct.pack("<H", number), small=True)),
                   matrix(4, (1, 9), matlab(4, np.array([*map(ord, wnid)], "<u2").tobytes())),
                   matrix(6, (0, 0), matlab(9, b""))]
    names = b"".join(key.encode().ljust(16, b"\0") for key in keys)
    array = matrix(2, (len(synsets), 1), matlab(5, struct.pack("<i", 16), small=True),
                   matlab(1, names), *fields)
    packed = zlib.compress(array)
    return b"MATLAB 5.0 MAT-file".ljust(126) + b"IM" + struct.pack("<II", 15, len(packed)) + packed


def with_kit(root: Path, names: str = "meta.mat") -> None:
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    synsets = {34: WNIDS[0], 5: WNIDS[1], 1000: WNIDS[2], 1001: "n00001740"}
    places = [[*synsets][number] for number in NUMBERS]
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text(
        "".join(f"{place}\n" for place in places))
    if names == "meta.mat":
        (kit / names).write_bytes(meta_mat(synsets))
    elif names:
        (kit / names).write_text("".join(f"{wnid} {number} some_word\n"
                                         for number, wnid in synsets.items()))


def with_csv(root: Path) -> None:
    with open(root / "LOC_val_solution.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for name, number in zip(VAL, NUMBERS):
            box = f"{WNIDS[number]} 85 1 499 272 "
            writer.writerow([name.removesuffix(".JPEG"), box * 2])


def put_imagenet(root: Path, flat: bool = True) -> None:
    put(root, *(f"train/{wnid}/{wnid}_1.JPEG" for wnid in WNIDS))
    put(root, *(f"val/{name}" if flat else f"val/{WNIDS[number]}/{name}"
                for name, number in zip(VAL, NUMBERS)))


@pytest.mark.parametrize("names", ["meta.mat", "map_clsloc.txt"])
def test_a_flat_val_with_the_development_kit(names, tmp_path):
    put_imagenet(tmp_path)
    with_kit(tmp_path, names)
    val = data.create_dataset("imagenet", "val", str(tmp_path))
    assert labels_by_name(val) == EXPECTED and val.classes == imagenet_wnids()
    train, val = data.create_splits(["imagenet"], str(tmp_path))
    assert val.classes == train.classes == sorted(WNIDS)
    assert [val.classes[label] for _, label in labels_by_name(val)] == [
        WNIDS[number] for number in NUMBERS]


@pytest.mark.parametrize("given", [".", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_tree(given, tmp_path):
    put_imagenet(tmp_path / "ILSVRC" / "Data" / "CLS-LOC")
    put(tmp_path / "ILSVRC" / "Data" / "CLS-LOC", "test/ILSVRC2012_test_00000001.JPEG")
    with_csv(tmp_path)
    train, val = (data.create_dataset("imagenet", part, str(tmp_path / given))
                  for part in ("train", "val"))
    assert len(train) == 3 and labels_by_name(val) == EXPECTED


def test_a_val_with_folders(tmp_path):
    put_imagenet(tmp_path, flat=False)
    val = data.create_dataset("IMNET", "val", str(tmp_path))
    assert labels_by_name(val) == labels_by_name(data.create_dataset("imagenet", "val",
                                                                     str(tmp_path)))
    val.align(None, 1000)
    assert labels_by_name(val) == EXPECTED


def test_numbers_of_meta_mat():
    assert read_synsets(meta_mat({3: "n00000001", 700: "n12345678"})) == {
        3: "n00000001", 700: "n12345678"}


def spoil(name: str, content: bytes):
    def change(root: Path) -> None:
        with_kit(root)
        (root / "ILSVRC2012_devkit_t12" / "data" / name).write_bytes(content)
    return change


TRUTH = "ILSVRC2012_validation_ground_truth.txt"
UNLABELLED = {
    "no list": (lambda root: None, "neither Kaggle's LOC_val_solution.csv nor the development kit"),
    "no meta.mat": (lambda root: with_kit(root, ""), "lacks meta.mat"),
    "damaged": (spoil("meta.mat", meta_mat({1: WNIDS[0]})[:200]), "development kit .*not readable"),
    "no struct": (spoil("meta.mat", bytes(300)), "development kit .*not readable"),
    "no numbers": (spoil(TRUTH, b"one\ntwo"), "development kit .*not readable"),
    "too few": (spoil(TRUTH, b"34\n5\n"), "00000003.JPEG has no label"),
    "another name": (lambda root: (with_kit(root), put(root, "val/dog.JPEG")),
                     "dog.JPEG has no label"),
    "a strange csv": (lambda root: (root / "LOC_val_solution.csv").write_text(VAL[0][:-5] + ", "),
                      "LOC_val_solution.csv is not readable"),
    "no images": (lambda root: [(root / "val" / name).unlink() for name in VAL],
                  "neither class folders nor images"),
}


@pytest.mark.parametrize("case", UNLABELLED)
def test_a_flat_val_without_labels(case, tmp_path):
    change, telling = UNLABELLED[case]
    put_imagenet(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=telling):
        data.create_dataset("imagenet", "val", str(tmp_path))


def test_imagefolder_tells_of_it(tmp_path):
    put_imagenet(tmp_path)
    with pytest.raises(UserError, match="5 image.* --data-set imagenet"):
        data.create_dataset("imagefolder", "val", str(tmp_path))


# A share to evaluate on


def divided(root: Path, share: float = 0.25) -> list[data.ImageSource]:
    return list(data.create_splits(["imagefolder", f"split={share}"], str(root)))


def test_a_share_is_taken_by_a_hash_of_the_name(tmp_path):
    put(tmp_path, *(f"{name}/{number}.png" for name in ("ant", "bee") for number in range(100)))
    train, val = divided(tmp_path)
    names = [{item[0] for item in contents(source, tmp_path)} for source in (train, val)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 200
    expected = {name for name in names[0] | names[1] if int.from_bytes(
        hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") < 2 ** 62}
    assert names[1] == expected
    # What stays is where it was when others go, and wherever the whole lies.
    for number in range(0, 100, 3):
        (tmp_path / "ant" / f"{number}.png").unlink()
    put(tmp_path, "bee/new.png")
    elsewhere = tmp_path.with_name("elsewhere")
    (elsewhere).mkdir()
    os.rename(tmp_path / "ant", elsewhere / "ant"), os.rename(tmp_path / "bee", elsewhere / "bee")
    left = {item[0] for item in contents(divided(elsewhere)[1], elsewhere)}
    assert left - {"bee/new.png"} == {name for name in names[1] if (elsewhere / name).exists()}


def test_every_class_is_on_both_sides(tmp_path, capsys):
    put(tmp_path / "train", *(f"{name}/{number}.png" for name in "abcdefgh" for number in range(2)),
        "single/0.png")
    train, val = divided(tmp_path, 0.4)
    assert set(val.present()) == {*"abcdefgh"} and set(train.present()) == {*"abcdefgh", "single"}
    assert "of 1 of the 9 classes: single" in capsys.readouterr().out


@pytest.mark.parametrize("share, names, telling", [
    (1.5, ["ant/a.png"], "split=1.5 must lie between 0 and 1"),
    (0.1, ["train/ant/a.png", "val/ant/a.png"], "divided into train/ and val/ already"),
    (0.1, ["ant/a.png", "bee/notes.txt"], "bee. Fill or remove"),
    (0.5, ["ant/a.png", "bee/b.png"], "split=0.5 leaves no image to evaluate on")])
def test_a_share_that_cannot_be(share, names, telling, tmp_path):
    put(tmp_path, *names)
    with pytest.raises(UserError, match=telling):
        divided(tmp_path, share)


# Lists


def listed(root: Path, *options: str, path: str | None = None) -> list[data.ImageSource]:
    return list(data.create_splits(["list", *(option.replace("@", f"{root}/")
                                              for option in options)], path))


def test_lists_of_names(tmp_path):
    put(tmp_path, "x/a b.png", "x/b.png", "y.png")
    (tmp_path / "t.txt").write_text("# images\nx/a b.png wolf\n\nx/b.png\tgrey fox\ny.png ant\n")
    (tmp_path / "v.csv").write_text('image,label\n"x/a b.png",ant\ny.png,grey fox\n')
    train, val = listed(tmp_path, "file=@t.txt", "val=@v.csv")
    assert train.classes == val.classes == ["ant", "grey fox", "wolf"]
    assert contents(train, tmp_path) == [("x/a b.png", 2), ("x/b.png", 1), ("y.png", 0)]
    assert contents(val, tmp_path) == [("x/a b.png", 0), ("y.png", 1)]
    alone = data.create_dataset("list", "val", None, file=str(tmp_path / "v.csv"))
    alone.align(train.classes, 3)
    assert contents(alone, tmp_path) == contents(val, tmp_path)


def test_lists_of_numbers_below_another_folder(tmp_path):
    """The numbers are the labels, whichever of them are there."""
    put(tmp_path / "images", *(f"{number}.png" for number in range(12)))
    (tmp_path / "t.txt").write_text("".join(f"{number}.png {number}\n" for number in (10, 2, 4)))
    (tmp_path / "v.txt").write_text("2.png 2\n10.png 10\n")
    train, val = listed(tmp_path, "file=@t.txt", "val=@v.txt", path=str(tmp_path / "images"))
    assert train.classes == [str(number) for number in range(11)]
    assert [label for _, label in contents(train, tmp_path)] == [10, 2, 4]
    assert [label for _, label in contents(val, tmp_path)] == [2, 10]
    (tmp_path / "t.txt").write_text("".join(f"{number}.png 1\n" for number in range(12)))
    train, val = listed(tmp_path, "file=@t.txt", "split=0.5", path=str(tmp_path / "images"))
    assert len(train) + len(val) == 12 and 0 < len(val) < 12


LISTS = {
    "no file": ([], "", "needs file=FILE"),
    "nothing to evaluate on": (["file=@t.txt"], "a.png x", "needs val=FILE"),
    "both": (["file=@t.txt", "val=@t.txt", "split=0.1"], "a.png x", "one of them"),
    "not there": (["file=@no.txt", "split=0.1"], "", "no.txt cannot be read"),
    "empty": (["file=@t.txt", "split=0.1"], "\n", "lists no images"),
    "no label": (["file=@t.txt", "split=0.1"], "a.png\n", "has the line 'a.png'"),
    "another root": (["file=@t.txt", "split=0.1"], "b/a.png x\n", "is not there.*--data-path"),
    "unknown cache": (["file=@t.txt", "cache=disk"], "a.png x", "cache=disk .*Known: none, ram"),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_list_that_will_not_do(case, tmp_path):
    options, text, telling = LISTS[case]
    put(tmp_path, "a.png")
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(UserError, match=telling):
        listed(tmp_path, *options)


# Torchvision's


def cifar(root: Path, monkeypatch, kind: type, folder: str, files: list[str], key: str,
          names: tuple[str, str]) -> None:
    """Three samples a file; torchvision's sums are made those of these files."""
    place = root / folder
    place.mkdir()
    sums = []
    for number, file in enumerate(files):
        pixels = np.full((3, 3 * 32 * 32), 10 * number, np.uint8)
        content = pickle.dumps({"data": pixels, key: [0, 2, number % 3]})
        (place / file).write_bytes(content)
        sums.append([file, hashlib.md5(content).hexdigest()])
    content = pickle.dumps({names[1]: ["ant", "bee", "cat"]})
    (place / names[0]).write_bytes(content)
    monkeypatch.setattr(kind, "train_list", sums[:-1])
    monkeypatch.setattr(kind, "test_list", sums[-1:])
    monkeypatch.setattr(kind, "meta", {"filename": names[0], "key": names[1],
                                       "md5": hashlib.md5(content).hexdigest()})


def make_cifar10(root: Path, monkeypatch) -> None:
    files = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    cifar(root, monkeypatch, datasets.CIFAR10, "cifar-10-batches-py", files, "labels",
          ("batches.meta", "label_names"))


def make_cifar100(root: Path, monkeypatch) -> None:
    cifar(root, monkeypatch, datasets.CIFAR100, "cifar-100-python", ["train", "test"],
          "fine_labels", ("meta", "fine_label_names"))


def make_imagenette(root: Path, monkeypatch) -> None:
    put(root / "imagenette2-320", *(f"{part}/{wnid}/{number}.JPEG" for part in ("train", "val")
                                    for wnid in ("n01440764", "n03888257") for number in range(2)))


def make_food(root: Path, monkeypatch) -> None:
    put(root / "food-101" / "images", "cake/1.jpg", "cake/2.jpg", "pie/3.jpg")
    meta = root / "food-101" / "meta"
    meta.mkdir()
    (meta / "train.json").write_text(json.dumps({"pie": ["pie/3"], "cake": ["cake/1"]}))
    (meta / "test.json").write_text(json.dumps({"pie": [], "cake": ["cake/2"]}))


def make_pets(root: Path, monkeypatch) -> None:
    put(root / "oxford-iiit-pet" / "images", "boxer_1.jpg", "pug_2.jpg", "pug_3.jpg")
    notes = root / "oxford-iiit-pet" / "annotations"
    notes.mkdir()
    (notes / "trainval.txt").write_text("boxer_1 1 2 1\npug_2 2 2 2\n")
    (notes / "test.txt").write_text("pug_3 2 2 2\nboxer_1 1 2 1\n")


SETS = {  # how it is made; classes; labels of train and val
    "cifar10": (make_cifar10, ["ant", "bee", "cat"], [0, 2, 0, 0, 2, 1, 0, 2, 2, 0, 2, 0, 0, 2, 1],
                [0, 2, 2]),
    "cifar100": (make_cifar100, ["ant", "bee", "cat"], [0, 2, 0], [0, 2, 1]),
    "imagenette": (make_imagenette, ["n01440764", "n03888257"], [0, 0, 1, 1], [0, 0, 1, 1]),
    "food101": (make_food, ["cake", "pie"], [1, 0], [0]),
    "pets": (make_pets, ["Boxer", "Pug"], [0, 1], [1, 0]),
}


@pytest.mark.parametrize("name", SETS)
def test_torchvisions_sets(name, tmp_path, monkeypatch):
    make, classes, *labels = SETS[name]
    make(tmp_path, monkeypatch)
    monkeypatch.setattr(f"torchvision.datasets.{ 'OxfordIIITPet' if name == 'pets' else 'Food101'}"
                        "._download", lambda self: None)
    parts = data.create_splits([name], str(tmp_path))
    for source, expected in zip(parts, labels):
        assert [source.load(index)[1] for index in range(len(source))] == expected
        assert source.classes == classes and len(source) == len(expected)
        assert source.load(0)[0].mode == "RGB" and source.name_of(0)
    parts[1].relabel(classes[::-1])
    assert parts[1].load(0)[1] == len(classes) - 1 - labels[1][0]


def test_what_cannot_be_fetched_is_said(tmp_path, monkeypatch):
    def download(self) -> None:
        raise RuntimeError("Name or service not known")

    monkeypatch.setattr(datasets.Food101, "_download", download)
    with pytest.raises(UserError, match="food101 is not in .* not known.*food-101 there"):
        data.create_dataset("food101", "train", str(tmp_path))
    with pytest.raises(UserError, match="sizes 320px"):
        data.create_dataset("imagenette", "train", str(tmp_path), size="90px")


# Kept in memory


def noise(root: Path, number: int = 6) -> Path:
    rng = np.random.default_rng(0)
    for index in range(number):
        path = root / ("ant", "bee")[index % 2] / f"{index}.{'jpg' if index < 4 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (40 + index, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fast", [False, True])
def test_images_in_memory_are_the_same(workers, fast, tmp_path):
    noise(tmp_path / "train")
    (tmp_path / "train" / "ant" / "bad.jpg").write_bytes(b"no image")
    loaders = []
    for cache in ("none", "ram"):
        source = data.create_dataset("imagefolder", "train", str(tmp_path), cache=cache)
        loaders.append(data.train_loader(
            source, data.train_transform(33, fast_decode=fast), batch_size=3, num_batches=2, seed=0,
            num_workers=workers, skip_bad_images=True, pin_memory=False))
    for epoch in range(2):
        plain, kept = (list(loader.start_at(epoch, 0)) for loader in loaders)
        assert_same(kept, plain)
    assert source.is_kept.sum() == 6  # in this process, whoever decoded them
    for loader in loaders:
        loader.close()


def test_an_image_is_decoded_once(tmp_path, monkeypatch):
    source = data.create_dataset("imagefolder", "val", str(noise(tmp_path / "val").parent),
                                 cache="ram")
    first = [np.asarray(source.load(index)[0]) for index in range(6)]
    source.align(["bee", "ant", "fox"], 3)
    for path in tmp_path.rglob("*.*"):
        path.unlink()
    for index in range(6):
        image, label = source.load(index)
        np.testing.assert_array_equal(np.asarray(image), first[index])
        assert source.classes[label] == Path(source.name_of(index)).parent.name


def test_outlines_in_memory():
    plain, kept = (data.create_dataset("outlines", "val", None, val_size=12, cache=cache)
                   for cache in ("none", "ram"))
    for index in (0, 11, 11):
        assert kept.load(index)[1] == plain.load(index)[1]
        assert kept.load(index)[0].tobytes() == plain.load(index)[0].tobytes()


def test_too_many_to_keep():
    check_memory(2 ** 20)
    with pytest.raises(UserError, match=r"needs 1048576.0 GiB .* are left"):
        check_memory(2 ** 50)


@pytest.mark.parametrize("name, text, telling", [
    ("t.txt", "a.png 99999999999\n", "has the label '99999999999'; whole numbers are the labels"),
    ("t.csv", '"' + "x" * 200_000, "is no readable list with commas")])
def test_a_list_that_no_data_set_can_be_of(name, text, telling, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=telling):
        data.create_dataset("list", "train", None, file=str(tmp_path / name), split=0.5)
