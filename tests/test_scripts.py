"""The shell scripts: what they may assume, and what setup.sh says when something is missing."""
import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_kd
from models import create_model
from utils.registry import parse_spec

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "run_scripts").glob("*.sh"))
RUNNABLE = [path for path in SCRIPTS if path.name != "setup.sh"]
NAMES = dict(ids=lambda path: path.name)
TRAINING = re.compile(r"\btrain_kd\.py\b|\beval\.py\b|^train ")


def bash(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """A clean environment, without a network proxy or a virtual environment of the caller."""
    env = {"PATH": os.environ["PATH"], "HOME": str(cwd), "PIP_NO_INDEX": "1", **environment}
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=env, capture_output=True,
                          text=True, timeout=60)


@pytest.fixture
def copy(tmp_path) -> Path:
    """run_scripts and the requirement files in a folder of their own."""
    shutil.copytree(ROOT / "run_scripts", tmp_path / "run_scripts")
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, tmp_path)
    return tmp_path


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def installs(asked: Path) -> list[str]:
    """What pip was asked to install, from the record of a fake environment."""
    return [line for line in asked.read_text().splitlines() if " install " in line]


SOURCE = "set -euo pipefail; source run_scripts/setup.sh {}; echo PYTHON=$PYTHON; pwd"


@pytest.mark.parametrize("requirements", ["", "requirements.txt", "requirements-dev.txt"])
def test_setup_takes_a_python_that_is_given(requirements, copy):
    before, start = files(copy), time.monotonic()
    result = bash(SOURCE.format(requirements), copy, L2S_PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start < 3
    assert result.stdout.splitlines() == [f"PYTHON={sys.executable}", str(copy)]
    assert files(copy) == before


def test_setup_works_from_any_folder(copy):
    (copy / "elsewhere").mkdir()
    result = bash("source ../run_scripts/setup.sh; pwd", copy / "elsewhere",
                  L2S_PYTHON=sys.executable)
    assert result.stdout.splitlines() == [str(copy)], result.stderr


def test_setup_names_what_is_missing(copy):
    (copy / "requirements.txt").write_text(
        "# a comment\nnumpy>=1.0\n\nno-such-package-a>=1\nPillow\nno_such_package_b[all]==2\n")
    (copy / "requirements-dev.txt").write_text("-r requirements.txt\npytest\nno-such-tool\n")
    before = files(copy)
    for name, missing in (("requirements.txt", {"no-such-package-a", "no_such_package_b"}),
                          ("requirements-dev.txt", {"no-such-package-a", "no_such_package_b",
                                                    "no-such-tool"})):
        result = bash(SOURCE.format(name), copy, L2S_PYTHON=sys.executable)
        assert result.returncode == 2 and "PYTHON=" not in result.stdout
        (named,) = re.findall(r"lacks: (.*?)\. Install", result.stderr)
        assert set(named.split()) == missing
        assert sys.executable in result.stderr and "unset L2S_PYTHON" in result.stderr
    assert files(copy) == before


def test_setup_says_when_the_python_does_not_run(copy):
    result = bash(SOURCE.format(""), copy, L2S_PYTHON=str(copy / "no-python"))
    assert result.returncode == 2
    assert f"L2S_PYTHON={copy / 'no-python'} does not run" in result.stderr


def test_setup_says_when_the_requirements_are_not_there(copy):
    result = bash(SOURCE.format("requirement.txt"), copy, L2S_PYTHON=sys.executable)
    assert result.returncode == 2
    assert "requirement.txt" in result.stderr.splitlines()[-1]
    assert "does not run" not in result.stderr


def fake_venv(copy: Path) -> Path:
    """An environment whose Python writes down what it is asked."""
    python = copy / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\necho "$@" >> {copy}/asked\nexit ${{FAIL:-0}}\n')
    python.chmod(0o755)
    return python.parent.parent


def test_setup_installs_once_and_again_when_the_requirements_change(copy):
    """Without L2S_PYTHON; pip is a stand-in, so nothing is fetched."""
    venv, asked = fake_venv(copy), copy / "asked"
    for number in (1, 1):
        result = bash(SOURCE.format("requirements.txt"), copy, L2S_VENV=str(venv))
        assert result.returncode == 0, result.stderr
        lines = installs(asked)
        assert len(lines) == number and "pip install" in lines[0]
        assert lines[0].endswith("-r requirements.txt")
    assert f"PYTHON={venv}/bin/python" in result.stdout and "installing" not in result.stdout
    with open(copy / "requirements.txt", "a") as file:
        file.write("another\n")
    assert bash(SOURCE.format("requirements.txt"), copy, L2S_VENV=str(venv)).returncode == 0
    assert len(installs(asked)) == 2


def test_an_installation_that_failed_is_tried_again(copy):
    venv, asked = fake_venv(copy), copy / "asked"
    result = bash(SOURCE.format(""), copy, L2S_VENV=str(venv), FAIL="1")
    assert result.returncode != 0 and "PYTHON=" not in result.stdout
    assert bash(SOURCE.format(""), copy, L2S_VENV=str(venv)).returncode == 0
    assert len(installs(asked)) == 2


# Every script


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], **NAMES)
def test_bash_can_read_it(path):
    result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr


def joined_lines(path: Path) -> list[str]:
    """The commands of a script: continued lines in one, comments and blank lines left out."""
    text = path.read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines()
            if line.strip() and not line.strip().startswith("#")]


def header(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    number = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:number]


@pytest.mark.parametrize("path", RUNNABLE, **NAMES)
def test_scripts_start_with_a_header_and_stop_at_errors(path):
    first, *rest = header(path)
    assert first == "#!/usr/bin/env bash"
    assert rest and len(rest[0].split()) > 4, "the second line says what it does"
    assert any(f"bash run_scripts/{path.name}" in line for line in rest), "how it is started"
    assert joined_lines(path)[0] == "set -euo pipefail"


def test_setup_is_to_be_sourced():
    path = ROOT / "run_scripts" / "setup.sh"
    assert "set -euo pipefail" not in path.read_text() and "sourced" in header(path)[0]


@pytest.mark.parametrize("path", RUNNABLE, **NAMES)
def test_scripts_pass_their_words_on(path):
    """What is added on the command line reaches every training, last, so that it wins."""
    commands = [line for line in joined_lines(path) if TRAINING.search(line)]
    for line in commands or joined_lines(path)[-1:]:
        assert line.endswith('"$@"'), line


@pytest.mark.parametrize("path", [path for path in RUNNABLE
                                  if any(map(TRAINING.search, joined_lines(path)))], **NAMES)
def test_training_scripts_set_up_and_take_paths_from_the_environment(path):
    lines = joined_lines(path)
    assert any("setup.sh" in line and line.startswith("source ") for line in lines)
    assert all("$PYTHON" in line for line in lines if "train_kd.py" in line)
    text = "\n".join(lines)
    if "--data-path" in text:
        (name,) = set(re.findall(r'--data-path "?\$\{?(\w+)', text))
        assert re.search(rf"^{name}=\$\{{{name}:[?-]", text, re.MULTILINE), name


RECORDING = """#!/usr/bin/env bash
# In place of Python: notes what would be trained; everything else is done.
if [[ " $* " == *" train_kd.py "* ]]; then printf '%s\\n' "$*" >> "$ASKED"
elif [[ " $* " == *" analysis.report "* ]]; then exit 0
else exec "$REAL" "$@"; fi
"""


def trainings(path: Path, tmp_path: Path, *words: str) -> list[argparse.Namespace]:
    """The command lines that a script starts, parsed by the program itself."""
    fake, asked = tmp_path / "python", tmp_path / "asked"
    fake.write_text(RECORDING)
    fake.chmod(0o755)
    result = bash(shlex.join(["bash", str(path), *words]), ROOT, L2S_PYTHON=str(fake),
                  ASKED=str(asked), REAL=sys.executable, DATA=str(tmp_path),
                  RUNS=str(tmp_path / "runs"), SEEDS="0 1")
    assert result.returncode == 0, result.stderr
    lines = [line.partition("train_kd.py ")[2] for line in asked.read_text().splitlines()]
    return [train_kd.build_parser().parse(shlex.split(line)) for line in lines]


ARGUMENTS = {"train_slak_t_120ep.sh": ["31"]}  # of scripts that need one
EXPERIMENTS = [path for path in RUNNABLE if any(map(TRAINING.search, joined_lines(path)))]


@pytest.mark.parametrize("path", EXPERIMENTS, **NAMES)
def test_what_scripts_train_can_be_built(path, tmp_path):
    runs = trainings(path, tmp_path, *ARGUMENTS.get(path.name, []))
    assert runs
    for run in runs:
        for words in (run.teacher, run.student):
            name, options = parse_spec(words, "NAME")
            if name != "none":
                with torch.device("meta"):
                    create_model(name, 10, **options)


@pytest.mark.parametrize("name, expected", [
    ("train_slak_t_300ep.sh", (["slak_t", "drop_path=0.1"], 0.4, 2000, 0.5)),
    ("train_slak_s_300ep.sh", (["slak_s", "drop_path=0.4"], 0.4, 100, 0.3)),
    ("train_slak_b_300ep.sh", (["slak_b", "drop_path=0.5"], 0.4, 100, 0.3)),
    ("train_convnext_t_300ep.sh", (["convnext_t", "drop_path=0.1"], 0.0, 100, 0.3)),
    ("train_convnext_s_300ep.sh", (["convnext_s", "drop_path=0.4"], 0.0, 100, 0.3))])
def test_teachers_are_trained_with_the_published_settings(name, expected, tmp_path):
    (run,) = trainings(ROOT / "run_scripts" / name, tmp_path)
    assert (run.student, run.sparsity, run.prune_every, run.prune_rate) == expected
    assert (run.epochs, run.effective_batch, run.lr, run.warmup_epochs) == (300, 4096, 4e-3, 20)
    assert run.teacher == ["none"] and run.model_ema and run.sparse_init == "snip"
    assert run.growth == "random" and run.weight_decay == 0.05


@pytest.mark.parametrize("kernel, sizes", [
    ("31", "31,29,27,13,5"), ("51", "51,49,47,13,5"), ("61", "61,59,57,13,5")])
def test_the_kernel_is_an_argument(kernel, sizes, tmp_path):
    path = ROOT / "run_scripts" / "train_slak_t_120ep.sh"
    (run,) = trainings(path, tmp_path, kernel, "--sparse-init", "erk")
    assert run.student == ["slak_t", "drop_path=0.1", f"kernel_size={sizes}"]
    assert run.epochs == 120 and run.sparse_init == "erk"
    for wrong in ("", "41"):
        result = bash(f"bash {path} {wrong}", ROOT)
        assert result.returncode == 2 and "31, 51 or 61" in result.stderr


def test_the_checks_can_fail(tmp_path):
    path = tmp_path / "x.sh"
    path.write_text("#!/bin/sh\ntrain_kd.py \\\n  --epochs 3 # not passed on\n")
    assert header(path) == ["#!/bin/sh"]
    assert joined_lines(path) == ["train_kd.py    --epochs 3 # not passed on"]
    with pytest.raises(AssertionError):
        test_scripts_pass_their_words_on(path)
    path.write_text("if true; then\n")
    with pytest.raises(AssertionError):
        test_bash_can_read_it(path)


def test_the_quickstart_ends_with_its_table(tmp_path):
    """The whole script, on a few pictures."""
    command = ("bash run_scripts/quickstart.sh --data-set outlines train_size=128 val_size=20 "
               "--num-workers 0")
    result = bash(command, ROOT, L2S_PYTHON=sys.executable, RUNS=str(tmp_path / "runs"),
                  EPOCHS="2", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-2000:]
    table = result.stdout[result.stdout.index("| teacher"):].splitlines()
    assert [row.split(" | ")[:2] for row in table[2:5]] == [
        ["| none", "convnext_bn_pico"], ["| none", "slak_pico"],
        ["| slak_pico", "convnext_bn_pico"]]
    assert f"Run folders: {tmp_path / 'runs'}/" in table
