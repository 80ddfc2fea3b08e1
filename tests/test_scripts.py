"""The shell scripts: what they may assume, what they train, and what is said when something is
missing."""
import argparse
import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train_kd
from analysis.erf import build_parser as erf_parser
from data.datasets import DATASETS
from losses import create_losses
from models import VisionModel, create_model
from models.weights import published_source
from utils import config
from utils.checkpoint import FREE_ON_RESUME
from utils.optim import resolve_batch
from utils.registry import parse_spec
from utils.run_name import run_name

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "run_scripts").glob("*.sh"))
SOURCED = ("setup.sh", "launch.sh")
RUNNABLE = [path for path in SCRIPTS if path.name not in SOURCED]
NAMES = dict(ids=lambda path: path.name)
TRAINING = re.compile(r"\btrain_kd\.py\b|\beval\.py\b|^train |\bbash run_scripts/")


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


@pytest.mark.parametrize("name", SOURCED)
def test_some_are_to_be_sourced(name):
    path = ROOT / "run_scripts" / name
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
    starts = [line for line in lines if "train_kd.py" in line or "eval.py" in line]
    launched = [line for line in starts if line.startswith("launch ")]
    assert all("$PYTHON" in line for line in starts if line not in launched)
    assert not launched or "source run_scripts/launch.sh" in lines
    text = "\n".join(lines)
    if "--data-path" in text:
        (name,) = set(re.findall(r'--data-path "?\$\{?(\w+)', text))
        assert re.search(rf"^{name}=\$\{{{name}:[?-]", text, re.MULTILINE), name


RECORDING = """#!/usr/bin/env bash
# In place of Python: notes what would be trained; everything else is done.
if [[ " $* " == *" train_kd.py "* ]]; then printf '%s\\n' "$*" >> "$ASKED"
elif [[ " $* " == *" -m analysis."* ]]; then exit 0
else exec "$REAL" "$@"; fi
"""


def script(name: str) -> Path:
    return ROOT / "run_scripts" / name


def run_script(path: Path, folder: Path, *words: str, python: str = RECORDING, cwd: Path = ROOT,
               **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run it with a fake Python and the weights that have no address; and what it started."""
    assert path in EXPERIMENTS, "others start more than trainings, which alone are recorded"
    folder.mkdir(exist_ok=True)
    fake, asked, weights = folder / "python", folder / "asked", folder / "weights"
    fake.write_text(python)
    fake.chmod(0o755)
    asked.write_text("")
    weights.mkdir(exist_ok=True)
    for name in ("cswin_t", "convnext_t_22k", "vit_l"):
        (weights / f"{name}.pth").touch()
    settings = {"L2S_PYTHON": str(fake), "ASKED": str(asked), "REAL": sys.executable,
                "DATA": str(folder), "WEIGHTS": str(weights), "SEEDS": "0 1",
                "STUDENT_WEIGHTS": str(folder / "pretrained.pth"), **environment}
    result = bash(shlex.join(["bash", str(path), *words]), cwd, **settings)
    return result, asked.read_text().splitlines()


def trainings(path: Path, folder: Path, *words: str, **environment: str
              ) -> list[argparse.Namespace]:
    """The command lines that a script starts, parsed by the program itself."""
    result, lines = run_script(path, folder, *words, **environment)
    assert result.returncode == 0, result.stderr
    return [train_kd.build_parser().parse(shlex.split(line.partition("train_kd.py ")[2]))
            for line in lines]


ARGUMENTS = {"train_slak_t_120ep.sh": ["31"], "train_convnext_120ep.sh": ["t"]}
EXPERIMENTS = [path for path in RUNNABLE if any(
    TRAINING.search(line) and "eval.py" not in line for line in joined_lines(path))]
ON_IMAGENET = [path for path in EXPERIMENTS if "recipes/imagenet.yaml" in path.read_text()]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """path -> what the script trains with its defaults; each script runs once."""
    folder = tmp_path_factory.mktemp("scripts")
    return functools.cache(lambda path: trainings(path, folder / path.stem,
                                                  *ARGUMENTS.get(path.name, [])))


@functools.cache
def build(words: tuple[str, ...]) -> VisionModel | None:
    name, options = parse_spec(list(words), "NAME")
    with torch.device("meta"):
        return None if name == "none" else create_model(name, 10, **options)


@functools.cache
def build_losses(teacher: tuple[str, ...], student: tuple[str, ...],
                 losses: tuple[tuple[str, ...], ...]) -> None:
    """Raises what the program would for losses that these networks cannot have."""
    teacher_info = None if build(teacher) is None else build(teacher).feature_info
    with torch.device("meta"):
        create_losses([list(words) for words in losses], build(student).feature_info, teacher_info)


def check_that_it_can_be_built(run: argparse.Namespace) -> None:
    losses = run.loss or [["ce" if run.teacher == ["none"] else "nkd"]]
    build_losses(tuple(run.teacher), tuple(run.student), tuple(map(tuple, losses)))


@pytest.mark.parametrize("path", EXPERIMENTS, **NAMES)
def test_what_scripts_train_can_be_built(path, started):
    assert started(path)
    for run in started(path):
        check_that_it_can_be_built(run)


@pytest.mark.parametrize("path", ON_IMAGENET, **NAMES)
def test_the_effective_batch_can_be_reached(path, started):
    """By a machine of 1, 2, 4 or 8 GPUs."""
    for run in started(path):
        for world_size in (1, 2, 4, 8):
            resolve_batch(run.batch_size, world_size, None, run.effective_batch, default=4096)


@pytest.mark.parametrize("path", ON_IMAGENET, **NAMES)
def test_headers_say_what_it_takes_and_what_is_known(path, started):
    """Figures of accuracy are those that were published with weights or code."""
    text = "\n".join(header(path))
    for label in ("Paper table:", "Hardware:", "Cost:", "Expected:"):
        assert re.search(rf"^# {label} ", text, re.MULTILINE), label
    assert all(f"= {run.effective_batch}" in text for run in started(path))
    assert "not measured" in re.sub(r"\n#\s*", " ", text)
    figures = {float(figure) for figure in re.findall(r"(\d\d\.\d) %", text)}
    assert figures <= {82.5, 83.8, 84.0, 81.5, 81.6, 82.1, 83.1, 84.3}


def settings_of(run: argparse.Namespace) -> dict:
    """What a run that continues another must have in common with it."""
    return {key: value for key, value in config.plain(run).items() if key not in FREE_ON_RESUME}


def settings_by_folder(paths: list[Path], started) -> list[tuple[str, dict]]:
    """The run folder of every training and what would be trained there."""
    found = []
    for path in paths:
        for run in started(path):
            losses = run.loss or [["ce" if run.teacher == ["none"] else "nkd"]]
            name = run_name(run.teacher, run.student, losses, run.epochs, run.seed, run.sparsity)
            found.append((f"{run.output_dir}/{name}", {**settings_of(run), "loss": losses}))
    return found


@pytest.mark.parametrize("path", EXPERIMENTS, **NAMES)
def test_every_training_of_a_script_has_a_folder_of_its_own(path, started):
    folders = [folder for folder, _ in settings_by_folder([path], started)]
    assert len({*folders}) == len(folders)
    assert all(folder.startswith("runs/") for folder in folders)


def test_scripts_share_a_folder_for_the_same_training_only(started):
    """A cell of two tables is trained once; the second script finds it complete."""
    seen, num_shared = {}, 0
    for folder, settings in settings_by_folder(EXPERIMENTS, started):
        num_shared += folder in seen
        assert seen.setdefault(folder, settings) == settings, folder
    assert num_shared >= 3


# What the scripts train


@pytest.mark.parametrize("name, expected", [
    ("train_slak_t_300ep.sh", (["slak_t", "drop_path=0.1"], 0.4, 2000, 0.5)),
    ("train_slak_s_300ep.sh", (["slak_s", "drop_path=0.4"], 0.4, 100, 0.3)),
    ("train_slak_b_300ep.sh", (["slak_b", "drop_path=0.5"], 0.4, 100, 0.3)),
    ("train_convnext_t_300ep.sh", (["convnext_t", "drop_path=0.1"], 0.0, 100, 0.3)),
    ("train_convnext_s_300ep.sh", (["convnext_s", "drop_path=0.4"], 0.0, 100, 0.3)),
    ("train_convnext_b_300ep.sh", (["convnext_b", "drop_path=0.5"], 0.0, 100, 0.3))])
def test_teachers_are_trained_with_the_published_settings(name, expected, started):
    (run,) = started(script(name))
    assert (run.student, run.sparsity, run.prune_every, run.prune_rate) == expected
    assert (run.epochs, run.effective_batch, run.lr, run.warmup_epochs) == (300, 4096, 4e-3, 20)
    assert run.teacher == ["none"] and run.model_ema and run.sparse_init == "snip"
    assert run.growth == "random" and run.weight_decay == 0.05


def test_the_large_slak_has_the_settings_of_the_removed_script(started):
    (run,) = started(script("train_slak_l_300ep.sh"))
    assert run.student == ["slak_l", "drop_path=0.5"] and run.model_ema
    assert (run.sparsity, run.sparse_init, run.prune_every) == (0.5, "erk", 4000)
    assert (run.batch_size, run.effective_batch, run.epochs) == (32, 4096, 300)


@pytest.mark.parametrize("name, word, student", [
    ("train_slak_t_120ep.sh", "31", ["slak_t", "drop_path=0.1", "kernel_size=31,29,27,13,5"]),
    ("train_slak_t_120ep.sh", "51", ["slak_t", "drop_path=0.1", "kernel_size=51,49,47,13,5"]),
    ("train_slak_t_120ep.sh", "61", ["slak_t", "drop_path=0.1", "kernel_size=61,59,57,13,5"]),
    ("train_convnext_120ep.sh", "t", ["convnext_t", "drop_path=0.1"]),
    ("train_convnext_120ep.sh", "s", ["convnext_s", "drop_path=0.4"]),
    ("train_convnext_120ep.sh", "b", ["convnext_b", "drop_path=0.5"])])
def test_the_first_word_chooses_the_network(name, word, student, tmp_path):
    (run,) = trainings(script(name), tmp_path, word, "--lr", "2e-3")
    assert run.student == student and (run.epochs, run.effective_batch) == (120, 4096)
    assert run.lr == 2e-3 and run.model_ema
    assert (run.sparsity, run.prune_every) == ((0.4, 2000) if "slak" in name else (0.0, 100))


@pytest.mark.parametrize("name, message", [("train_slak_t_120ep.sh", "31, 51 or 61"),
                                           ("train_convnext_120ep.sh", "t, s or b")])
def test_the_first_word_is_checked(name, message):
    for wrong in ("", "41"):
        result = bash(f"bash {script(name)} {wrong}", ROOT)
        assert result.returncode == 2 and message in result.stderr


NKD = [["nkd", "temperature=1", "gamma=1"]]
KD = [["kd", "temperature=3", "alpha=0.1"]]


@pytest.mark.parametrize("name, expected", [
    ("slak_t-convnext_t_bn-nkd-300ep.sh",
     ("slak_t", ["convnext_t_bn", "drop_path=0.1"], NKD, 2048, 300)),
    ("slak_s-convnext_s_bn-nkd-300ep.sh",
     ("slak_s", ["convnext_s_bn", "drop_path=0.1"], NKD, 4096, 300)),
    ("slak_t-resnet50-kd-120ep.sh", ("slak_t", ["resnet50"], KD, 1024, 120)),
    ("slak_t-resnet50-nkd-120ep.sh", ("slak_t", ["resnet50"], [["nkd"]], 1024, 120)),
    ("slak_t-mobilenetv3_l-kd-120ep.sh", ("slak_t", ["mobilenetv3_l"], KD, 1024, 120)),
    ("slak_t-mobilenetv3_l-ce_fd-120ep.sh",
     ("slak_t", ["mobilenetv3_l"], [["ce"], ["fd"]], 1024, 120)),
    ("slak_t-convnextv2_t-nkd-300ep.sh",
     ("slak_t", ["convnextv2_t", "drop_path=0.1"], NKD, 2048, 300)),
    ("slak_s-convnextv2_s-nkd-300ep.sh",
     ("slak_s", ["convnextv2_s", "drop_path=0.1"], NKD, 4096, 300))])
def test_students_are_taught_with_the_published_settings(name, expected, started):
    (run,) = started(script(name))
    assert ([run.teacher], run.student, run.loss, run.effective_batch, run.epochs) == (
        [[expected[0]]], *expected[1:])
    assert (run.batch_size, run.lr, run.min_lr, run.warmup_epochs) == (64, 4e-3, 1e-6, 20)
    assert run.weight_decay == 0.05 and not run.model_ema and run.sparsity == 0
    assert run.teacher_weights == "published"


# Loops


SIX = ["slak_t", "swin_t", "vit_s", "deit_s", "cswin_t", "convnext_t"]
TWO = ["resnet50", "convnext_t_bn drop_path=0.1"]
FOUR = ["convnext_t", *[f"slak_t kernel_size={sizes},13,5" for sizes in
                        ("31,29,27", "51,49,47", "61,59,57")]]


def cells(runs: list[argparse.Namespace]) -> list[tuple[str, str, str]]:
    return sorted((" ".join(run.teacher), " ".join(run.student),
                   " + ".join(" ".join(words) for words in run.loss)) for run in runs)


@pytest.mark.parametrize("name, teachers, students, losses", [
    ("all_teachers-120ep.sh", SIX, TWO, ["kd temperature=3 alpha=0.1", "nkd", "ce + fd"]),
    ("all_teachers-combined-120ep.sh", SIX, TWO[1:],
     ["kd temperature=3 alpha=0.1 + fd", "nkd + fd"]),
    ("kernel_sizes-120ep.sh", FOUR, TWO, ["nkd", "ce + fd"]),
    ("strong_teachers-120ep.sh", ["resnet50d", "efficientnet_b3", "vit_b", "convnext_t"], TWO,
     ["kd temperature=3 alpha=0.1", "nkd", "ce + fd"]),
    ("temperatures-120ep.sh", ["slak_t"], ["resnet50"],
     ["kd hard=true", *[f"kd temperature={temperature} alpha={alpha}"
                        for temperature in (1, 3, 20) for alpha in (0.1, 0.9)]]),
    ("supervised-120ep.sh", ["none"], [*TWO, "mobilenetv3_l"], ["ce"]),
    ("supervised-300ep.sh", ["none"],
     [f"{name} drop_path=0.1" for name in ("convnext_t_bn", "convnext_s_bn", "convnextv2_t",
                                           "convnextv2_s")], ["ce"])])
def test_loops_train_every_cell(name, teachers, students, losses, started):
    runs = started(script(name))
    assert cells(runs) == sorted((teacher, student, loss) for teacher in teachers
                                 for student in students for loss in losses)
    (epochs,) = {run.epochs for run in runs}
    assert f"{epochs}ep" in name and not any(run.model_ema or run.sparsity for run in runs)
    number = re.search(r"(\d+) trainings", "\n".join(header(script(name))))
    assert int(number[1]) == len(runs)


def recipe(run: argparse.Namespace) -> dict:
    """What a student and its baseline have in common."""
    return {key: value for key, value in settings_of(run).items()
            if key not in ("teacher", "teacher_weights", "loss")}


def test_every_gain_has_its_baseline(started):
    """The supervised run with the same student and recipe as each distilled one."""
    alone = [recipe(run) for epochs in (120, 300)
             for run in started(script(f"supervised-{epochs}ep.sh"))]
    distilled = [run for path in ON_IMAGENET for run in started(path)
                 if run.teacher != ["none"] and "finetune" not in path.name]
    assert len(distilled) > 90
    assert all(recipe(run) in alone for run in distilled)


def test_cells_are_chosen_in_the_environment(tmp_path):
    path = script("all_teachers-120ep.sh")
    runs = trainings(path, tmp_path, "--epochs", "90", TEACHERS="deit_s slak_b",
                     STUDENTS="convnext_t:drop_path=0.2:dims=8,16,32,64 resnet18",
                     LOSSES="nkd:gamma=1.5+fd:weight=3e-5:features=-1")
    assert cells(runs) == sorted((teacher, student, "nkd gamma=1.5 + fd weight=3e-5 features=-1")
                                 for teacher in ("deit_s", "slak_b") for student in
                                 ("resnet18", "convnext_t drop_path=0.2 dims=8,16,32,64"))
    assert {run.epochs for run in runs} == {90}
    (run, *_) = runs
    check_that_it_can_be_built(run)
    runs = trainings(script("strong_teachers-120ep.sh"), tmp_path, TEACHERS="vit_l", LOSSES="ce+fd")
    assert {run.teacher_weights for run in runs} == {str(tmp_path / "weights" / "vit_l.pth")}
    assert build(tuple(runs[0].teacher)).num_parameters > 300e6
    check_that_it_can_be_built(runs[0])


def test_weights_come_from_a_folder_or_are_published(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "swin_t.pth").touch()
    (tmp_path / "weights" / "slak_t_31_120ep.pth").touch()
    result, lines = run_script(script("all_teachers-120ep.sh"), tmp_path, cwd=tmp_path,
                               WEIGHTS="weights", TEACHERS="swin_t deit_s", LOSSES="nkd",
                               STUDENTS="resnet50")
    assert result.returncode == 0, result.stderr
    assert [re.search(r"--teacher-weights (\S+)", line)[1] for line in lines] == [
        str(tmp_path / "weights" / "swin_t.pth"), "published"]
    runs = trainings(script("kernel_sizes-120ep.sh"), tmp_path, LOSSES="nkd", STUDENTS="resnet50")
    sources = [run.teacher_weights for run in runs]
    assert sources[:2] == ["published", str(tmp_path / "weights" / "slak_t_31_120ep.pth")]
    assert [source.split("/")[-2:] for source in sources[2:]] == [
        ["WiQYWNclJ9bW5XV", "download"], ["VpR1te71NmVImJb", "download"]]


@pytest.mark.parametrize("name, environment, message", [
    ("all_teachers-120ep.sh", {"WEIGHTS": ""}, "a folder that holds cswin_t.pth"),
    ("all_teachers-combined-120ep.sh", {"WEIGHTS": ""}, "a folder that holds cswin_t.pth"),
    ("strong_teachers-120ep.sh", {"WEIGHTS": ""}, "a folder that holds convnext_t_22k.pth"),
    ("all_teachers-120ep.sh", {"WEIGHTS": "/no/such"}, "WEIGHTS=/no/such is no folder"),
    ("slak_t-convnext_t-nkd-finetune.sh", {"STUDENT_WEIGHTS": ""}, "set STUDENT_WEIGHTS"),
    ("kernel_sizes-120ep.sh", {"TEACHERS": "41"}, "no such kernel: '41'"),
    ("ablate_slak_t_kernels_120ep.sh", {"KERNELS": "41"}, "no such kernel"),
    ("ablate_slak_t_kernels_120ep.sh", {"STEPS": "x"}, "no such step: 'x'"),
    ("ablate_slak_t_sparsity_120ep.sh", {"AXES": "x"}, "no such axis: 'x'"),
    ("slak_t-resnet50-nkd-120ep.sh", {"NNODES": "2"}, "set HOST"),
    ("slak_t-resnet50-nkd-120ep.sh", {"DATA": ""}, "set DATA")])
def test_what_is_missing_is_said_before_anything_is_trained(name, environment, message, tmp_path):
    result, lines = run_script(script(name), tmp_path, **environment)
    assert result.returncode != 0 and message in result.stderr and not lines


def test_a_teacher_without_a_file_can_be_left_out(tmp_path):
    name = "all_teachers-120ep.sh"
    result, _ = run_script(script(name), tmp_path, WEIGHTS="", TEACHERS="slak_t cswin_t swin_t")
    (advice,) = re.findall(r'TEACHERS="(.*)"', result.stderr)
    assert advice.split() == ["slak_t", "swin_t"]
    assert trainings(script(name), tmp_path, WEIGHTS="", TEACHERS=advice)


def test_fine_tuning_starts_from_the_given_weights(started):
    (run,) = started(script("slak_t-convnext_t-nkd-finetune.sh"))
    assert Path(run.student_weights).name == "pretrained.pth" and run.student[0] == "convnext_t"
    assert (run.lr, run.epochs, run.warmup_epochs, run.effective_batch) == (5e-5, 30, 0, 512)
    assert (run.layer_decay, run.mixup, run.cutmix, run.weight_decay) == (0.8, 0, 0, 1e-8)


# Ablations of the sparse teacher


def test_the_steps_to_large_kernels(started):
    runs = started(script("ablate_slak_t_kernels_120ep.sh"))
    assert len(runs) == 20
    for run in runs:
        assert run.teacher == ["none"] and run.model_ema
        assert (run.epochs, run.effective_batch, run.prune_rate) == (120, 4096, run.sparsity and
                                                                     0.5 or 0.3)
    at_51 = [run for run in runs if "kernel_size=51" in " ".join(run.student)]
    sizes = [build(tuple(run.student)).num_parameters for run in at_51]
    assert [run.sparsity for run in at_51] == [0, 0, 0, 0.4, 0.4]
    assert sizes[0] < sizes[1] and sizes[2] == sizes[3] < sizes[0] and sizes[2] < sizes[4]
    assert at_51[4].student == ["slak_t", "drop_path=0.1", "kernel_size=51,49,47,13,5"]


def test_one_axis_of_sparsity_changes_at_a_time(started):
    base, *others = runs = started(script("ablate_slak_t_sparsity_120ep.sh"))
    assert len(runs) == 20
    assert (base.sparsity, base.prune_every, base.prune_rate, base.growth) == (0.4, 2000, 0.5,
                                                                               "random")
    changed = []
    for run in others:
        axes = [name for name in ("sparsity", "sparse_init", "sparse_layers", "growth")
                if getattr(run, name) != getattr(base, name)]
        moves = [(run.prune_every, run.prune_rate) != (base.prune_every, base.prune_rate)]
        assert run.student[:2] == base.student
        changed.append((*axes, *["moves"] * any(moves),
                        *[word.partition("=")[0] for word in run.student[2:]]))
    assert {*changed} == {("sparsity", "width_factor"), ("kernel_size",), ("moves",), ("bn",),
                          ("sparse_layers",), ("sparse_init",), ("growth",)}


def test_narrow_and_wide_networks_have_as_many_live_weights(started):
    runs = [run for run in started(script("ablate_slak_t_sparsity_120ep.sh"))
            if run.output_dir.name != "width-1.3-0"]
    live = {run.output_dir.name: (1 - run.sparsity) * build(tuple(run.student)).num_parameters
            for run in runs if run.output_dir.name.startswith(("width", "base"))}
    assert len(live) == 5
    assert all(number == pytest.approx(live["base"], rel=0.015) for number in live.values())


# The launcher


def launcher_words(line: str) -> list[str]:
    return line.partition(" train_kd.py ")[0].split()


def test_one_machine_needs_no_rendezvous(tmp_path):
    _, lines = run_script(script("temperatures-120ep.sh"), tmp_path, GPUS="3")
    assert {*map(tuple, map(launcher_words, lines))} == {
        ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3")}


def test_several_machines_meet_at_the_first(tmp_path):
    """A port for each training, the same on all machines."""
    _, lines = run_script(script("temperatures-120ep.sh"), tmp_path, NNODES="2", HOST="node1",
                          RUN_ID="7")
    for number, line in enumerate(lines):
        words = launcher_words(line)
        assert "--standalone" not in words
        assert {"--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=node1:{29500 + number}",
                "--rdzv-id=7", "--nproc_per_node=8"} < {*words}
    assert len(lines) == 7


def test_a_training_that_fails_ends_the_loop(tmp_path):
    failing = RECORDING.replace('>> "$ASKED"', '>> "$ASKED"; exit 3', 1)
    result, lines = run_script(script("temperatures-120ep.sh"), tmp_path, python=failing)
    assert result.returncode == 3 and len(lines) == 1


SAVING = """#!/usr/bin/env bash
if [[ " $* " == *" train_kd.py "* ]]; then
    trap 'echo saved >> "$ASKED"; exit 0' TERM
    echo started >> "$ASKED"
    for _ in {1..300}; do sleep 0.1; done
else exec "$REAL" "$@"; fi
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_training_and_ends_the_loop(number, tmp_path):
    """As a batch system's does, to this one process; Ctrl-C reaches the training by itself, too."""
    python, asked = tmp_path / "python", tmp_path / "asked"
    python.write_text(SAVING)
    python.chmod(0o755)
    process = subprocess.Popen(
        ["bash", str(script("temperatures-120ep.sh"))], cwd=ROOT, stderr=subprocess.PIPE,
        # Where the tests run in the background Ctrl-C is ignored, and bash cannot trap it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={"PATH": os.environ["PATH"], "L2S_PYTHON": str(python), "DATA": str(tmp_path),
             "ASKED": str(asked), "REAL": sys.executable})
    deadline = time.monotonic() + 30
    while not (asked.exists() and asked.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert asked.read_text().split() == ["started", "saved"]


RECORDING_ALL = """#!/usr/bin/env bash
case " $* " in *" eval.py "* | *" -m analysis.erf "*) printf '%s\\n' "$*" >> "$ASKED" ;;
*) exec "$REAL" "$@" ;; esac
"""


@pytest.mark.parametrize("name, parser, number", [
    ("robustness.sh", evaluation.build_parser, 3 * 6), ("receptive_fields.sh", erf_parser, 1)])
def test_what_scripts_evaluate(name, parser, number, tmp_path):
    """Their words are known to the program, their data sets and models exist."""
    fake, asked = tmp_path / "python", tmp_path / "asked"
    fake.write_text(RECORDING_ALL)
    fake.chmod(0o755)
    result = bash(shlex.join(["bash", str(script(name))]), ROOT, L2S_PYTHON=str(fake),
                  ASKED=str(asked), REAL=sys.executable, DATA=str(tmp_path), SETS=str(tmp_path))
    assert result.returncode == 0, result.stderr
    lines = asked.read_text().splitlines()
    assert len({*lines}) == number
    for line in lines:
        words = shlex.split(line)
        run = parser().parse(words[1 + max(words.index(word) for word in (
            "eval.py", "analysis.erf") if word in words):])
        models = run.model if isinstance(run.model[0], list) else [run.model]
        assert all(published_source(model[0]) for model in models)
        if name == "robustness.sh":
            assert run.data_set[0] in DATASETS.names()
            assert run.data_path == str(tmp_path / run.data_set[0])


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
    """The whole script, on a few images."""
    command = ("bash run_scripts/quickstart.sh --data-set outlines train_size=128 val_size=20 "
               "--num-workers 0")
    result = bash(command, ROOT, L2S_PYTHON=sys.executable, RUNS=str(tmp_path / "runs"),
                  EPOCHS="2", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-2000:]
    table = result.stdout[result.stdout.index("| teacher"):].splitlines()
    assert [row.split(" | ")[:3:2] for row in table[2:5]] == [
        ["| none", "convnext_bn_pico"], ["| none", "slak_pico"],
        ["| slak_pico", "convnext_bn_pico"]]
    assert f"Run folders: {tmp_path / 'runs'}/" in table
