"""The tables of gains and of teachers, from run folders made by hand."""
import csv
import json
from pathlib import Path

import pytest
import yaml

from analysis.intervals import difference, paired, t_quantile
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
    assert "| none | - | small | ce | - | 3 | 2 | 61.00 +- 1.41 | - | - | - |" in table
    assert ("| big | - | small | nkd | lr 0.001 | 3 | 2 | 65.50 +- 0.71 | +4.50 | [-1.85, +10.85] "
            "| - |") in table
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
    assert "| none | - | small | ce | 3 | 2 | 61.00 +- 1.41 | - | - | - |" in table
    assert "| big | - | small | nkd | 3 | 2 | 65.00 +- 1.41 | +4.00 | [+4.00, +4.00] | - |" in table


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
        "direct_gain": "", "gain_low": "", "gain_high": "", "gain_method": "",
        "relative_gain": "", "longer_epochs": "", "longer_gain": "", "longer_low": "",
        "longer_high": "", "not_compared": "", "runs": runs[0]}
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


# Intervals


@pytest.mark.parametrize("freedom, level, value", [
    (1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776), (5, 0.95, 2.571),
    (9, 0.95, 2.262), (30, 0.95, 2.042), (120, 0.95, 1.980), (1e6, 0.95, 1.960), (1, 0.99, 63.657),
    (4, 0.99, 4.604), (10, 0.5, 0.700)])
def test_quantiles_of_t_are_those_of_the_tables(freedom, level, value):
    assert t_quantile(freedom, level) == pytest.approx(value, abs=6e-4)


def test_intervals_by_hand():
    """Paired: differences 1, 2, 3, whose mean has the standard error 1 / sqrt(3). Welch: variances
    1 and 4 of three values each, 4 (1 + 4)^2 / (1 + 16) / 2 = 2.94 degrees of freedom."""
    first = {0: 61.0, 1: 62.0, 2: 63.0}
    found = difference(first, {0: 60.0, 1: 60.0, 2: 60.0})
    assert found.method == "paired" and (found.mean, found.std, found.n) == (2.0, 1.0, 3)
    assert found.high - found.mean == pytest.approx(4.303 / 3 ** 0.5, abs=1e-3)
    found = difference(first, {3: 58.0, 4: 60.0, 5: 62.0})
    assert (found.method, found.mean, found.n, found.std) == ("welch", 2.0, 3, None)
    assert found.mean - found.low == pytest.approx(t_quantile(50 / 17) * (5 / 3) ** 0.5)
    assert difference(first, {0: 60.0}).low is None and paired(first, {7: 60.0}) is None
    assert paired(first, {1: 60.0, 7: 1.0}) == (2.0, None, None, None, 1, "")


def test_the_interval_of_a_gain_and_the_longer_schedule(tmp_path, capsys):
    runs = []
    for seed, accuracies in enumerate([(60, 66, 63), (61, 66, 63), (62, 69, 66)]):
        runs += [write_run(tmp_path / f"a{seed}", accuracies[0], seed=seed),
                 write_run(tmp_path / f"b{seed}", accuracies[1], seed=seed, teacher="big",
                           loss="nkd"),
                 write_run(tmp_path / f"l{seed}", accuracies[2], seed=seed, epochs=6)]
    runs += [write_run(tmp_path / "l4", 20.0, epochs=4), write_run(tmp_path / "c", 65.0,
             teacher="big", loss="kd", seed=9), write_run(tmp_path / "x", 99.0, epochs=9, lr=1.0)]
    assert main([*runs, "--out", str(tmp_path / "table")]) == 0
    table = rows(capsys)
    # 6, 5, 7: 4.303 / sqrt(3) to each side; over 6 epochs 3, 3, 3.
    (line,) = [line for line in table if "| nkd |" in line]
    assert line.endswith("| 67.00 +- 1.73 | +6.00 | [+3.52, +8.48] | - | "
                         "+3.00 [+3.00, +3.00] (6) |")
    (line,) = [line for line in table if "| kd |" in line]  # one seed, not one of the baseline's
    assert line.endswith("| 1 | 65.00 | +4.00 | - | - | +1.00 (6) |")
    definitions = "\n".join(table)
    assert "- 95 % interval: " in definitions and "- over longer: " in definitions
    with open(tmp_path / "table.csv", newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["loss"] == "nkd"]
    assert (row["gain_method"], row["gain_low"], row["longer_epochs"], row["longer_low"]) == (
        "paired", "3.5159", "6", "3.0")
    assert main([*runs[:2], runs[4]]) == 0  # seeds that are not the same: Welch has one value
    assert "95 % interval |" not in rows(capsys)[0]


# Two teachers


def two_teachers(folder: Path) -> list[str]:
    """Of three seeds, the last of which only the first teacher's student has."""
    runs = []
    for seed, accuracies in enumerate([(64, 63), (66, 64), (50, None)]):
        for name, acc1, teacher_acc1 in zip(("big", "former"), accuracies, (70.0, 70.4)):
            if acc1 is not None:
                runs.append(write_run(folder / f"{name}{seed}", acc1, teacher=name, loss="nkd",
                                      seed=seed, teacher_acc1=teacher_acc1))
    change(runs[0], teacher=["big", "kernel=51"])
    change(runs[2], teacher=["big", "kernel=51"])
    change(runs[4], teacher=["big", "kernel=51"])
    return runs


@pytest.mark.parametrize("words", [["big", "former"], ["big kernel=51", "former"], ["all"]])
def test_teachers_are_compared_over_the_seeds_of_both(tmp_path, capsys, words):
    runs = two_teachers(tmp_path)
    assert main([*runs, "--versus", *words, "--out", str(tmp_path / "t")]) == 0
    table = rows(capsys)
    # 1 and 2: mean 1.5, 12.706 * 0.7071 / sqrt(2) to each side.
    assert ("| big kernel=51 | 70.00 | former | 70.40 | small | nkd | 3 | 2 | +1.50 +- 0.71 | "
            "[-4.85, +7.85] |") in table
    assert "- A - B: " in "\n".join(table)
    with open(tmp_path / "t-versus.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["difference"], row["std"], row["n"], row["reason"]) == ("1.5", "0.7071", "2", "")
    assert "A - B" in (tmp_path / "t.md").read_text()


def test_the_second_named_is_taken_from_the_first(tmp_path, capsys):
    assert main([*two_teachers(tmp_path), "--versus", "former", "big"]) == 0
    assert "| -1.50 +- 0.71 | [-7.85, +4.85] |" in "\n".join(rows(capsys))


@pytest.mark.parametrize("acc1, flags, shown", [
    (70.5, [], "| 1 | +1.00 | - |"),
    (70.51, [], "| 0 | not compared: the teachers differ by 0.51 points, more than --tolerance 0.5 "
     "| - |"),
    (70.51, ["--tolerance", "1"], "| 1 | +1.00 | - |"),
    (70.2, ["--tolerance", "0.1"], "differ by 0.20 points, more than --tolerance 0.1"),
    (None, ["--tolerance", "100"], "not compared: the accuracy of a teacher is not known")])
def test_unequal_teachers_are_not_compared(tmp_path, capsys, acc1, flags, shown):
    known = {} if acc1 is None else {"teacher_acc1": acc1}
    runs = [write_run(tmp_path / "a", 64.0, teacher="big", loss="nkd", teacher_acc1=70.0),
            write_run(tmp_path / "b", 63.0, teacher="former", loss="nkd", **known)]
    assert main([*runs, "--versus", "big", "former", *flags]) == 0
    table = rows(capsys)
    assert shown in "\n".join(table)
    assert any("| +1.00 |" in line for line in table) == (" +1.00 " in shown)


def test_only_what_differs_in_the_teacher_alone_is_compared(tmp_path, capsys):
    """Not another loss, rate or number of epochs; seeds that nothing shares are said."""
    first = write_run(tmp_path / "a", 64.0, teacher="big", loss="nkd", teacher_acc1=70.0)
    others = [write_run(tmp_path / "b", 63.0, teacher="former", loss="kd", teacher_acc1=70.0),
              write_run(tmp_path / "c", 63.0, teacher="former", loss="nkd", lr=1.0),
              write_run(tmp_path / "d", 63.0, teacher="former", loss="nkd", epochs=9)]
    assert main([first, *others, "--versus", "big", "former"]) == 0
    assert "No two rows differ in these teachers only." in rows(capsys)
    late = write_run(tmp_path / "e", 63.0, teacher="former", loss="nkd", seed=5, teacher_acc1=70.0)
    assert main([first, late, "--versus", "big", "former"]) == 0
    assert "| 0 | not compared: no seed in common | - |" in "\n".join(rows(capsys))


@pytest.mark.parametrize("flags, message", [
    (["--versus", "big", "formr"], "no finished run has the teacher 'formr'. Known here: big, "),
    (["--versus", "big"], "--versus takes two teachers, or the word all; got big."),
    (["--tolerance", "1"], "--tolerance does nothing without --versus."),
    (["--versus", "all", "--tolerance", "-1"], "at least 0")])
def test_what_cannot_be_compared_is_said(tmp_path, capsys, flags, message):
    assert main([*two_teachers(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
