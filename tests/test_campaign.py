"""The campaign of tests/campaign itself: that it runs, and that it can find something."""
import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.campaign.__main__ import build_parser
from tests.campaign.base import damage
from tests.campaign.kills import compare, wrong_end
from tests.campaign.process import Ended, judge

ROOT = Path(__file__).parent.parent
SENTENCE = "eval.py: error: no such file: x."


def test_every_kind_runs(tmp_path):
    """One input each; of the kills a life with one kill in it."""
    subprocess.run([sys.executable, "-m", "tests.campaign", "all", "--inputs", "1", "--jobs", "1",
                    "--seed", "11", "--out", tmp_path / "report.md"], cwd=ROOT, check=True,
                   capture_output=True)
    *rows, total = (tmp_path / "report.md").read_text().splitlines()[2:]
    assert len(rows) == 7 and total.split("|")[2].strip() == "18"


def test_the_commands_of_the_page_parse():
    page = (ROOT / "docs" / "robustness.md").read_text()
    lines = re.findall(r"python -m tests.campaign ([^#`\n]*)", page)
    assert len(lines) > 1 and all(build_parser().parse_args(shlex.split(line)) for line in lines)


@pytest.mark.parametrize("code, output, counted", [
    (0, "done", (1, 0)), (2, f"weights: y\n{SENTENCE}\n", (0, 1)),
    (0, "Exception ignored in: <f>\n", None), (1, "Traceback (most recent call last):\n", None),
    (2, f"{SENTENCE}\n{SENTENCE}\n", None), (2, f"{SENTENCE}\nand more\n", None), (2, "no\n", None),
    (-11, "", None), (1, SENTENCE, None)])
def test_a_wrong_end_is_a_fault(code, output, counted):
    result = judge(Ended(code, output), "x")
    assert (result.right, result.refused) == (counted or (0, 0))
    assert bool(result.fault) == (counted is None)
    assert judge(Ended(0, "", hung=True), "x").fault and judge(Ended(0, "", leftovers=1), "x").fault


@pytest.mark.parametrize("code, output, signal, is_right", [
    (143, "stopped on request at update 3; go on.", "SIGTERM", True), (143, "", "SIGTERM", False),
    (-15, "", "SIGTERM", True), (-15, "stopped by SIGTERM; kept.", "SIGTERM", False),
    (130, "interrupted; kept.", "SIGINT", True), (130, "interrupted; kept.", "SIGTERM", False),
    (-9, "", "SIGKILL", True), (0, "done", "SIGTERM", True), (2, SENTENCE, "SIGKILL", True),
    (2, SENTENCE, "SIGTERM", False), (1, "", "SIGKILL", False)])
def test_the_end_fits_the_signal(code, output, signal, is_right):
    assert bool(wrong_end(Ended(code, output), f"{signal} to all", "train_kd")) != is_right


def test_the_launchers_own_traceback_is_told_from_ours():
    own = ("Traceback (most recent call last):\n  File x\n    main()\n"
           "torch.distributed.elastic.errors.ChildFailedError: \n")
    ours = own.replace("torch.distributed.elastic.errors.ChildFailedError: ", "KeyError: 'x'")
    assert not wrong_end(Ended(1, own), "SIGTERM to rank", "torchrun")
    assert wrong_end(Ended(1, own), "SIGTERM to all", "train_kd")
    assert wrong_end(Ended(1, own + ours), "SIGTERM to rank", "torchrun")


def test_a_difference_is_found(tmp_path):
    def run(name: str, value: float, epochs: list[int]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        torch.save({"args": {"resume": name}, "model": {"w": torch.tensor([value, torch.nan])}},
                   folder / "checkpoint-last.pth")
        (folder / "log.txt").write_text("".join(
            json.dumps({"epoch": epoch, "loss": value, "peak_memory_gib": len(name)}) + "\n"
            for epoch in epochs))
        return folder

    whole = run("whole", 1.0, [0, 1])
    assert not compare(run("equal", 1.0, [0, 1]), whole)
    weights, log = compare(run("other", 1.0 + 1e-7, [0]), whole)
    assert weights == "checkpoint-last.pth model w differs" and log.startswith("log.txt: ")
    more = run("more", 1.0, [0, 1])
    (more / "checkpoint-best.pth.tmp").touch()
    assert compare(more, whole) == ["checkpoint-best.pth.tmp should not be there"]
    (more / "log.txt").unlink()
    assert "log.txt is missing" in compare(more, whole)


def test_damage_changes_something():
    content = bytes(range(256)) * 20
    kinds = {kind for seed in range(60) for changed, kind in [damage(content, random.Random(seed))]
             if changed != content}
    assert kinds == {"bit", "zeros", "truncated", "noise", "twice", "cut"}
