"""What bad input gets: a sentence that tells what was got, expected and to change; exit code 2;
no training time spent; nothing written or overwritten."""
import builtins
import errno
import hashlib
import io
import json
import math
import os
import shutil
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100

import engine
import eval as evaluation
import train_kd
from losses.nkd import NormalizedKnowledgeDistillation
from models import create_model
from utils import files
from utils.checkpoint import load_file
from utils.content import CHECKSUMS

BASE = ["--data-set", "outlines", "train_size=40", "val_size=8", "--input-size", "32",
        "--batch-size", "10", "--effective-batch", "10", "--warmup-epochs", "0", "--epochs", "2",
        "--num-workers", "0", "--lr", "1e-3", "--aa", "none"]
ALONE = ["--teacher", "none", "--student", "resnet_nano"]
TAUGHT = ["--teacher", "slak_nano", "--teacher-weights", "random", "--student", "resnet_nano"]
FOLDER = ["--data-set", "imagefolder", "--data-path", "images", "--input-size", "32",
          "--batch-size", "4", "--effective-batch", "4", "--mixup", "0", "--cutmix", "0", *ALONE]


def contents(folder: Path) -> dict[str, str]:
    """Every path below a folder, with a digest of each file."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file() else "folder" for path in folder.rglob("*")
            if "hub" not in path.parts or path.is_file()}  # a download cache may be made, empty


class Runner:
    """Starts the program inside a folder and reads what it said."""

    def __init__(self, folder: Path, capsys, monkeypatch) -> None:
        self.folder, self.capsys, self.monkeypatch = folder, capsys, monkeypatch

    def train(self, *words: str) -> int:
        return train_kd.main([*BASE, *words])

    def evaluate(self, *words: str) -> int:
        return evaluation.main(["--batch-size", "4", "--num-workers", "0", *words])

    def fails(self, *words: str, telling: tuple[str, ...], program: str = "train") -> str:
        """Start; check the exit code and the sentence, which holds each of `telling`."""
        self.capsys.readouterr()
        code = getattr(self, program)(*map(str, words))
        said = self.capsys.readouterr().err
        start = {"train": "train_kd.py", "evaluate": "eval.py"}[program] + ": error: "
        # Progress bars, where training began, stand before it.
        message = said[said.find(start):].removeprefix(start)
        assert code == 2 and start in said, said
        assert "Traceback" not in said, said
        assert "\x1b" not in message, message
        assert len(message.splitlines()) == 1 or "YAML" in message, message
        for word in telling:
            assert word in message, f"{word!r} is not in: {message}"
        return message

    def refused(self, *words: str, telling: tuple[str, ...], program: str = "train") -> str:
        """As `fails`, before any training and without a trace on the disk."""
        def too_late(*args, **kwargs):
            pytest.fail("it was noticed only when training had begun")

        before = contents(self.folder)
        with self.monkeypatch.context() as patch:
            patch.setattr(engine, "train_one_epoch", too_late)
            patch.setattr(engine, "evaluate", too_late)
            message = self.fails(*words, telling=telling, program=program)
        assert contents(self.folder) == before
        return message


@pytest.fixture
def runner(tmp_path, capsys, monkeypatch) -> Runner:
    torch.set_num_threads(1)  # nothing here is large enough for two
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def offline(url, *args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    return Runner(tmp_path, capsys, monkeypatch)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A folder with runs/<one run of one epoch>."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    words = [*ALONE, "--epochs", "1", "--output-dir", str(folder / "r" / "run")]
    assert train_kd.main([*BASE, *words]) == 0
    return folder / "r"


@pytest.fixture
def old_run(finished_run, tmp_path) -> Path:
    """The same in the test's own folder: its run folder."""
    shutil.copytree(finished_run, tmp_path / "runs")
    (run,) = (tmp_path / "runs").iterdir()
    return run


OLD = [*ALONE, "--epochs", "1", "--output-dir", "runs/run"]  # what made it


# Words


WORDS = {
    "unknown flag": (["--mix-up", "0"], ("--mix-up", "Did you mean '--mixup'")),
    "misspelt path": (["--data_pth", "x"], ("--data-pth", "'--data-path'")),
    "stray word": (["resnet50"], ("resnet50",)),
    "flag without value": (["--student"], ("--student", "argument")),
    "config without value": (["--config"], ("--config", "argument")),
    "ill-typed flag": (["--epochs", "ten"], ("--epochs", "'ten'", "whole number")),
    "unknown choice": (["--amp", "fp8"], ("--amp", "fp8", "bf16", "fp16")),
    "no epochs": (["--epochs", "0"], ("--epochs", "at least 1", "got 0")),
    "negative lr": (["--lr=-1"], ("--lr", "got -1")),
    "nan lr": (["--lr", "nan"], ("--lr", "got nan")),
    "negative seed": (["--seed=-1"], ("--seed", "got -1")),
    "ema decay": (["--model-ema-decay", "1"], ("--model-ema-decay", "got 1")),
    "betas": (["--opt-betas", "0.9", "1.5"], ("--opt-betas", "1.5")),
    "one beta": (["--opt-betas", "0.9"], ("--opt-betas", "2 arguments")),
    "eps": (["--opt-eps=-1"], ("--opt-eps", "-1")),
    "decay end": (["--weight-decay-end", "nan"], ("--weight-decay-end", "nan")),
    "layer decay": (["--layer-decay", "0"], ("--layer-decay", "(0, 1]", "got 0")),
    "crop": (["--crop-pct", "2"], ("crop_pct", "2", "[0.0625, 1]")),
    "scale": (["--input-size", "48", "--scale", "0.5", "0.1"], ("scale", "0.5", "0.1")),
    "mixup": (["--mixup=-1"], ("mixup", "-1")),
    "smoothing": (["--smoothing", "1"], ("smoothing", "got 1", "[0, 1)")),
    "erasing": (["--reprob", "2"], ("--reprob", "got 2", "from 0 to 1")),
    "policy": (["--aa", "augmix"], ("augmix", "rand-m9")),
    "nothing to see": (["--input-size", "8", "--student", "convnext_nano"], ("--input-size", "8")),
    "student of one size": (["--student", "vit_nano"], ("--input-size", "32", "224")),
    "unknown student": (["--student", "resnet5"], ("'resnet5'", "Known:", "Did you mean")),
    "unknown teacher": (["--teacher", "slak_tt"], ("'slak_tt'", "slak_t", "models/__init__.py")),
    "unknown loss": (["--loss", "nkdd"], ("'nkdd'", "Known: bce, ce", "nkd", "losses/__init__.py")),
    "unknown data set": (["--data-set", "imagent"], ("'imagent'", "imagefolder", "'imagenet'")),
    "model option": (["--student", "resnet_nano", "drop_pth=0.1"], ("drop_pth", "'drop_path'")),
    "loss option": (["--loss", "ce", "smoothing=1"], ("smoothing", "'ce'", "label_smoothing")),
    "data option": (["--data-set", "outlines", "train_sise=4"], ("train_sise", "'train_size'")),
    "model type": (["--student", "resnet_nano", "drop_path=high"],
                   ("drop_path", "'high'", "float")),
    "loss type": (["--loss", "ce", "label_smoothing=a"], ("label_smoothing", "'a'", "float")),
    "data type": (["--data-set", "outlines", "train_size=1.5"], ("train_size", "1.5", "int")),
    "no key": (["--student", "resnet_nano", "0.1"], ("--student", "'0.1'", "key=value")),
    "no value": (["--student", "resnet_nano", "drop_path="], ("'drop_path='", "key=value")),
    "no name": (["--loss", "weight=2"], ("--loss", "name first", "weight=2")),
    "drop path": (["--student", "resnet_nano", "drop_path=1.5"], ("drop_path", "1.5")),
    "data size": (["--data-set", "outlines", "train_size=0"], ("at least 1", "got 0")),
    "loss twice": (["--loss", "ce", "--loss", "ce"], ("--loss ce", "twice", "once")),
    "loss without teacher": (["--loss", "kd"], ("'kd'", "--teacher", "--loss ce")),
    "weight type": (["--loss", "ce", "weight=heavy"], ("--loss ce", "weight", "'heavy'")),
    "weight nan": (["--loss", "ce", "weight=nan"], ("--loss ce", "weight", "nan")),
    "smooth twice": (["--loss", "ce", "label_smoothing=0.1"], ("label_smoothing", "--smoothing")),
    "batch does not divide": (["--effective-batch", "25"],
                              ("--effective-batch 25", "10", "--accum-steps")),
    "batch too small": (["--effective-batch", "5"], ("--effective-batch 5", "10", "--batch-size")),
    "contradiction": (["--effective-batch", "20", "--accum-steps", "4"],
                      ("--effective-batch 20", "--accum-steps 4", "40", "Leave one")),
    "odd batch": (["--batch-size", "5", "--effective-batch", "5"], ("even", "got 5", "mixup")),
    "more than the data": (["--effective-batch", "80"], ("40 images", "80", "Lower")),
    "warm-up epochs": (["--warmup-epochs", "3"], ("warm-up of 12", "8", "--warmup-epochs")),
    "warm-up steps": (["--warmup-steps", "9"], ("warm-up of 9", "8", "--warmup-steps")),
    "student weights": (["--student-weights", "none.pth"], ("--student-weights", "none.pth")),
}


@pytest.mark.parametrize("case", WORDS)
def test_words(case, runner):
    words, telling = WORDS[case]
    runner.refused(*ALONE, *words, telling=telling)


TEACHING = {
    "fd alone": (["--loss", "fd"], ("--loss fd", "head untrained", "ce, kd or nkd")),
    "teacher not used": (["--loss", "ce"], ("teacher is not used", "ce", "--teacher none")),
    "stage 4": (["--loss", "nkd", "--loss", "fd", "features=4"], ("features=4", "[-4, 3]")),
    "stage -5": (["--loss", "nkd", "--loss", "fd", "features=0,-5"], ("features=0,-5", "4 stage")),
    "no stage": (["--loss", "nkd", "--loss", "fd", "features=a"], ("features=a", "[-4, 3]")),
    "one stage": (["--teacher", "vit_nano", "--loss", "nkd", "--loss", "fd", "features=-2"],
                  ("features=-2", "teacher has 1 stage", "features=-1")),
    "equal channels": (["--loss", "nkd", "--loss", "fd", "project=false"],
                       ("project=false", "equal channels", "128")),
    "temperature": (["--loss", "kd", "temperature=0"], ("temperature", "positive", "got 0")),
    "alpha": (["--loss", "kd", "alpha=2"], ("alpha", "[0, 1]", "got 2")),
    "kernel": (["--teacher", "slak_nano", "kernel_size=30,15,7,3,5"], ("odd", "30")),
    "teacher too large": (["--teacher", "convnext_nano", "--input-size", "8"], ("--input-size",)),
}


@pytest.mark.parametrize("case", TEACHING)
def test_teacher_and_losses(case, runner):
    words, telling = TEACHING[case]
    runner.refused(*TAUGHT, *words, telling=telling)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(runner):
    runner.refused(*ALONE, "--device", "cuda", telling=("--device", "cuda", "cpu"))


@pytest.mark.parametrize("words, module, telling", [
    ("--tensorboard", "torch.utils.tensorboard", ("--log-to tensorboard", "pip install tensorb")),
    ("--log-to wandb", "wandb", ("--log-to wandb", "pip install wandb")),
    ("--log-to tensorbord", "x", ("--log-to", "tensorboard"))])
def test_a_place_for_figures_is_not_there(words, module, telling, runner, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    runner.refused(*ALONE, *words.split(), telling=telling)


# Weights


def test_published_weights_offline(runner):
    message = runner.refused("--teacher", "resnet18", "--student", "resnet_nano", telling=(
        "--teacher-weights", "resnet18-f37072fd.pth", "Name or service not known", "by hand"))
    assert str(runner.folder / "hub") in message


def test_an_address_offline(runner):
    runner.refused(*TAUGHT, "--teacher-weights", "https://example.org/slak.pth",
                   telling=("--teacher-weights", "https://example.org/slak.pth", "by hand"))


def test_no_published_weights(runner):
    runner.refused(*TAUGHT, "--teacher-weights", "published",
                   telling=("--teacher-weights", "'slak_nano'", "known: slak_t", "random"))


def write_weights(path: Path, name: str = "slak_nano", num_classes: int = 10) -> None:
    torch.save({"model": create_model(name, num_classes).state_dict()}, path)


WEIGHTS = {
    "missing": (lambda path: None, ("no such file",)),
    "folder": (Path.mkdir, ("not a readable",)),
    "truncated": (lambda path: (write_weights(path), os.truncate(path, 20_000)),
                  ("not a readable",)),
    "text": (lambda path: path.write_text("<html>Too many requests</html>"), ("not a readable",)),
    "empty": (lambda path: path.touch(), ("not a readable",)),
    "other model": (lambda path: write_weights(path, "convnext_nano"),
                    ("does not fit SLaK", "missing", "unexpected", "name and options")),
    "other classes": (lambda path: write_weights(path, num_classes=7),
                      ("has 7 classes and does not name them", "data has 10", "--loss fd")),
    "no weights": (lambda path: torch.save({"epoch": 3}, path), ("no weights", "epoch")),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_teacher_weights_that_do_not_load(case, runner):
    make, telling = WEIGHTS[case]
    make(runner.folder / "teacher.pth")
    runner.refused(*TAUGHT, "--teacher-weights", "teacher.pth",
                   telling=("--teacher-weights", "teacher.pth", *telling))


# Recipes


RECIPES = {
    "unknown key": ("epochs: 2\nlearning-rte: 1\nsmothing: 0\n", ("'learning-rte'",)),
    "near key": ("smothing: 0\n", ("'smothing'", "Did you mean 'smoothing'")),
    "wrong type": ("epochs: ten\n", ("epochs", "ten", "whole number")),
    "float for int": ("epochs: 1.5\n", ("epochs", "1.5", "whole number")),
    "not boolean": ("model-ema: 1\n", ("model-ema", "true or false", "got 1")),
    "wrong number": ("opt-betas: [0.9]\n", ("opt-betas", "expected 2")),
    "wrong choice": ("amp: fp8\n", ("amp", "fp8", "bf16")),
    "no number": ("epochs:\n", ("epochs", "a value", "300")),
    "null": ("smoothing: null\n", ("smoothing", "a value", "0.1")),
    "unknown loss": ("loss: nkdd\n", ("'nkdd'", "nkd")),
    "mapping": ("lr: {start: 1}\n", ("lr", "words or numbers", "'start'")),
    "not YAML": ("epochs: [1, 2\nlr: 3\n", ("YAML",)),
    "binary": (b"\xff\xfe\x00\x80", ("a mapping",)),
    "list": ("- epochs: 2\n", ("mapping",)),
    "text": ("epochs\n", ("mapping",)),
    "nested recipe": ("config: other.yaml\n", ("'config'",)),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(case, runner):
    content, telling = RECIPES[case]
    path = runner.folder / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    where = () if case == "unknown loss" else ("--config", "recipe.yaml")
    # The command line's words would win over the recipe's.
    words = [word for word in BASE if word not in ("--epochs", "2", "--lr", "1e-3")]
    runner.monkeypatch.setattr(runner, "train", lambda *more: train_kd.main([*words, *more]))
    runner.refused(*ALONE, "--config", "recipe.yaml", telling=(*where, *telling))


def test_recipe_that_is_not_there(runner):
    runner.refused("--config", "recipe.yaml", telling=("--config", "No such file", "recipe.yaml"))
    (runner.folder / "recipe.yaml").mkdir()
    runner.refused("--config", "recipe.yaml", telling=("--config", "recipe.yaml"))


# Folders of images


def write_image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (36, 34, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_images(root: Path, num_train: int = 4, num_val: int = 3, classes: tuple = ("ant", "bee")
             ) -> Path:
    for split, number in (("train", num_train), ("val", num_val)):
        for name in classes:
            for i in range(number):
                write_image(root / split / name / f"{i}.jpg", i)
    return root


def drop(*parts: str):
    return lambda root: shutil.rmtree(root.joinpath(*parts))


def other_classes(root: Path) -> None:
    (root / "val" / "bee").rename(root / "val" / "wasp")


def no_class_folders(root: Path) -> None:
    for name in ("ant", "bee"):
        shutil.rmtree(root / "train" / name)
    write_image(root / "train" / "0.jpg")


def empty_class(root: Path) -> None:
    (root / "train" / "cat").mkdir()
    (root / "train" / "cat" / "notes.txt").write_text("none yet")
    write_image(root / "val" / "cat" / "0.jpg")


FOLDERS = {
    "missing": (drop(), ("images", "--data-path", "train/ and val/")),
    "no train": (drop("train"), ("images/train", "--data-path")),
    "no val": (drop("val"), ("images/val", "--data-path")),
    "a file": (lambda root: (shutil.rmtree(root), root.touch()), ("images", "--data-path")),
    "no class folders": (no_class_folders, ("images/train", "no class folders", "<class>")),
    "empty class": (empty_class, ("images/train", "1 class", "cat", "Fill or remove")),
    "class only in val": (drop("train", "bee"), ("1 classes", "only in val: bee")),
    "other class": (other_classes, ("only in train: bee", "only in val: wasp")),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(case, runner):
    change, telling = FOLDERS[case]
    change(write_images(runner.folder / "images"))
    runner.refused(*FOLDER, telling=telling)


def test_no_data_path(runner):
    for name in ("imagefolder", "cifar100"):
        runner.refused(*ALONE, "--data-set", name, telling=(f"--data-set {name}", "--data-path"))
    runner.refused(*ALONE, "--data-path", "images", telling=("outlines", "--data-path images"))


def test_cifar_offline(runner, monkeypatch):
    def download(self) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(CIFAR100, "download", download)
    runner.refused(*ALONE, "--data-set", "cifar100", "--data-path", "cifar",
                   telling=("cifar100", "not known", "cifar-100-python"))


# ImageBatch that cannot be read


def spoil(path: Path, how: str) -> None:
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes({"text": b"Not Found\n", "empty": b""}[how])


SPOILT = {"truncated": "ant/0.jpg", "text": "ant/1.jpg", "empty": "bee/2.jpg"}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("how, workers", [("truncated", 0), ("text", 2), ("empty", 0)])
def test_an_unreadable_image_stops_the_run_with_its_name(how, workers, split, runner):
    root = write_images(runner.folder / "images")
    spoil(root / split / "ant" / "1.jpg", how)
    runner.fails(*FOLDER, "--num-workers", workers, "--epochs", "1", telling=(
        f"images/{split}/ant/1.jpg", "Repair or remove", "--skip-bad-images"))


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_named_once_and_not_counted(workers, runner):
    root = write_images(runner.folder / "images")
    for how, name in SPOILT.items():
        spoil(root / "train" / name, how)
        spoil(root / "val" / name, how)
    words = ["--skip-bad-images", "--num-workers", str(workers)]
    assert runner.train(*FOLDER, *words, "--output-dir", "runs/run") == 0
    printed = runner.capsys.readouterr().err
    for split in ("train", "val"):
        for name in SPOILT.values():
            assert printed.count(f"cannot read the image images/{split}/{name}") == 1
        assert printed.count(f"cannot read the image images/{split}") == 3
    assert "skipped, 3 so far" in printed
    (run,) = (runner.folder / "runs").iterdir()
    assert runner.evaluate("--checkpoint", str(run / "checkpoint-last.pth"), "--data-path",
                           "images", *words, "--predictions", "seen.npz") == 0
    printed = runner.capsys.readouterr().out
    assert printed.split("top-1")[0].split()[-1] == "3"  # 6 images, 3 of them readable
    seen = np.load("seen.npz")
    assert [str(name).removeprefix("images/val/") for name in seen["name"]] == [
        "ant/2.jpg", "bee/0.jpg", "bee/1.jpg"]
    accuracy = 100 * np.mean(seen["top5"][:, 0] == seen["label"])
    assert f"{accuracy:.2f} %" in printed and accuracy > 0
    last = json.loads((run / "log.txt").read_text().splitlines()[-1])
    assert last["test_acc1"] == pytest.approx(accuracy)
    assert last["skipped_train"] == last["skipped_test"] == 3


@pytest.mark.parametrize("words", [[], ["--skip-bad-images"]])
@pytest.mark.parametrize("workers", [0, 2])
def test_no_image_can_be_read(words, workers, runner):
    root = write_images(runner.folder / "images")
    for path in (root / "train").rglob("*.jpg"):
        spoil(path, "text")
    message = runner.fails(*FOLDER, *words, "--num-workers", workers,
                           telling=("none of the 8 images", "images/train/", "no image of a kind"))
    assert len(message.strip().splitlines()) == 1


# Runs that are there already


def test_settings_of_another_run_are_listed(old_run, runner):
    message = runner.refused(*OLD, "--lr", "2e-3", "--smoothing", "0", "--model-ema", telling=(
        "checkpoint-last.pth", "lr: 0.001 there, 0.002 here", "smoothing: 0.1 there, 0.0 here",
        "model_ema: False there, True here", "--output-dir"))
    assert "mixup:" not in message


DIFFERENT = {
    "student": (["--student", "convnext_nano"], "student: ['resnet_nano'] there"),
    "student option": (["--student", "resnet_nano", "drop_path=0.1"], "drop_path=0.1"),
    "teacher": (TAUGHT, "teacher: ['none'] there, ['slak_nano'] here"),
    "loss": (["--loss", "ce", "weight=2"], "loss: [['ce']] there, [['ce', 'weight=2']] here"),
    "data size": (["--data-set", "outlines", "train_size=50", "val_size=8"],
                  "train_size: 40 there, 50 here"),
    "recipe": (["--reprob", "0"], "reprob: 0.25 there, 0.0 here"),
    "length": (["--epochs", "2"], "epochs: 1 there, 2 here"),
    "seed": (["--seed", "1"], "seed: 0 there, 1 here"),
    "effective batch": (["--effective-batch", "20"], "effective_batch: 10 there, 20 here"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_resume_of_another_run(case, old_run, runner):
    words, telling = DIFFERENT[case]
    runner.refused(*OLD, *words, "--output-dir", "elsewhere", "--resume",
                   old_run / "checkpoint-last.pth", telling=("checkpoint-last.pth", telling))


def test_resume_may_change_what_is_not_computed(old_run, runner):
    assert runner.train(*OLD, "--num-workers", "1", "--print-every", "3", "--batch-size", "10") == 0


def test_a_run_is_not_started_over(old_run, runner):
    runner.refused(*OLD, "--no-auto-resume", telling=(old_run.name, "already", "--output-dir"))


def test_resume_does_not_overwrite_another_run(old_run, runner):
    shutil.copytree(old_run, runner.folder / "copy")
    runner.refused(*OLD, "--resume", runner.folder / "copy" / "checkpoint-last.pth",
                   telling=(old_run.name, "overwrite", "--output-dir"))


def test_the_same_command_with_resume_goes_on_where_it_was(old_run, runner):
    """A cluster starts it again; the folder's own checkpoint then continues the named one."""
    shutil.copy(old_run / "checkpoint-last.pth", "other.pth")
    content = load_file(old_run / "checkpoint-last.pth")
    del content[CHECKSUMS]
    content["args"]["resume"] = "other.pth"
    torch.save(content, old_run / "checkpoint-last.pth")
    assert runner.train(*OLD, "--resume", "other.pth") == 0
    runner.refused(*OLD, "--resume", "other.pth", "--no-auto-resume", telling=("overwrite",))


@pytest.mark.parametrize("left", ["checkpoint-best.pth", "checkpoint-0.pth"])
def test_a_run_without_its_last_checkpoint_is_not_overwritten(left, old_run, runner):
    for path in old_run.glob("checkpoint-*.pth"):
        if path.name != left:
            path.unlink()
    runner.refused(*OLD, "--lr", "2e-3", telling=(old_run.name, "--output-dir"))


def trained_otherwise(path: Path) -> None:
    content = load_file(path)
    del content[CHECKSUMS]
    content["model"]["conv9.weight"] = content["model"].pop("conv1.weight")
    torch.save(content, path)


def without_losses(path: Path) -> None:
    content = load_file(path)
    del content[CHECKSUMS], content["losses"]
    torch.save(content, path)


BROKEN = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "text": lambda path: path.write_text("checkpoint"),
    "a list": lambda path: torch.save([1], path),
    "weights alone": lambda path: torch.save({"model": load_file(path)["model"]}, path),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("case", BROKEN)
def test_resume_of_no_checkpoint(case, old_run, runner):
    path = old_run / "checkpoint-last.pth"
    other = path.rename(runner.folder / "other.pth")
    BROKEN[case](other)
    shutil.rmtree(old_run)
    runner.refused(*OLD, "--resume", "other.pth", telling=("other.pth",))


@pytest.mark.parametrize("case", sorted(BROKEN.keys() - {"missing", "weights alone"}))
def test_a_corrupt_last_checkpoint_is_left_and_a_way_out_is_named(case, old_run, runner):
    BROKEN[case](old_run / "checkpoint-last.pth")
    message = runner.refused(*OLD, telling=("checkpoint-last.pth",))
    assert "--resume" in message or "--output-dir" in message


@pytest.mark.parametrize("change", [trained_otherwise, without_losses])
def test_a_checkpoint_with_other_keys(change, old_run, runner):
    change(old_run / "checkpoint-last.pth")
    wrong = "conv1.weight" if change is trained_otherwise else "losses"
    runner.refused(*OLD, telling=("checkpoint-last.pth", wrong))


# Where nothing can be written


def test_a_file_in_place_of_the_output_folder(runner):
    (runner.folder / "runs").write_text("notes")
    runner.refused(*ALONE, "--output-dir", "runs/run", telling=("runs", "could not write"))


def test_a_file_in_place_of_the_run_folder(runner):
    (runner.folder / "runs").mkdir()
    (runner.folder / "runs" / "run").write_text("notes")
    runner.refused(*ALONE, "--output-dir", "runs/run", telling=("runs/run", "could not write"))


class FullDisk(io.FileIO):
    """A file on a disk that is full after 20,000 bytes."""

    def write(self, content) -> int:
        if self.tell() + len(content) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content)


def full_on_flush(monkeypatch) -> None:
    def fsync(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def full_on_write(monkeypatch) -> None:
    monkeypatch.setattr(files, "open", lambda path, mode: FullDisk(path, mode), raising=False)


def full_for_the_log(monkeypatch) -> None:
    real = Path.write_text

    def write_text(path: Path, text: str, *args, **kwargs) -> int:
        if path.name.startswith("log.txt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)
    real_open = builtins.open

    def open_other(path, *args, **kwargs):
        if Path(str(path)).name.startswith("log.txt") and (args or ["r"])[0] != "r":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", open_other)


def after_first_epoch(monkeypatch, act) -> None:
    """Call `act(monkeypatch)` when the second epoch begins."""
    train_one_epoch = engine.train_one_epoch

    def train(state, *args, **kwargs):
        if state.epoch == 1:
            act(monkeypatch)
        return train_one_epoch(state, *args, **kwargs)

    monkeypatch.setattr(engine, "train_one_epoch", train)


def assert_first_epoch_is_kept(folder: Path, step: int = 4) -> None:
    (run,) = (folder / "runs").iterdir()
    saved = load_file(run / "checkpoint-last.pth")
    assert saved["epoch"] == 1 and saved["step"] == step
    tensors = [value for key in ("model", "losses") for value in saved[key].values()]
    tensors += [value for values in saved["optimizer"]["state"].values()
                for value in values.values()]
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert not list(run.glob("*.tmp"))
    lines = (run / "log.txt").read_text().splitlines()
    assert all(math.isfinite(json.loads(line)["train_loss"]) for line in lines) and lines


@pytest.mark.parametrize("act", [full_on_flush, full_on_write, full_for_the_log])
def test_no_space_left(act, runner):
    with pytest.MonkeyPatch.context() as patch:
        after_first_epoch(patch, act)
        runner.fails(*ALONE, "--output-dir", "runs/run", telling=(
            "runs/run", "No space left", "Make room"))
    # The log comes last: the second epoch is saved by then, its evaluation is to be repeated.
    assert_first_epoch_is_kept(runner.folder, step=8 if act is full_for_the_log else 4)
    assert runner.train(*ALONE, "--output-dir", "runs/run") == 0  # what the message says


# Losses that are not finite


def test_nan_loss_names_everything_and_keeps_the_last_good_checkpoint(runner, monkeypatch):
    def broken(patch) -> None:
        forward, seen = NormalizedKnowledgeDistillation.forward, []

        def second_is_nan(self, *args):
            seen.append(self)
            return forward(self, *args) * (math.nan if len(seen) > 1 else 1)

        patch.setattr(NormalizedKnowledgeDistillation, "forward", second_is_nan)

    after_first_epoch(monkeypatch, broken)
    runner.fails(*TAUGHT, "--loss", "nkd", "--loss", "fd", "--output-dir", "runs/run",
                 "--save-freq", "1", "--print-every", "4", "--warmup-epochs", "1", telling=(
        "'nkd'", "update 5", "nkd ", "fd ", "loss ", "lr 1.5e-04", "gradient scale 1",
        "Lower --lr", "checkpoint"))
    assert_first_epoch_is_kept(runner.folder)


@pytest.mark.parametrize("every", ["1", "50"])
def test_a_rate_that_is_far_too_high(every, runner):
    runner.fails(*ALONE, "--lr", "1e30", "--output-dir", "runs/run", "--print-every", every,
                 "--save-every-steps", "1", telling=(
                     "NaN or infinite", "lr 9.6e+29", "Lower --lr"))
    for path in (runner.folder / "runs").rglob("*.pth"):
        assert all(value.isfinite().all() for value in load_file(path)["model"].values()), path


@pytest.mark.parametrize("words", [[], ["--save-every-steps", "1"]])
def test_nan_gradient_of_an_epochs_last_update_is_never_saved(words, runner, monkeypatch):
    """The loss is finite, the weights are not."""
    update = engine.optimizer_update

    def spoil_gradient(state, *args) -> None:
        if state.step == 7:
            next(state.distiller.parameters()).grad[0] = math.nan
        update(state, *args)

    monkeypatch.setattr(engine, "optimizer_update", spoil_gradient)
    runner.fails(*ALONE, "--output-dir", "runs/run", *words, telling=("NaN", "update 7", "lr "))
    (run,) = (runner.folder / "runs").iterdir()
    for path in run.glob("*.pth"):
        saved = load_file(path)
        assert all(value.isfinite().all() for value in saved["model"].values()), path
        assert saved["step"] == (7 if words and "last" in path.name else 4), path


# eval.py


EVAL = {
    "neither": ([], ("--checkpoint", "--model")),
    "both": (["--checkpoint", "own.pth", "--model", "resnet_nano"], ("--checkpoint", "--model")),
    "no weights": (["--model", "resnet_nano"], ("--model", "--weights", "published")),
    "weights too": (["--checkpoint", "own.pth", "--weights", "own.pth"], ("--weights", "--model")),
    "unknown flag": (["--checkpont", "own.pth"], ("--checkpont", "'--checkpoint'")),
    "unknown model": (["--model", "resnet_nan", "--weights", "own.pth"],
                      ("'resnet_nan'", "Did you mean 'resnet_nano'")),
    "not published": (["--model", "resnet_nano", "--weights", "published"],
                      ("'resnet_nano'", "known: slak_t")),
    "missing": (["--checkpoint", "no.pth"], ("no such file", "no.pth")),
    "not ours": (["--checkpoint", "bare.pth"], ("bare.pth", "--model NAME --weights FILE")),
    "corrupt": (["--checkpoint", "text.pth"], ("text.pth", "not a readable")),
    "predictions": (["--checkpoint", "own.pth", "--predictions", "no/such.npz"],
                    ("--predictions", "no/such.npz", "folder that exists")),
    "predictions are no npz": (["--checkpoint", "own.pth", "--predictions", "p.csv"],
                               ("--predictions", "p.csv", ".npz")),
    "predictions are a folder": (["--checkpoint", "own.pth", "--predictions", "d.npz"],
                                 ("--predictions", "d.npz")),
    "no average": (["--checkpoint", "own.pth", "--weights-key", "model_ema"],
                   ("own.pth", "'model_ema'", "it has model")),
    "other classes": (["--model", "resnet_nano", "--weights", "own.pth"],
                      ("own.pth", "(10, 128) instead of (1000, 128)", "--num-classes")),
    "other data": (["--checkpoint", "own.pth", "--data-set", "imagefolder", "--data-path",
                    "images"], ("2 classes", "10", "data set it was trained for")),
    "no such data": (["--checkpoint", "own.pth", "--data-set", "imagefolder", "--data-path", "x"],
                     ("x/val", "--data-path")),
    "input size": (["--checkpoint", "own.pth", "--input-size", "-1"], ("--input-size", "-1")),
    "crop": (["--checkpoint", "own.pth", "--crop-pct", "0"], ("crop_pct", "0.0")),
    "batch": (["--checkpoint", "own.pth", "--batch-size", "0"], ("--batch-size",)),
}


@pytest.mark.parametrize("case", EVAL)
def test_evaluation(case, old_run, runner):
    words, telling = EVAL[case]
    own = shutil.copy(old_run / "checkpoint-last.pth", "own.pth")
    torch.save(load_file(own)["model"], "bare.pth")
    Path("text.pth").write_text("checkpoint")
    Path("d.npz").mkdir()
    write_images(Path("images"), 1, 1)
    runner.refused(*words, telling=telling, program="evaluate")


def test_evaluation_stops_at_an_unreadable_image(runner, tmp_path):
    root = write_images(tmp_path / "images")
    spoil(root / "val" / "bee" / "2.jpg", "truncated")
    write_weights(tmp_path / "own.pth", "resnet_nano", num_classes=2)
    runner.fails("--model", "resnet_nano", "--weights", "own.pth", "--num-classes", "2",
                 "--data-path", "images", "--input-size", "32", program="evaluate",
                 telling=("images/val/bee/2.jpg", "--skip-bad-images"))


def test_predictions_that_cannot_be_written(old_run, runner, monkeypatch):
    def full(*args, **kwargs) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez_compressed", full)
    runner.fails("--checkpoint", old_run / "checkpoint-last.pth", "--predictions", "seen.npz",
                 program="evaluate", telling=("seen.npz", "No space left"))


# What the tests above rest on


def test_late_and_written_are_noticed(runner, monkeypatch):
    with pytest.raises(pytest.fail.Exception, match="only when training had begun"):
        runner.refused(*ALONE, telling=())
    (runner.folder / "notes").write_text("before")
    monkeypatch.setattr(runner, "fails", lambda *words, **kwargs:
                        (runner.folder / "notes").write_text("after"))
    with pytest.raises(AssertionError):
        runner.refused(*ALONE, telling=())
