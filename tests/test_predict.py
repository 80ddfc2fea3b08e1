"""A trained student classifies images: as a program, in five lines, and through torch.hub."""
import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import hubconf
import predict
from models import create_model, list_models
from tests.helpers import fill_by_name
from utils.checkpoint import save_atomically

ROOT = Path(__file__).parent.parent
WNIDS = ["n01440764", "n02102040", "n03000684"]  # tench, English springer, chain saw
FLAGS = ["--num-workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, and val/ with two images of each of its classes."""
    place = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for label, name in enumerate(WNIDS):
        (place / "val" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (90 + label, 110, 3), dtype=np.uint8)).save(
                place / "val" / name / f"{i}.png")
    save_atomically({"model": fill_by_name(create_model("resnet_nano", 3)).state_dict(),
                     "classes": WNIDS, "args": {
                         "student": ["resnet_nano"], "num_classes": 3, "input_size": 64,
                         "crop_pct": 0.9, "interpolation": "bilinear",
                         "data_set": ["imagefolder"]}}, place / "student.pth")
    return place


def run(*words: object) -> int:
    return predict.main([*map(str, words), *FLAGS])


def test_predictions_equal_those_of_the_evaluation(place, tmp_path, capsys):
    """To the bit: the same transform, network and batches."""
    evaluated = ["--checkpoint", str(place / "student.pth"), "--data-path", str(place), *FLAGS,
                 "--predictions", str(tmp_path / "p.npz"), "--batch-size", "1"]
    assert evaluation.main(evaluated) == 0
    expected = np.load(tmp_path / "p.npz")
    assert run("--checkpoint", place / "student.pth", place / "val", "--csv", tmp_path / "t.csv",
               "--show", tmp_path / "s.png", "--batch-size", "1") == 0
    student = predict.distilled(place / "student.pth")
    assert student.classes == ["tench", "English springer", "chain saw"] and not student.training
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert len(rows) == 6
    for row, name, top, prob in zip(rows, expected["name"], expected["top5"], expected["prob"]):
        assert row["image"] == str(name)
        best = student.predict(Image.open(row["image"]))
        assert [name for name, _ in best] == [student.classes[label] for label in top[:3]]
        assert best[0][1] == prob and row["class_1"] == best[0][0]
        assert row["prob_1"] == f"{prob:.6f}" and row["class_3"] == best[2][0]
    assert f"{rows[0]['image']}: {rows[0]['class_1']} " in capsys.readouterr().out
    assert Image.open(tmp_path / "s.png").width == 6 * predict.CELL


def test_a_transform_is_for_one_image_of_any_kind(place):
    student = predict.distilled(place / "student.pth")
    image = student.transform(Image.new("L", (300, 80), 128))
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert student(image[None]).shape == (1, 3)
    assert len(student.predict(Image.new("RGBA", (70, 70), (9, 9, 9, 255)), num_best=2)) == 2


def test_what_cannot_be_read_is_named_and_what_is_twice_is_classified_once(place, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image by its ending")
    Image.new("RGB", (80, 80)).save(tmp_path / "good.png")
    before = (tmp_path / "good.png").read_bytes()
    checkpoint = ("--checkpoint", place / "student.pth")
    assert run(*checkpoint, tmp_path, tmp_path / "good.png", tmp_path / "notes.txt") == 0
    out, err = capsys.readouterr()
    assert "1 of the 4 files are named twice" in out and "2 of 3 images could not be read" in out
    assert "broken.jpg" in out + err and "notes.txt" in out + err
    assert out.count("good.png: ") == 1
    assert run(*checkpoint, tmp_path, "--show", tmp_path / "good.png") == 2
    assert "is one of the images to classify" in capsys.readouterr().err
    assert (tmp_path / "good.png").read_bytes() == before


@pytest.mark.parametrize("words, sentence", [
    ("x.png", "give either --checkpoint FILE, or --model NAME"),
    ("x.png --model resnet18", "--model needs --weights"),
    ("x.png --checkpoint nowhere.pth", "no such file or folder: x.png"),
    ("val --checkpoint nowhere.pth", "no such file: nowhere.pth"),
    ("val --checkpoint teacher.pth", "Use --model NAME --weights FILE instead"),
    ("val --checkpoint headless.pth", "the network has no classifier"),
    ("empty --checkpoint student.pth", "empty holds no images"),
    ("empty/x.txt --checkpoint student.pth", "none of the 1 images could be read"),
    ("val --checkpoint student.pth --csv empty", "--csv empty must be a file name ending in .csv"),
    ("val --checkpoint student.pth --show a/b.png", "in a folder that exists"),
    ("val --checkpoint student.pth --weights random", "--checkpoint knows its weights"),
])
def test_bad_input_gets_a_sentence(words, sentence, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    Path("empty").mkdir(exist_ok=True)
    Path("empty/x.txt").write_text("x")
    if "teacher" in words:
        torch.save(create_model("resnet_nano", 3).state_dict(), "teacher.pth")
    if "headless" in words:
        monkeypatch.setattr(predict, "load_trained", lambda *_: predict.Trained(
            Headless(), {}, None))
    assert run(*words.split()) == 2
    out, err = capsys.readouterr()
    assert sentence in err.splitlines()[-1] and "Traceback" not in err


class Headless(predict.models.VisionModel):
    num_classes = 0


def test_numbers_where_no_names_are_known():
    assert predict.class_names(None, 2) == ["class 0", "class 1"]
    assert predict.class_names(None, 1000)[0] == "tench"
    assert predict.class_names(["cat", "n02102040"], 2) == ["cat", "English springer"]


def test_torch_hub_from_another_folder(place, tmp_path):
    code = f"""
import torch
from PIL import Image
repository = {str(ROOT)!r}
student = torch.hub.load(repository, "distilled", {str(place / "student.pth")!r}, source="local")
best = student.predict(Image.new("RGB", (80, 80)))
print(student.classes, len(best))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "['tench', 'English springer', 'chain saw'] 3", (
        done.stderr)


def test_what_torch_hub_lists():
    entries = {name for name, value in vars(hubconf).items()
               if callable(value) and not name.startswith("_")}  # as torch.hub.list
    assert entries == {*list_models(), "distilled"}
    model = hubconf.convnext_nano(num_classes=3, depths=(1, 1, 1, 1), drop_path=0.0)
    assert model.num_classes == 3 and not model.training
    assert "options: " in hubconf.slak_t.__doc__ and "kernel_size=51,49,47,13,5," in (
        hubconf.slak_t.__doc__)
