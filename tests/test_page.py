"""The page: what it shows of runs made by hand, of files, and of two small runs."""
import html.parser
import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

import train_kd
from analysis.page.__main__ import main
from analysis.page.predictions import (
    Predictions,
    confident_mistakes,
    confusions,
    disagreements,
    most_confused,
    on_common_images,
    paired_bootstrap,
)

EVIL = "<script>x('&\"')</script>"  # as a name


class Reader(html.parser.HTMLParser):
    """What a browser would see: tags that close, text, and addresses that it would load."""

    VOID = {"meta", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "

    def attributes(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def sections(self) -> list[str]:
        return [attrs["id"] for attrs in self.attributes("h2")]


def read_page(path) -> Reader:
    """A page asks nothing of any other place."""
    text = path.read_text(encoding="utf-8")
    page = Reader(text)
    addresses = [value for _, attrs in page.tags for name, value in attrs.items()
                 if name in ("src", "href", "xlink:href", "action", "data")]
    assert all(address.startswith(("#", "data:image/jpeg;base64,")) for address in addresses)
    assert not page.attributes("script") and "url(" not in text and "@import" not in text
    return page


def write_run(folder, **changes) -> str:
    folder.mkdir()
    settings = {"teacher": ["none"], "student": ["small"], "loss": [["ce"]], "epochs": 2, "seed": 0,
                "lr": 0.001, "num_workers": 1, **changes}
    (folder / "args.yaml").write_text(yaml.safe_dump(settings))
    records = [{"epoch": i, "test_acc1": 40.0 + i, "train_ce": 2.0 - i, "train_lr": 0.5}
               for i in range(2)]
    (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def write_predictions(path, best: list[int], **changes) -> str:
    number = len(best)
    columns = {"name": np.array([f"somewhere/c/{i}.png" for i in range(number)]),
               "classes": np.array(["a", "b", EVIL]), "index": np.arange(number),
               "label": np.arange(number) % 3, "top5": np.array([[label] * 5 for label in best]),
               "prob": np.linspace(0.5, 0.9, number, dtype=np.float32), **changes}
    np.savez(path, **columns)
    return str(path)


def made(best: list[int], label: str = "x", **changes) -> Predictions:
    number = len(best)
    return Predictions(label, [f"c/{i}.png" for i in range(number)], ["a", "b", "c"],
                       np.arange(number) % 3, np.array(best), np.linspace(0.5, 0.9, number)
                       )._replace(**changes)


def test_settings_that_differ_come_first_and_curves_tell_their_values(tmp_path, capsys):
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", lr=0.01, num_workers=7)]
    assert main([*runs, "--out", str(tmp_path / "p.html"), "--labels", "one", EVIL]) == 0
    assert "settings that differ, curves, table, not on this page" in capsys.readouterr().out
    page = read_page(tmp_path / "p.html")
    assert page.sections == ["settings", "curves", "report", "missing"]
    before, after = page.text.split("where and how they ran", 1)
    assert re.search(r"lr\s+0\.001\s+0\.01", before) and "num_workers" not in before
    assert re.search(r"num_workers\s+1\s+7", after)
    labels = [attrs["aria-label"] for attrs in page.attributes("svg") if "aria-label" in attrs]
    assert [label.split(":")[0] for label in labels] == ["top-1 %", "loss term ce", "learning rate"]
    assert labels[0] == f"top-1 %: one ends at 41 after 2 epochs; {EVIL} ends at 41 after 2 epochs"
    assert "41 after 2 epochs" in page.text  # shown where a dot is pointed at
    assert "lr 0.01" in page.text.split("differs in", 1)[1]
    assert "--data-path" in page.text and "--erf" in page.text


def test_predictions_of_files_and_fields(tmp_path):
    """Two classifiers: the second is wrong twice more. Images lie where their names say."""
    (tmp_path / "erf").mkdir()
    np.save(tmp_path / "erf" / "net.npy", np.eye(300))
    (tmp_path / "erf" / "erf.csv").write_text(
        "network,scale,size,threshold,side\nnet,log,300x300,0.2,17\nnet,log,300x300,0.5,33\n")
    names = [str(tmp_path / f"{i}.png") for i in range(6)]
    Image.new("RGB", (400, 100)).save(names[1])
    files = [write_predictions(tmp_path / "a.npz", [0, 1, 2, 0, 1, 0], name=np.array(names)),
             write_predictions(tmp_path / "b.npz", [0, 2, 2, 1, 1, 0], name=np.array(names))]
    words = [write_run(tmp_path / "run"), "--out", str(tmp_path / "p.html"), "--predictions"]
    assert main([*words, *files]) == 0
    page = read_page(tmp_path / "p.html")
    assert page.sections == ["settings", "curves", "report", "predictions", "confusions",
                             "mistakes", "disagreement", "fields"]
    assert re.search(r"a - b\s+\+33\.33\s+\+0\.00 \.\.\. \+66\.67\s+no\s+2\s+0", page.text)
    assert "10,000 resamples of the 6 images" in page.text and "seed 0" in page.text
    images = page.attributes("img")
    assert [image["alt"] for image in images] == [names[1], names[1],
                                                  "contribution map of net"]
    assert "(image not found)" in page.text and EVIL in page.text
    assert re.search(r"net\s+log\s+300x300\s+17\s+33", page.text)
    assert re.search(r"only a right\s+2\s+33\.3", page.text)
    assert main([*words, *files, "--resamples", "200", "--seed", "1"]) == 0  # over its own page
    assert "200 resamples" in read_page(tmp_path / "p.html").text


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher and its student, started in a folder with relative names."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--data-set", "outlines", "train_size=32", "val_size=24", "image_size=32",
              "--input-size", "32", "--batch-size", "16", "--effective-batch", "16", "--epochs",
              "1", "--num-workers", "0", "--device", "cpu", "--aa", "none"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train_kd.main([*common, "--student", "slak_pico", "--output-dir", "big"]) == 0
        assert train_kd.main([
            *common, "--teacher", "slak_pico", "--teacher-weights", "big/checkpoint-last.pth",
            "--student", "convnext_bn_pico", "--output-dir", "small"]) == 0
    return folder


def test_runs_are_evaluated_with_their_teachers(runs, tmp_path):
    """From another folder; accuracies are those of their logs."""
    assert main([str(runs / "big"), str(runs / "small"), "--data-set", "outlines", "val_size=24",
                 "image_size=32", "--num-workers", "0", "--device", "cpu", "--thumbnails", "3",
                 "--out", str(tmp_path / "p.html")]) == 0
    page = read_page(tmp_path / "p.html")
    for name in ("big", "small"):
        record = json.loads((runs / name / "log.txt").read_text().splitlines()[-1])
        assert re.search(rf"{name}\s+{record['test_acc1']:.2f}\s", page.text), name
    assert re.search(rf"teacher slak_pico\s+{record['teacher_acc1']:.2f}\s", page.text)
    assert f"teacher slak_pico and small: {record['agreement']:.2f} % agreement" in page.text
    assert all(image["src"].startswith("data:image/jpeg") and image["alt"]
               for image in page.attributes("img"))
    assert 0 < len(page.attributes("img")) <= 3 * 3 + 3


def test_what_is_no_file_of_predictions_is_refused(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    good = write_predictions(tmp_path / "good.npz", [0, 1, 2])
    bad = {"other classes": dict(classes=np.array(["a", "b", "z"])),
           "no image in common": dict(name=np.array(["c/7.png", "c/8.png", "c/9.png"])),
           "different labels": dict(label=np.array([0, 1, 1])),
           "do not fit together": dict(label=np.array([0, 1, 9])),
           "is no file of eval.py": dict(top5=np.zeros(3))}
    telling = {"other classes": "different classes"}
    for words, changes in bad.items():
        file = write_predictions(tmp_path / "bad.npz", [0, 1, 2], **changes)
        assert main([run, "--out", str(tmp_path / "p.html"), "--predictions", good, file]) == 2
        assert telling.get(words, words) in capsys.readouterr().err
    (tmp_path / "p.html").write_text("mine")
    assert main([run, "--out", str(tmp_path / "p.html")]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "p.html").read_text() == "mine"


def test_the_bootstrap_covers_the_difference_as_often_as_it_says():
    """200 pairs of classifiers of 60 % and 50 %, each evaluated on 400 images."""
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        first, other = (np.where(rng.random(400) < share, np.arange(400) % 3,
                                 (np.arange(400) + 1) % 3) for share in (0.6, 0.5))
        found = paired_bootstrap(made(first), made(other), 500, seed=trial)
        covered += found.low <= 10 <= found.high
        assert found.points == pytest.approx(
            100 * (np.mean(first == np.arange(400) % 3) - np.mean(other == np.arange(400) % 3)))
    assert 180 <= covered <= 198  # 190 expected, standard deviation 3
    same = made([0, 1, 0])
    assert paired_bootstrap(same, same, 100, 0)[2:] == (0, 0, 0, 0, 0)
    assert paired_bootstrap(made(first), made(other), 500, 3) == paired_bootstrap(
        made(first), made(other), 500, 3)


def test_images_and_classes_are_paired_by_name():
    first = made([0, 1, 2, 0])
    other = first._replace(
        label="y", names=[f"elsewhere/c/{i}.png" for i in (3, 1, 7, 0)], classes=["c", "a", "b"],
        truth=np.array([1, 2, 0, 1]), best=np.array([0, 2, 0, 1]))  # a, b, c, a; as c, b, c, a
    left, right = on_common_images([first, other])
    assert left.names == right.names == ["c/0.png", "c/1.png", "c/3.png"]
    assert left.best.tolist() == [0, 1, 0] and right.best.tolist() == [0, 1, 2]
    assert right.truth.tolist() == left.truth.tolist() == [0, 1, 0]
    assert right.classes == ["a", "b", "c"]
    assert right.prob.tolist() == other.prob[[3, 1, 0]].tolist()


def test_confusions_mistakes_and_disagreements():
    first, other = made([0, 2, 2, 1, 2, 2]), made([0, 1, 1, 1, 2, 0])
    assert confusions(first).tolist() == [[1, 1, 0], [0, 0, 2], [0, 0, 2]]
    assert most_confused(first, 5) == [("b", "c", 2, 2), ("a", "b", 1, 2)]
    assert confident_mistakes(first, 2) == [4, 3]  # the surest
    assert disagreements(first, other, 2) == [5, 2]
