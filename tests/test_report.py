"""The table of gains, from run folders made by hand."""
import json
from pathlib import Path

import pytest
import yaml

from analysis.report import main


def write_run(folder: Path, acc1: float, *, teacher: str = "none", loss: str = "ce", seed: int = 0,
              epochs: int = 3, lr: float = 1e-3, done: int | None = None, **record) -> str:
    folder.mkdir()
    args = {"teacher": [teacher], "student": ["small"], "loss": [[loss]], "epochs": epochs,
            "seed": seed, "lr": lr, "num_workers": seed, "output_dir": str(folder)}
    (folder / "args.yaml").write_text(yaml.safe_dump(args))
    lines = [{"epoch": i, "test_acc1": 1.0, **record} for i in range((done or epochs) - 1)]
    lines.append({"epoch": (done or epochs) - 1, "test_acc1": acc1, **record})
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def rows(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_seeds_are_averaged_and_the_gain_is_against_the_same_recipe(tmp_path, capsys):
    runs = [write_run(tmp_path / "a0", 60.0), write_run(tmp_path / "a1", 62.0, seed=1),
            write_run(tmp_path / "b0", 65.0, teacher="big", loss="nkd"),
            write_run(tmp_path / "b1", 66.0, teacher="big", loss="nkd", seed=1),
            write_run(tmp_path / "c0", 70.0, teacher="big", loss="nkd", lr=1e-2)]
    assert main(runs) == 0
    table = rows(capsys)
    assert "| none | small | ce | 3 | 2 | 61.00 +- 1.41 | - |" in table
    assert "| big | small | nkd | 3 | 2 | 65.50 +- 0.71 | +4.50 |" in table
    assert "| big | small | nkd | 3 | 1 | 70.00 | - |" in table  # no supervised run at this rate


def test_unfinished_and_repeated_runs_are_named_not_counted(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", 60.0), write_run(tmp_path / "again", 80.0),
            write_run(tmp_path / "half", 90.0, seed=1, done=2)]
    assert main(runs) == 0
    text = "\n".join(rows(capsys))
    assert "| 3 | 1 | 60.00 | - |" in text
    assert f"left out: {tmp_path / 'half'} (epoch 2 of 3)" in text
    assert f"left out: {tmp_path / 'again'} (same settings and seed as {tmp_path / 'a'})" in text


def test_averaged_weights_count_where_they_were_kept(tmp_path, capsys):
    assert main([write_run(tmp_path / "a", 60.0, test_acc1_ema=64.0)]) == 0
    assert "| 3 | 1 | 64.00 | - |" in "\n".join(rows(capsys))


@pytest.mark.parametrize("missing", ["args.yaml", "log.txt"])
def test_what_is_no_run_is_said_so(tmp_path, capsys, missing):
    runs = [write_run(tmp_path / "a", 60.0), write_run(tmp_path / "b", 70.0)]
    (tmp_path / "a" / missing).unlink()
    assert main(runs) == 0
    text = "\n".join(rows(capsys))
    assert f"left out: {runs[0]} (no run with a finished epoch: {missing} is missing)" in text
    assert "| 3 | 1 | 70.00 | - |" in text
    (tmp_path / "file").touch()
    assert main([runs[0], str(tmp_path / "file")]) == 2
    assert "nothing to report on" in capsys.readouterr().err


def test_sparse_and_dense_runs_are_told_apart(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", 60.0), write_run(tmp_path / "b", 61.0)]
    args = yaml.safe_load((tmp_path / "b" / "args.yaml").read_text())
    (tmp_path / "b" / "args.yaml").write_text(yaml.safe_dump({**args, "sparsity": 0.4}))
    assert main(runs) == 0
    table = rows(capsys)
    assert "| none | small | ce | 3 | 1 | 60.00 | - |" in table
    assert "| none | small, sparsity 0.4 | ce | 3 | 1 | 61.00 | - |" in table
