"""The table of gains, from run folders made by hand."""
import csv
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


def change(folder: str, **settings) -> None:
    path = Path(folder) / "args.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))


def rows(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_seeds_are_averaged_and_the_gain_is_against_the_same_recipe(tmp_path, capsys):
    runs = [write_run(tmp_path / "a0", 60.0), write_run(tmp_path / "a1", 62.0, seed=1),
            write_run(tmp_path / "b0", 65.0, teacher="big", loss="nkd"),
            write_run(tmp_path / "b1", 66.0, teacher="big", loss="nkd", seed=1),
            write_run(tmp_path / "c0", 70.0, teacher="big", loss="nkd", lr=1e-2)]
    assert main(runs) == 0
    table = rows(capsys)
    assert "| none | - | small | ce | - | 3 | 2 | 61.00 +- 1.41 | - | - |" in table
    assert "| big | - | small | nkd | lr 0.001 | 3 | 2 | 65.50 +- 0.71 | +4.50 | - |" in table
    # No supervised run at this rate: apart, with the reason.
    apart = table.index("Without a supervised run to compare with:")
    assert table.index("| big | - | small | nkd | lr 0.01 | 3 | 1 | 70.00 | - | - |") > apart
    assert (f"- {runs[4]}: no finished supervised run with lr 0.01 (nearest: {runs[0]}, lr 0.001)"
            in table[apart:])


def test_unfinished_and_repeated_runs_are_named_not_counted(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", 60.0), write_run(tmp_path / "again", 80.0),
            write_run(tmp_path / "half", 90.0, seed=1, done=2)]
    assert main(runs) == 0
    text = "\n".join(rows(capsys))
    assert "| 3 | 1 | 60.00 | - | - |" in text
    assert f"left out: {tmp_path / 'half'} (epoch 2 of 3)" in text
    assert f"left out: {tmp_path / 'again'} (same settings and seed as {tmp_path / 'a'})" in text


def test_averaged_weights_count_where_they_were_kept(tmp_path, capsys):
    assert main([write_run(tmp_path / "a", 60.0, test_acc1_ema=64.0)]) == 0
    assert "| 3 | 1 | 64.00 | - | - |" in "\n".join(rows(capsys))


@pytest.mark.parametrize("missing", ["args.yaml", "log.txt"])
def test_what_is_no_run_is_said_so(tmp_path, capsys, missing):
    runs = [write_run(tmp_path / "a", 60.0), write_run(tmp_path / "b", 70.0)]
    (tmp_path / "a" / missing).unlink()
    assert main(runs) == 0
    text = "\n".join(rows(capsys))
    assert f"left out: {runs[0]} (no run with a finished epoch: {missing} is missing)" in text
    assert "| 3 | 1 | 70.00 | - | - |" in text
    (tmp_path / "file").touch()
    assert main([runs[0], str(tmp_path / "file")]) == 2
    assert "nothing to report on" in capsys.readouterr().err


def test_sparse_and_dense_runs_are_told_apart(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", 60.0), write_run(tmp_path / "b", 61.0)]
    change(runs[1], sparsity=0.4)
    assert main(runs) == 0
    table = rows(capsys)
    assert "| none | - | small | ce | 3 | 1 | 60.00 | - | - |" in table
    assert "| none | - | small, sparsity 0.4 | ce | 3 | 1 | 61.00 | - | - |" in table


@pytest.mark.parametrize("teacher_acc1, shown", [
    ((70.0, 71.0), "| big | 70.50 | small | nkd | 3 | 2 | 66.00 +- 1.41 | +6.00 | +0.57 |"),
    ((60.0, 60.0), "| big | 60.00 | small | nkd | 3 | 2 | 66.00 +- 1.41 | +6.00 | - |"),
    ((50.0, 55.0), "| big | 52.50 | small | nkd | 3 | 2 | 66.00 +- 1.41 | +6.00 | - |"),
    ((60.004, 60.004), "| big | 60.00 | small | nkd | 3 | 2 | 66.00 +- 1.41 | +6.00 | - |"),
    ((None, 70.0), "| big | - | small | nkd | 3 | 2 | 66.00 +- 1.41 | +6.00 | - |")])
def test_the_gain_relative_to_the_lead(tmp_path, capsys, teacher_acc1, shown):
    """6 of the 10.5 points between 60 and 70.5 are 0.57 of the lead."""
    records = [{} if acc1 is None else {"teacher_acc1": acc1} for acc1 in teacher_acc1]
    runs = [write_run(tmp_path / "a", 60.0),
            write_run(tmp_path / "b0", 65.0, teacher="big", loss="nkd", **records[0]),
            write_run(tmp_path / "b1", 67.0, teacher="big", loss="nkd", seed=1, **records[1])]
    assert main(runs) == 0
    table = rows(capsys)
    assert shown in table
    definitions = " ".join(table[table.index(shown) + 1:])
    for term in ("top-1", "teacher top-1", "direct gain", "relative gain"):
        assert f"- {term}: " in definitions
    assert "undefined or misleading   when the student already equals the teacher" in definitions


def test_a_worse_student_has_a_negative_gain(tmp_path, capsys):
    assert main([write_run(tmp_path / "a", 60.0), write_run(
        tmp_path / "b", 58.0, teacher="big", loss="nkd", teacher_acc1=68.0)]) == 0
    assert "| big | 68.00 | small | nkd | 3 | 1 | 58.00 | -2.00 | -0.25 |" in rows(capsys)


def test_what_only_a_teacher_has_does_not_hinder_the_comparison(tmp_path, capsys):
    """Nor does a whole number that was once written as 20 and once as 20.0."""
    runs = [write_run(tmp_path / "a", 60.0),
            write_run(tmp_path / "b0", 64.0, teacher="big", loss="nkd"),
            write_run(tmp_path / "b1", 66.0, teacher="big", loss="nkd", seed=1),
            write_run(tmp_path / "a1", 62.0, seed=1)]
    change(runs[0], warmup_epochs=20, teacher_weights="published", teacher_weights_key=None)
    change(runs[1], warmup_epochs=20, teacher_weights="big-3ep/last.pth", teacher_weights_key="m")
    change(runs[2], warmup_epochs=20.0, teacher_weights="big-3ep-seed1/last.pth",
           teacher_weights_key="m")
    change(runs[3], warmup_epochs=20, teacher_weights="random")
    assert main(runs) == 0
    table = rows(capsys)
    assert "| none | - | small | ce | 3 | 2 | 61.00 +- 1.41 | - | - |" in table
    assert "| big | - | small | nkd | 3 | 2 | 65.00 +- 1.41 | +4.00 | - |" in table


def test_the_nearest_supervised_run_is_named_with_all_that_differs(tmp_path, capsys):
    runs = [write_run(tmp_path / "near", 60.0, lr=1e-2, epochs=9),
            write_run(tmp_path / "far", 61.0, epochs=5),
            write_run(tmp_path / "half", 62.0, lr=1e-2, seed=3, done=1),
            write_run(tmp_path / "other", 63.0, lr=1e-2),
            write_run(tmp_path / "b", 65.0, teacher="big", loss="nkd", lr=1e-2)]
    change(runs[1], opt_betas=[0.9, 0.95])
    change(runs[3], student=["else"])
    change(runs[4], student=["small", "width=2"], opt_betas=[0.9, 0.99])
    assert main(runs) == 0
    assert (f"- {runs[4]}: no finished supervised run with epochs 3, opt_betas 0.9 0.99, "
            f"student small width=2 (nearest: {runs[0]}, epochs 9, opt_betas not set, student "
            "small)") in rows(capsys)
    assert main(runs[3:]) == 0
    table = rows(capsys)
    assert f"- {runs[4]}: no finished supervised run of small" in table
    assert main(runs[4:]) == 0  # nothing else: its accuracy is shown all the same
    table = rows(capsys)
    assert "| big | - | small width=2 | nkd | 3 | 1 | 65.00 | - | - |" in table
    assert any(line.startswith("- direct gain:") for line in table)


def test_rows_of_the_same_names_say_in_what_they_differ(tmp_path, capsys):
    """The seed, and where they ran, are no differences."""
    runs = [write_run(tmp_path / "a", 60.0), write_run(tmp_path / "b", 61.0, lr=1e-2),
            write_run(tmp_path / "c", 62.0, lr=1e-2, seed=1), write_run(tmp_path / "d", 63.0),
            write_run(tmp_path / "e", 64.0, epochs=5)]
    change(runs[3], opt_betas=[0.9, 0.95], batch_size=7)
    assert main(runs) == 0
    table = rows(capsys)
    assert table[0].startswith("| teacher | teacher top-1 | student | loss | differs in | epochs |")
    for line in ("lr 0.001, opt_betas not set | 3 | 1 | 60.00 | - | - |",
                 "lr 0.01, opt_betas not set | 3 | 2 | 61.50 +- 0.71 | - | - |",
                 "lr 0.001, opt_betas 0.9 0.95 | 3 | 1 | 63.00 | - | - |",
                 "- | 5 | 1 | 64.00 | - | - |"):
        assert f"| none | - | small | ce | {line}" in table
    assert main(runs[1:3]) == 0
    assert "differs in" not in " ".join(rows(capsys))


@pytest.mark.parametrize("line", ['{"epoch": 1, "test_a', "[1]", "3", "null", '{"epoch": 1}',
                                  '{"epoch": "1", "test_acc1": "2"}', ""])
def test_a_corrupt_log_line_is_named(tmp_path, capsys, line):
    runs = [write_run(tmp_path / "a", 60.0), write_run(tmp_path / "b", 70.0)]
    log = tmp_path / "a" / "log.txt"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], line, lines[2]]) + "\n")
    sentence = f"{runs[0]} (line 2 of {log} "
    assert main(runs) == 0
    table = rows(capsys)
    assert f"- left out: {sentence}" in " ".join(table) and "60.00" not in " ".join(table)
    assert main(runs[:1]) == 2
    assert f"error: nothing to report on: {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize("content, reason", [
    (b"{", "is damaged"), (b"\xff\xfe\x00", "is damaged"), (b"- 1", "is damaged"),
    (b"", "no valid teacher, student"), (b"teacher: [none]\nstudent: x\nloss: [[ce]]\nseed: 0",
                                         "no valid student, epochs)")])
def test_damaged_settings_are_named(tmp_path, capsys, content, reason):
    runs = [write_run(tmp_path / "a", 60.0), write_run(tmp_path / "b", 70.0)]
    (tmp_path / "a" / "args.yaml").write_bytes(content)
    assert main(runs) == 0
    (line,) = [line for line in rows(capsys) if line.startswith("- left out: ")]
    assert line.startswith(f"- left out: {runs[0]} (args.yaml ") and reason in line


def test_an_empty_log_is_no_run(tmp_path, capsys):
    folder = write_run(tmp_path / "a", 60.0)
    (tmp_path / "a" / "log.txt").write_text("")
    assert main([folder]) == 2
    assert f"nothing to report on: {folder} (no finished epoch)." in capsys.readouterr().err


def some_runs(folder: Path) -> list[str]:
    runs = [write_run(folder / "a", 60.0),
            write_run(folder / "b0", 64.0, teacher="big", loss="nkd", teacher_acc1=68.0),
            write_run(folder / "b1", 66.0, teacher="big", loss="nkd", seed=1, teacher_acc1=68.0),
            write_run(folder / "c", 70.0, teacher="big", loss="nkd", lr=1e-2)]
    for run in runs:
        change(run, student=["small", "dims=1,2"], sparsity=0.4)
    return runs


def test_out_writes_both_forms_of_the_same_rows(tmp_path, capsys):
    runs = some_runs(tmp_path)
    for _ in range(2):  # the second time over its own files
        assert main([*runs, "--out", str(tmp_path / "lr0.01")]) == 0
        assert (tmp_path / "lr0.01.md").read_text().split("\n", 1)[1] == capsys.readouterr().out
    with open(tmp_path / "lr0.01.csv", newline="") as file:
        supervised, distilled, alone = csv.DictReader(file)
    assert supervised == {
        "teacher": "none", "teacher_acc1": "", "student": "small dims=1,2, sparsity 0.4",
        "loss": "ce", "differs": "", "epochs": "3", "n": "1", "acc1": "60.0", "acc1_std": "",
        "direct_gain": "", "relative_gain": "", "not_compared": "", "runs": runs[0]}
    assert distilled == supervised | {
        "teacher": "big", "teacher_acc1": "68.0", "loss": "nkd", "n": "2", "acc1": "65.0",
        "acc1_std": "1.4142", "direct_gain": "5.0", "relative_gain": "0.625",
        "differs": "lr 0.001", "runs": f"{runs[1]}, {runs[2]}"}
    assert alone["differs"] == "lr 0.01"
    assert alone["direct_gain"] == alone["relative_gain"] == ""
    assert alone["not_compared"].startswith("no finished supervised run with lr 0.01 (nearest")
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["lr0.01.csv", "lr0.01.md"]


@pytest.mark.parametrize("name", ["missing/table", "file/table"])
def test_out_needs_a_folder(tmp_path, capsys, name):
    (tmp_path / "file").touch()
    out = tmp_path / name
    assert main([write_run(tmp_path / "a", 60.0), "--out", str(out)]) == 2
    assert (f"analysis.report: error: --out {out} is no name in an existing folder; make "
            f"{out.parent} or name another.") in capsys.readouterr().err
    assert main([str(tmp_path / "a"), "--out", "."]) == 2
    assert "--out . is no name in an existing folder" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".md", ".csv"])
def test_out_leaves_files_of_another_kind_alone(tmp_path, capsys, suffix):
    other = tmp_path / f"README{suffix}"
    other.write_text("| teacher |\n")
    assert main([write_run(tmp_path / "a", 60.0), "--out", str(tmp_path / "README")]) == 2
    assert f"would overwrite {other}, which this command did not write" in capsys.readouterr().err
    assert other.read_text() == "| teacher |\n"
    assert [path.name for path in tmp_path.glob("README*")] == [other.name]


def test_the_baseline_does_not_depend_on_the_order(tmp_path, capsys):
    """Plain cross-entropy, if runs without a teacher differ in their loss; else none."""
    plain = write_run(tmp_path / "a", 60.0)
    smooth = write_run(tmp_path / "b", 40.0, loss="ce2")
    other = write_run(tmp_path / "c", 50.0, loss="ce3")
    taught = write_run(tmp_path / "d", 65.0, teacher="big", loss="nkd")
    for runs in ([plain, smooth, taught], [smooth, plain, taught]):
        assert main(runs) == 0
        assert "| 65.00 | +5.00 | - |" in "\n".join(rows(capsys))
    assert main([smooth, other, taught]) == 0
    assert "2 supervised runs differ in their loss only" in "\n".join(rows(capsys))
