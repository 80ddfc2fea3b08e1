"""Curves of runs, from run folders made by hand."""
import csv
import json

import pytest
import yaml
from PIL import Image

from analysis.curves import main


def write_run(folder, losses: list[str], records: list[dict]) -> str:
    folder.mkdir()
    settings = {"teacher": ["none"], "student": ["small"], "loss": [[name] for name in losses],
                "epochs": 3, "seed": 0}
    (folder / "args.yaml").write_text(yaml.safe_dump(settings))
    (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


@pytest.fixture
def runs(tmp_path) -> list[str]:
    one = [{"epoch": i, "test_acc1": 10.0 * i, "train_loss": 3.0 - i, "train_ce": 3.0 - i,
            "train_lr": 1e-6, "agreement": None} for i in range(3)]
    two = [{"epoch": i, "test_acc1": 20.0 * i, "test_acc1_ema": 21.0, "train_loss": 2.0 - i,
            "train_nkd": 1.5, "train_fd": 0.5, "agreement": 30.0} for i in range(2)]
    return [write_run(tmp_path / "one", ["ce"], one),
            write_run(tmp_path / "two", ["nkd", "fd"], two)]


def table(path) -> list[tuple[str, ...]]:
    with open(path, newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def test_accuracy_and_each_loss_term_of_each_run(runs, tmp_path, capsys):
    assert main([*runs, "--out", str(tmp_path / "c")]) == 0
    assert ("test_acc1, test_acc1_ema, train_ce, train_loss, train_nkd, train_fd of 2 run(s)"
            in capsys.readouterr().out)
    rows = table(tmp_path / "c.csv")
    assert [row for row in rows if row[1] == "test_acc1"] == [
        ("one", "test_acc1", "0", "0.0"), ("one", "test_acc1", "1", "10.0"),
        ("one", "test_acc1", "2", "20.0"), ("two", "test_acc1", "0", "0.0"),
        ("two", "test_acc1", "1", "20.0")]
    assert ("two", "train_fd", "1", "0.5") in rows and ("one", "train_ce", "2", "1.0") in rows
    pytest.importorskip("matplotlib")
    with Image.open(tmp_path / "c.png") as plot:
        assert len(plot.convert("RGB").getcolors(10 ** 6)) > 20


def test_more_keys_and_names(runs, tmp_path, capsys):
    out = str(tmp_path / "c")
    words = [*runs, "--also", "train_lr", "agreement", "--labels", "a", "b", "--out", out]
    assert main(words) == 0
    rows = table(tmp_path / "c.csv")
    assert ("a", "train_lr", "0", "1e-06") in rows
    assert [row[0] for row in rows if row[1] == "agreement"] == ["b", "b"]
    assert main(words) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert main([*runs, "--also", "agrement", "--out", out, "--overwrite"]) == 2
    assert "Did you mean 'agreement'?" in capsys.readouterr().err
    assert main([*runs, "--out", str(tmp_path / "d.png")]) == 0  # a name, not a name's beginning
    assert (tmp_path / "d.csv").exists() and not (tmp_path / "d.png.csv").exists()
    assert main([*runs, "--labels", "a", "--out", out, "--overwrite"]) == 2
    assert "--labels needs 2 different names" in capsys.readouterr().err


def test_what_is_no_run_is_left_out(runs, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert main([str(tmp_path / "none"), *runs, "--out", str(tmp_path / "c")]) == 0
    assert "left out: " in capsys.readouterr().out
    assert main([str(tmp_path / "none"), "--out", str(tmp_path / "d")]) == 2
    assert "nothing to report on" in capsys.readouterr().err
