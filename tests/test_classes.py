"""Classes are matched by their names: of a continued run, of two networks; and a teacher that
guesses is told."""
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

import engine
from analysis.common import LoadedModel, validation_images
from analysis.similarity import common_labels
from data import ImageSource, keep_labels
from losses import need_teacher_logits
from utils.classes import are_numbers, imagenet_wnids
from utils.registry import UserError

WNIDS = imagenet_wnids()


class Source(ImageSource):
    def __init__(self, classes: list[str]) -> None:
        self.classes = classes

    def relabel(self, classes: list[str]) -> None:
        self.classes = list(classes)


def test_a_continued_run_keeps_its_labels(capsys):
    path, saved = Path("last.pth"), ["0", "1", "10", "2"]
    train, val = Source(["0", "1", "2", "10"]), Source(["0", "1", "2", "10"])
    for content in (None, (path, {}), (path, {"classes": None}), (path, {"classes": [1]})):
        keep_labels(content, train, val)
        assert train.classes == ["0", "1", "2", "10"] and capsys.readouterr().out == ""
    keep_labels((path, {"classes": saved}), train, val)
    assert train.classes == val.classes == saved
    assert "labels are those of last.pth" in capsys.readouterr().out
    with pytest.raises(UserError, match="last.pth is from a run on other classes .a, b, c; here 0"):
        keep_labels((path, {"classes": ["a", "b", "c"]}), train, val)


def network(classes: list[str] | None, number: int = 0) -> LoadedModel:
    model = SimpleNamespace(num_classes=number or len(classes or ()))
    return LoadedModel("net", "net", ["net"], model, {}, classes)


@pytest.mark.parametrize("first, other, labels", [
    (network(["a", "b"]), network(["a", "b"]), ([0, 1], [0, 1])),
    (network(["a", "b"]), network(["b", "a"]), ([0, 1], [1, 0])),
    (network(["a", "b", "c"]), network(["c", "a"]), ([2, 0], [0, 1])),
    (network(["a", "b"]), network(["b", "c"]), None),
    (network(["a", "b", "c"]), network(["b", "d"]), None),
    (network(None, 3), network(None, 3), ([0, 1, 2], [0, 1, 2])),
    (network(None, 3), network(["a", "b", "c"]), ([0, 1, 2], [0, 1, 2])),
    (network(None, 3), network(None, 4), None),
    (network(None, 1000), network([WNIDS[5], WNIDS[1]]), ([5, 1], [0, 1])),
    (network(WNIDS), network(None, 1000), ([*range(1000)], [*range(1000)])),
    (network(None, 0), network(None, 0), None)])
def test_two_networks_are_compared_on_the_classes_of_both(first, other, labels):
    assert common_labels(first, other) == labels


def test_a_run_that_does_not_name_its_data_is_looked_at_on_folders():
    with pytest.raises(UserError, match="imagefolder needs --data-path"):
        validation_images(None, None, [network(["a"])._replace(settings={"student": ["net"]})])


@pytest.mark.parametrize("names, expected", [
    (["0", "1"], True), (["00", "01"], True), (["1", "0"], False), (["0", "2"], False),
    (["a", "1"], False), (["0", "\u0661"], False)])
def test_numbers_that_are_the_labels(names, expected):
    assert are_numbers(names) is expected


@pytest.mark.parametrize("acc1, num_classes, num_samples, warns", [
    (8.75, 10, 160, True), (12.0, 10, 160, True), (30.0, 10, 160, False), (71.0, 10, 160, False),
    (0.11, 1000, 50_000, True), (0.2, 1000, 50_000, False), (50.0, 2, 10, True),
    (60.0, 2, 10, False), (100.0, 3, 4, False), (100.0, 1, 10, False), (0.0, 10, 0, True)])
def test_a_teacher_that_guesses_is_told(acc1, num_classes, num_samples, warns, capsys):
    engine.warn_of_guessing(acc1, num_classes, num_samples)
    shown = capsys.readouterr().out
    assert shown.startswith("warning: the teacher's top-1") if warns else shown == ""


def test_logits_that_are_nan_have_no_accuracy():
    whole = engine.Evaluation(50.0, 100.0, 1.0, None, 2, {})
    engine.refuse_nan(whole, "the teacher's")
    with pytest.raises(UserError, match="^the teacher's logits are NaN"):
        engine.refuse_nan(whole._replace(loss=math.nan), "the teacher's")


@pytest.mark.parametrize("specs, needed", [
    ([["ce"], ["fd"]], False), ([["ce"], ["fd", "weight=2"], ["mgd"]], False), ([["nkd"]], True),
    ([["fd"], ["kd"]], True), ([["ce"]], False)])
def test_which_losses_need_the_teachers_logits(specs, needed):
    assert need_teacher_logits(specs) is needed
