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
from models.published import published_source
from run_scripts.equalise import Trained, add_asked, decide, next_training, read_asked
from utils import config
from utils.checkpoint import FREE_ON_RESUME, run_name
from utils.optim import resolve_batch
from utils.registry import parse_spec

ROOT = Path(__file__).parent.parent
RUN_SCRIPTS = ROOT / "run_scripts"
EXPERIMENTS = sorted(RUN_SCRIPTS.glob("*/*.sh"))  # teachers/, students/, studies/
TRAININGS = [path for path in EXPERIMENTS
             if path.stem not in ("robustness", "receptive_fields", "imagenette128_erf",
                                  "equal_teachers", "equal_teachers_gpu")]
ON_IMAGENET = [path for path in TRAININGS
               if "imagenette" not in path.name and path.stem != "teacher_cache"]
NAMES = dict(ids=lambda path: path.relative_to(ROOT).as_posix())


def bash(command: str, cwd: Path, timeout: int = 60, **environment: str
         ) -> subprocess.CompletedProcess:
    """A clean environment, without a network proxy or a virtual environment of the caller."""
    env = {"PATH": os.environ["PATH"], "HOME": str(cwd), "PIP_NO_INDEX": "1", **environment}
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=env, capture_output=True,
                          text=True, timeout=timeout)


def script(name: str) -> Path:
    """teachers/NAME.sh, students/NAME.sh or studies/NAME.sh."""
    (path,) = RUN_SCRIPTS.glob(f"*/{name}.sh")
    return path


# setup.sh


@pytest.fixture
def copy(tmp_path) -> Path:
    """run_scripts and the requirement files in a folder of their own."""
    shutil.copytree(RUN_SCRIPTS, tmp_path / "run_scripts")
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, tmp_path)
    return tmp_path


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def installs(asked: Path) -> list[str]:
    """What pip was asked to install, from the record of a fake environment."""
    return [line for line in asked.read_text().splitlines() if " install " in line]


SOURCE = "source run_scripts/setup.sh {}; echo PYTHON=$PYTHON; pwd"


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
    python = copy / "elsewhere" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    result = bash("source ../run_scripts/setup.sh; echo $ROOT $PYTHON", copy / "elsewhere",
                  L2S_PYTHON="./python")
    assert result.stdout.split() == [str(copy), str(python)], result.stderr


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


@pytest.mark.parametrize("requirements, python, message", [
    ("", "no/python", "L2S_PYTHON=no/python does not run"),
    ("requirement.txt", sys.executable, "no such file: requirement.txt")])
def test_setup_says_what_it_cannot_use(requirements, python, message, copy):
    result = bash(SOURCE.format(requirements), copy, L2S_PYTHON=python)
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1]


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
        assert lines[0].endswith(f"-r {copy}/requirements.txt")
    assert f"PYTHON={venv}/bin/python" in result.stdout and "installing" not in result.stdout
    with open(copy / "requirements.txt", "a") as file:
        file.write("another\n")
    result = bash("bash run_scripts/setup.sh", copy, L2S_VENV=str(venv))
    assert result.returncode == 0 and f"source {venv}/bin/activate" in result.stdout
    assert len(installs(asked)) == 2


def test_an_installation_that_failed_is_tried_again(copy):
    venv, asked = fake_venv(copy), copy / "asked"
    result = bash(SOURCE.format(""), copy, L2S_VENV=str(venv), FAIL="1")
    assert result.returncode != 0 and "PYTHON=" not in result.stdout
    assert bash(SOURCE.format(""), copy, L2S_VENV=str(venv)).returncode == 0
    assert len(installs(asked)) == 2


# Every script


@pytest.mark.parametrize("path", [*RUN_SCRIPTS.glob("*.sh"), *EXPERIMENTS, ROOT / ".ci" / "run"],
                         **NAMES)
def test_bash_can_read_it(path):
    result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr


def header(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return lines[:next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]


@pytest.mark.parametrize("path", EXPERIMENTS, **NAMES)
def test_experiments_have_a_header_and_share_the_rest(path):
    """What, table, GPUs, cost, expected accuracy and how it is started; then launch.sh and what
    distinguishes the experiment. Nothing is installed."""
    first, *rest = header(path)
    assert first == "#!/usr/bin/env bash"
    assert len(rest[0].split()) > 4, "the second line says what it does"
    text = "\n".join(rest)
    for label in ("Table", "GPUs", "Cost", "Expected"):
        assert re.search(rf"^# {label}: +\w", text, re.MULTILINE), label
    assert f"bash {path.relative_to(ROOT)}" in text
    code = path.read_text()[len("\n".join(header(path))):].strip()
    assert code.removeprefix("GPUS=${GPUS:-1}\n").startswith(
        'source "$(dirname "$0")/../launch.sh"\n')
    assert not re.search(r"setup\.sh|\bpip\b|torch\.distributed|set -e", code)
    if path.parent.name in ("teachers", "students"):
        assert code.count("train ") == 1 and code.endswith('"$@"') and len(code.splitlines()) <= 9


# What the scripts train

RECORDING = """#!/usr/bin/env bash
# In place of Python: notes what would be run; everything else is done.
case " $* " in
    */train_kd.py\\ * | */eval.py\\ * | *" -m analysis."*) printf '%s\\n' "$*" >> "$ASKED" ;;
    *) exec "$REAL" "$@" ;;
esac
"""


def run_script(path: Path, folder: Path, *words: str, python: str = RECORDING,
               **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run it in `folder` with a fake Python and the weights that have no address; and what it
    started."""
    folder.mkdir(exist_ok=True)
    fake, asked, weights = folder / "python", folder / "asked", folder / "weights"
    fake.write_text(python)
    fake.chmod(0o755)
    asked.write_text("")
    weights.mkdir(exist_ok=True)
    for name in ("cswin_t", "convnext_t_22k", "vit_l"):
        (weights / f"{name}.pth").touch()
    settings = {"PYTHON": str(fake), "ASKED": str(asked), "REAL": sys.executable,
                "DATA": str(folder), "WEIGHTS": "weights", "SEEDS": "0 1", "SETS": "sets",
                "STUDENT_WEIGHTS": "pretrained.pth", "GPUS": "1", **environment}
    result = bash(shlex.join(["bash", str(path), *words]), folder, **settings)
    return result, asked.read_text().splitlines()


def trainings(path: Path, folder: Path, *words: str, **environment: str
              ) -> list[argparse.Namespace]:
    """The command lines that a script starts, parsed by the program itself."""
    result, lines = run_script(path, folder, *words, **environment)
    assert result.returncode == 0, result.stderr
    return [train_kd.build_parser().parse(shlex.split(line.partition("train_kd.py ")[2]))
            for line in lines if "train_kd.py " in line]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """path -> what the script trains with its defaults; each script runs once."""
    folder = tmp_path_factory.mktemp("scripts")
    return functools.cache(lambda path: trainings(path, folder / path.stem))


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


def losses_of(run: argparse.Namespace) -> list[list[str]]:
    return run.loss or [["ce" if run.teacher == ["none"] else "nkd"]]


def check_that_it_can_be_built(run: argparse.Namespace) -> None:
    build_losses(tuple(run.teacher), tuple(run.student), tuple(map(tuple, losses_of(run))))


@pytest.mark.parametrize("path", TRAININGS, **NAMES)
def test_what_scripts_train_can_be_built(path, started):
    assert started(path)
    for run in started(path):
        check_that_it_can_be_built(run)


@pytest.mark.parametrize("path", ON_IMAGENET, **NAMES)
def test_headers_say_what_the_script_trains(path, started):
    """The batch, which 1, 2, 4 or 8 GPUs can reach; the number of trainings; and no accuracy but
    those that were published with weights or code."""
    text, runs = "\n".join(header(path)), started(path)
    for run in runs:
        assert f"= {run.effective_batch}" in text
        for world_size in (1, 2, 4, 8):
            resolve_batch(run.batch_size, world_size, None, run.effective_batch, default=4096)
    number = re.search(r"(\d+)\s+(?:# )?trainings", text)
    assert len(runs) == (int(number[1]) if number else 1)
    assert "not measured" in re.sub(r"\n#\s*", " ", text)
    published = {82.5, 83.8, 84.0, 81.5, 81.6, 82.1, 83.1, 84.3}
    assert {float(value) for value in re.findall(r"(\d\d\.\d) %", text)} <= published


def settings_of(run: argparse.Namespace) -> dict:
    """What a run that continues another must have in common with it."""
    settings = {key: value for key, value in config.plain(run).items() if key not in FREE_ON_RESUME}
    return {**settings, "loss": losses_of(run)}


def folder_of(run: argparse.Namespace) -> str:
    name = run_name(run.teacher, run.student, losses_of(run), run.epochs, run.seed, run.sparsity)
    return str(run.output_dir or f"runs/{name}")


def test_runs_share_a_folder_for_the_same_training_only(started):
    """A cell of two tables is trained once; the second script finds it complete."""
    seen, num_shared = {}, 0
    for path in TRAININGS:
        folders = [folder_of(run) for run in started(path)]
        assert len({*folders}) == len(folders) and all(name.startswith("runs/") for name in folders)
        for folder, run in zip(folders, started(path)):
            num_shared += folder in seen
            assert seen.setdefault(folder, settings_of(run)) == settings_of(run), folder
    assert num_shared >= 3


def slak(size: str, drop_path: float, *options: str) -> list[str]:
    return [f"slak_{size}", f"drop_path={drop_path}", *options]


SNIP = (0.4, "snip")
DENSE = (0.0, "snip", 100, 0.3)  # the last three are defaults, without effect


@pytest.mark.parametrize("name, student, sparse, batch_size", [
    ("slak_t-300ep", slak("t", 0.1), (*SNIP, 2000, 0.5), 128),
    ("slak_s-300ep", slak("s", 0.4), (*SNIP, 100, 0.3), 64),
    ("slak_b-300ep", slak("b", 0.5), (*SNIP, 100, 0.3), 32),
    ("slak_l-300ep", slak("l", 0.5), (0.5, "erk", 4000, 0.3), 32),
    ("slak_t_31-120ep", slak("t", 0.1, "kernel_size=31,29,27,13,5"), (*SNIP, 2000, 0.5), 128),
    ("slak_t_51-120ep", slak("t", 0.1, "kernel_size=51,49,47,13,5"), (*SNIP, 2000, 0.5), 128),
    ("slak_t_61-120ep", slak("t", 0.1, "kernel_size=61,59,57,13,5"), (*SNIP, 2000, 0.5), 128),
    *[(f"convnext_{size}-{epochs}ep", [f"convnext_{size}", f"drop_path={drop_path}"], DENSE, 128)
      for size, drop_path in (("t", 0.1), ("s", 0.4), ("b", 0.5)) for epochs in (120, 300)]])
def test_teachers_are_trained_with_the_published_settings(name, student, sparse, batch_size,
                                                          started):
    (run,) = started(script(name))
    assert run.student == student and run.teacher == ["none"] and run.model_ema
    assert (run.sparsity, run.sparse_init, run.prune_every, run.prune_rate) == sparse
    assert run.growth == "random" and run.weight_decay == 0.05 and run.batch_size == batch_size
    assert f"{run.epochs}ep" in name
    assert (run.effective_batch, run.lr, run.warmup_epochs) == (4096, 4e-3, 20)
    assert run.output_dir == Path("runs/teachers") / name


NKD = [["nkd", "temperature=1", "gamma=1"]]
KD = [["kd", "temperature=3", "alpha=0.1"]]


@pytest.mark.parametrize("name, options, losses, effective_batch", [
    ("slak_t-convnext_t_bn-nkd-300ep", ["drop_path=0.1"], NKD, 2048),
    ("slak_s-convnext_s_bn-nkd-300ep", ["drop_path=0.1"], NKD, 4096),
    ("slak_t-convnextv2_t-nkd-300ep", ["drop_path=0.1"], NKD, 2048),
    ("slak_s-convnextv2_s-nkd-300ep", ["drop_path=0.1"], NKD, 4096),
    ("slak_t-resnet50-kd-120ep", [], KD, 1024),
    ("slak_t-resnet50-nkd-120ep", [], [["nkd"]], 1024),
    ("slak_t-mobilenetv3_l-kd-120ep", [], KD, 1024),
    ("slak_t-mobilenetv3_l-ce_fd-120ep", [], [["ce"], ["fd"]], 1024)])
def test_students_are_taught_with_the_published_settings(name, options, losses, effective_batch,
                                                         started):
    (run,) = started(script(name))
    teacher, student, _, epochs = name.split("-")
    assert (run.teacher, run.student) == ([teacher], [student, *options])
    assert (run.loss, run.effective_batch) == (losses, effective_batch)
    assert f"{run.epochs}ep" == epochs and run.output_dir is None
    assert (run.batch_size, run.lr, run.min_lr, run.warmup_epochs) == (64, 4e-3, 1e-6, 20)
    assert run.weight_decay == 0.05 and not run.model_ema and run.sparsity == 0
    assert run.teacher_weights == "published"


def test_fine_tuning_starts_from_the_given_weights(started):
    (run,) = started(script("slak_t-convnext_t_22k-nkd-30ep"))
    assert run.student_weights == "pretrained.pth" and run.student[0] == "convnext_t"
    assert (run.lr, run.epochs, run.warmup_epochs, run.effective_batch) == (5e-5, 30, 0, 512)
    assert (run.layer_decay, run.mixup, run.cutmix, run.weight_decay) == (0.8, 0, 0, 1e-8)


# Loops


SIX = ["slak_t", "swin_t", "vit_s", "deit_s", "cswin_t", "convnext_t"]
TWO = ["resnet50", "convnext_t_bn drop_path=0.1"]
FOUR = ["convnext_t", *[f"slak_t kernel_size={sizes},13,5" for sizes in
                        ("31,29,27", "51,49,47", "61,59,57")]]


def cells(runs: list[argparse.Namespace]) -> list[tuple[str, str, str]]:
    return sorted((" ".join(run.teacher), " ".join(run.student),
                   " + ".join(" ".join(words) for words in run.loss)) for run in runs)


@pytest.mark.parametrize("name, teachers, students, losses", [
    ("all_teachers-120ep", SIX, TWO, ["kd temperature=3 alpha=0.1", "nkd", "ce + fd"]),
    ("combined_losses-120ep", SIX, TWO[1:], ["kd temperature=3 alpha=0.1 + fd", "nkd + fd"]),
    ("kernel_sizes-120ep", FOUR, TWO, ["nkd", "ce + fd"]),
    ("strong_teachers-120ep", ["resnet50d", "efficientnet_b3", "vit_b", "convnext_t"], TWO,
     ["kd temperature=3 alpha=0.1", "nkd", "ce + fd"]),
    ("temperatures-120ep", ["slak_t"], ["resnet50"],
     ["kd hard=true", *[f"kd temperature={temperature} alpha={alpha}"
                        for temperature in (1, 3, 20) for alpha in (0.1, 0.9)]]),
    ("supervised-120ep", ["none"], [*TWO, "mobilenetv3_l"], ["ce"]),
    ("supervised-300ep", ["none"],
     [f"{name} drop_path=0.1" for name in ("convnext_t_bn", "convnext_s_bn", "convnextv2_t",
                                           "convnextv2_s")], ["ce"])])
def test_loops_train_every_cell(name, teachers, students, losses, started):
    runs = started(script(name))
    assert cells(runs) == sorted((teacher, student, loss) for teacher in teachers
                                 for student in students for loss in losses)
    (epochs,) = {run.epochs for run in runs}
    assert f"{epochs}ep" in name and not any(run.model_ema or run.sparsity for run in runs)


def recipe(run: argparse.Namespace) -> dict:
    """What a student and its baseline have in common."""
    return {key: value for key, value in settings_of(run).items()
            if key not in ("teacher", "teacher_weights", "loss")}


def test_every_gain_has_its_baseline(started):
    """The supervised run with the same student and recipe as each distilled one."""
    alone = [recipe(run) for epochs in (120, 300)
             for run in started(script(f"supervised-{epochs}ep"))]
    distilled = [run for path in ON_IMAGENET for run in started(path)
                 if run.teacher != ["none"] and "_22k-nkd" not in path.name]
    assert len(distilled) > 90
    assert all(recipe(run) in alone for run in distilled)


def test_cells_are_chosen_in_the_environment(tmp_path):
    runs = trainings(script("all_teachers-120ep"), tmp_path, "--epochs", "90",
                     TEACHERS="deit_s slak_b",
                     STUDENTS="convnext_t:drop_path=0.2:dims=8,16,32,64 resnet18",
                     LOSSES="nkd:gamma=1.5+fd:weight=3e-5:features=-1")
    assert cells(runs) == sorted((teacher, student, "nkd gamma=1.5 + fd weight=3e-5 features=-1")
                                 for teacher in ("deit_s", "slak_b") for student in
                                 ("resnet18", "convnext_t drop_path=0.2 dims=8,16,32,64"))
    assert {run.epochs for run in runs} == {90}
    check_that_it_can_be_built(runs[0])
    runs = trainings(script("strong_teachers-120ep"), tmp_path, TEACHERS="vit_l", LOSSES="ce+fd")
    assert {run.teacher_weights for run in runs} == {"weights/vit_l.pth"}
    assert build(tuple(runs[0].teacher)).num_parameters > 300e6
    check_that_it_can_be_built(runs[0])
    runs = trainings(script("supervised-300ep"), tmp_path, TINY="resnet18", SMALL="")
    assert [run.student for run in runs] == [["resnet18"]]


def test_weights_come_from_a_folder_or_are_published(tmp_path):
    (tmp_path / "weights").mkdir()
    for name in ("swin_t", "slak_t_31_120ep"):
        (tmp_path / "weights" / f"{name}.pth").touch()
    runs = trainings(script("all_teachers-120ep"), tmp_path, TEACHERS="swin_t deit_s",
                     LOSSES="nkd", STUDENTS="resnet50")
    assert [run.teacher_weights for run in runs] == ["weights/swin_t.pth", "published"]
    runs = trainings(script("kernel_sizes-120ep"), tmp_path, LOSSES="nkd", STUDENTS="resnet50")
    sources = [run.teacher_weights for run in runs]
    assert sources[:2] == ["published", "weights/slak_t_31_120ep.pth"]
    assert [source.split("/")[-2:] for source in sources[2:]] == [
        ["WiQYWNclJ9bW5XV", "download"], ["VpR1te71NmVImJb", "download"]]


@pytest.mark.parametrize("name, environment, message", [
    ("all_teachers-120ep", {"WEIGHTS": ""}, "a folder that holds cswin_t.pth"),
    ("combined_losses-120ep", {"WEIGHTS": ""}, "a folder that holds cswin_t.pth"),
    ("strong_teachers-120ep", {"WEIGHTS": ""}, "a folder that holds convnext_t_22k.pth"),
    ("all_teachers-120ep", {"WEIGHTS": "/no/such"}, "WEIGHTS=/no/such is no folder"),
    ("slak_t-convnext_t_22k-nkd-30ep", {"STUDENT_WEIGHTS": ""}, "set STUDENT_WEIGHTS to a file"),
    ("slak_t_kernels-120ep", {"KERNELS": "41"}, "no such kernel: '41'"),
    ("slak_t_kernels-120ep", {"STEPS": "x"}, "no such step: 'x'"),
    ("slak_t_sparsity-120ep", {"AXES": "x"}, "no such axis: 'x'"),
    ("slak_t-resnet50-nkd-120ep", {"NNODES": "2"}, "set HOST to the name of the first"),
    ("slak_t-resnet50-nkd-120ep", {"DATA": ""}, "set DATA to the folder"),
    ("robustness", {"SETS": ""}, "set SETS to a folder"),
    ("receptive_fields", {"DATA": ""}, "set DATA to the folder"),
    ("slak_t-resnet50-nkd-120ep", {"PYTHON": "no-python"}, "PYTHON=no-python does not run")])
def test_what_is_missing_is_said_before_anything_is_trained(name, environment, message, tmp_path):
    result, lines = run_script(script(name), tmp_path, **environment)
    assert result.returncode == 2 and not lines
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith(f"{name}.sh: ") and message in sentence


def test_missing_packages_are_named_and_nothing_is_installed(copy):
    (copy / "requirements.txt").write_text("numpy\nno-such-package\n")
    before = files(copy)
    result = bash("bash run_scripts/teachers/slak_t-300ep.sh", copy, PYTHON=sys.executable,
                  DATA=".")
    assert result.returncode == 2 and "lacks: no-such-package. Install" in result.stderr
    assert files(copy) == before


def test_a_teacher_without_a_file_can_be_left_out(tmp_path):
    path = script("all_teachers-120ep")
    result, _ = run_script(path, tmp_path, WEIGHTS="", TEACHERS="slak_t cswin_t swin_t")
    (advice,) = re.findall(r'TEACHERS="(.*)"', result.stderr)
    assert advice == "slak_t swin_t"
    assert trainings(path, tmp_path, WEIGHTS="", TEACHERS=advice)


# Ablations of the sparse teacher


def test_the_steps_to_large_kernels(started):
    runs = started(script("slak_t_kernels-120ep"))
    for run in runs:
        assert run.teacher == ["none"] and run.model_ema
        assert (run.epochs, run.effective_batch) == (120, 4096)
        assert run.prune_rate == (0.5 if run.sparsity else 0.3)
    at_51 = [run for run in runs if "kernel_size=51" in " ".join(run.student)]
    sizes = [build(tuple(run.student)).num_parameters for run in at_51]
    assert [run.sparsity for run in at_51] == [0, 0, 0, 0.4, 0.4]
    assert sizes[0] < sizes[1] and sizes[2] == sizes[3] < sizes[0] and sizes[2] < sizes[4]
    assert at_51[4].student == ["slak_t", "drop_path=0.1", "kernel_size=51,49,47,13,5"]


def test_one_axis_of_sparsity_changes_at_a_time(started):
    base, *others = started(script("slak_t_sparsity-120ep"))
    assert (base.sparsity, base.prune_every, base.prune_rate, base.growth) == (0.4, 2000, 0.5,
                                                                               "random")
    changed = set()
    for run in others:
        axes = [name for name in ("sparsity", "sparse_init", "sparse_layers", "growth")
                if getattr(run, name) != getattr(base, name)]
        if (run.prune_every, run.prune_rate) != (base.prune_every, base.prune_rate):
            axes.append("moves")
        assert run.student[:2] == base.student
        changed.add((*axes, *[word.partition("=")[0] for word in run.student[2:]]))
    assert changed == {("sparsity", "width_factor"), ("kernel_size",), ("moves",), ("bn",),
                       ("sparse_layers",), ("sparse_init",), ("growth",)}


def test_narrow_and_wide_networks_have_as_many_live_weights(started):
    live = {run.output_dir.name: (1 - run.sparsity) * build(tuple(run.student)).num_parameters
            for run in started(script("slak_t_sparsity-120ep"))
            if run.output_dir.name.startswith(("width", "base"))}
    del live["width-1.3-0"]
    assert len(live) == 5
    assert all(number == pytest.approx(live["base"], rel=0.015) for number in live.values())


# Small studies and evaluations


def test_a_dry_run_passes_through_and_measures_nothing(tmp_path):
    """It needs no weights of a teacher that it has not trained."""
    result, lines = run_script(script("imagenette128_erf"), tmp_path, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert len(lines) == 2 + 3 + 6 and all(line.endswith("--dry-run") for line in lines)
    sources = {word for line in lines for word in re.findall(r"--teacher-weights (\S+)", line)}
    assert sources == {"random"}


def test_the_study_measures_what_it_trained(tmp_path):
    result, lines = run_script(script("imagenette128_erf"), tmp_path)
    assert result.returncode == 0, result.stderr
    made = {re.search(r"--output-dir (\S+)", line)[1] for line in lines if "train_kd.py" in line}
    assert len(made) == 2 + 3 + 6
    measured = [line for line in lines if "analysis." in line and "analysis.report" not in line]
    assert [line.split()[1] for line in measured] == [
        "analysis.erf", *["analysis.similarity"] * 3, "analysis.curves"]
    used = [*re.findall(r"(\S+)/checkpoint-last\.pth", " ".join(measured[:4])),
            *re.findall(r"runs/imagenette128/\S+", measured[4])]
    assert {*used} == made


# Equal teachers

RULE = {"longest": 16, "tolerance": 0.5, "tries": 4, "first_seed": 100}


def runs_of(**families: dict[tuple[int, int], float]) -> dict[str, list[Trained]]:
    """family={(epochs, seed): top-1}"""
    return {family: [Trained(family, epochs, seed, acc1) for (epochs, seed), acc1 in runs.items()]
            for family, runs in families.items()}


@pytest.mark.parametrize("known, epochs, seed", [
    ({8: 62.0}, 4, 100),  # above: half as many
    ({8: 55.0}, 16, 100),  # below: twice as many
    ({8: 55.0, 16: 59.0}, 16, 101),  # which are the most
    ({4: 59.0, 16: 61.0}, 8, 100),  # half of the way on a scale of log(epochs)
    ({8: 62.0, 7: 59.4}, 7, 101),  # nothing between: the nearer one again
    ({8: 60.6, 7: 59.0}, 8, 101),
    ({1: 61.0, 8: 62.0}, 1, 101)])
def test_the_next_training_of_a_teacher(known, epochs, seed):
    """The target is 60 %."""
    runs = [Trained("slak", number, 100, acc1) for number, acc1 in known.items()]
    assert next_training(runs, 60.0, 16, 100)[:3] == ("slak", epochs, seed)


def test_all_but_the_weakest_begin_with_half_of_the_longest_schedule():
    wanted, _, _ = decide(runs_of(swin={}, slak={}), **RULE)
    assert [run[:3] for run in wanted] == [("swin", 16, 100), ("slak", 8, 100)]


def test_teachers_within_the_tolerance_are_taken():
    """The best such choice, whichever runs it is of; without one, that with the smallest spread
    once no family may be trained again."""
    runs = runs_of(swin={(16, 100): 60.0}, slak={(8, 100): 61.0, (6, 100): 60.5})
    wanted, choice, is_equal = decide(runs, **RULE)
    assert not wanted and is_equal and [run.epochs for run in choice] == [16, 6]
    runs["slak"].append(Trained("slak", 7, 100, 60.2))
    assert decide(runs, **RULE)[1][1].epochs == 7  # a smaller spread at the same lowest
    runs = runs_of(swin={(16, 100): 60.0}, slak={(8, 100): 61.0, (6, 100): 59.0, (7, 100): 60.6})
    wanted, choice, is_equal = decide(runs, **RULE)
    assert [(run.family, run.epochs, run.seed) for run in wanted] == [("slak", 7, 101)]
    wanted, choice, is_equal = decide(runs, **{**RULE, "tries": 3})
    assert not wanted and not is_equal and [run.epochs for run in choice] == [16, 7]


def test_the_weakest_is_the_target():
    """Whichever it is: the others come down to it, the one named first, too."""
    runs = runs_of(swin={(16, 100): 60.0}, slak={(8, 100): 55.0, (16, 100): 58.0})
    wanted, _, _ = decide(runs, **RULE)
    assert [(run.family, run.epochs) for run in wanted] == [("swin", 8)]


def test_what_was_asked_for_is_added_whole(tmp_path):
    first, second = Trained("swin", 16, 100), Trained("slak", 8, 100)
    add_asked(tmp_path / "asked.txt", [first])
    add_asked(tmp_path / "asked.txt", [second])
    assert [run[:3] for run in read_asked(tmp_path / "asked.txt")] == [first[:3], second[:3]]
    assert [path.name for path in tmp_path.iterdir()] == ["asked.txt"]


FAKE_TRAINING = """
import json, math, os, pathlib, sys
words = sys.argv[1:]
if words[0] == "-m":
    out = pathlib.Path(words[words.index("--out") + 1])
    name = words[1].split(".")[1]
    out = out if name == "curves" else out / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("table of " + name)
    out.with_suffix(".png").write_text("image")
    sys.exit()
def value(flag, number=1):
    start = words.index(flag) + 1
    end = next((i for i, word in enumerate(words[start:], start) if word.startswith("--")), None)
    return words[start:end]
folder, epochs = pathlib.Path(value("--output-dir")[0]), int(value("--epochs")[0])
seed, student = int(value("--seed")[0]), value("--student")
taught = "--teacher-weights" in words
if taught and not pathlib.Path(value("--teacher-weights")[0]).is_file():
    sys.exit("train_kd.py: error: no such teacher")
if os.environ.get("FAIL") and os.environ["FAIL"] in str(folder):
    print("epoch 1: 10%\\rtrain_kd.py: error: out of luck", file=sys.stderr)
    sys.exit(2)
folder.mkdir(parents=True, exist_ok=True)
better = {"slak_nano": 4, "swin_nano": 0}.get(student[0], -5)
acc1 = 50 + better + 3 * math.log2(epochs) + seed % 100 / 10 + (5 if taught else 0)
args = {"teacher": value("--teacher"), "student": student, "epochs": epochs, "seed": seed,
        "loss": [["nkd"], ["fd"]] if taught else [["ce"]]}
(folder / "args.yaml").write_text(json.dumps(args))
lines = [{"epoch": i, "test_acc1": acc1, "teacher_acc1": 62.0 if taught else None}
         for i in range(epochs)]
(folder / "log.txt").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(folder / "checkpoint-last.pth").touch()
"""

TRAINING = r"""#!/usr/bin/env bash
case " $* " in
    *" -m analysis.report "*) exec "$REAL" "$@" ;;
    */train_kd.py\ * | *" -m analysis."*)
        printf '%s\n' "$*" >> "$ASKED"
        if [[ "$1" == -m ]]; then exec "$REAL" "$FAKE" "$@"; fi
        exec "$REAL" "$FAKE" "${@:2}" ;;
    *) exec "$REAL" "$@" ;;
esac
"""


def study(folder: Path, *words: str, name: str = "equal_teachers", **environment: str
          ) -> tuple[subprocess.CompletedProcess, list[str]]:
    """It with trainings that take no time: a SLaK is four points better than a Swin, and each
    doubling of the epochs is worth three."""
    folder.mkdir(exist_ok=True)
    (folder / "fake.py").write_text(FAKE_TRAINING.replace("\\\\", "\\"))
    settings = {"TEACHERS": "swin slak", "LOSSES": "nkd+fd", "TEACHER_EPOCHS": "16", "EPOCHS": "2",
                "FAKE": str(folder / "fake.py"), **environment}
    return run_script(script(name), folder, *words, python=TRAINING, **settings)


def test_the_study_of_equal_teachers_ends_in_one_report(tmp_path):
    result, lines = study(tmp_path, "hours", OUT="my runs/of hours")
    assert result.returncode == 0, result.stderr
    teachers = [re.search(r"--output-dir my runs/of hours/teachers/(\S+)", line) for line in lines]
    # 62 is the target: SLaK has 63 after 8 epochs and 60 after 4; 4 * 2 ** (2 / 3) is about 6.
    assert [found[1] for found in teachers if found] == [
        "swin-16ep-seed100", "slak-8ep-seed100", "slak-4ep-seed100", "slak-6ep-seed100"]
    assert "teachers: equal within 0.4 points" in result.stdout
    students = [line for line in lines if "/students/" in line and "train_kd.py" in line]
    assert len(students) == 2 * (1 + 1 + 2)
    assert {re.search(r"--teacher-weights .+/(\S+)/checkpoint", line)[1] for line in students
            if "--teacher-weights" in line} == {"swin-16ep-seed100", "slak-6ep-seed100"}
    out = tmp_path / "my runs" / "of hours"
    report = (out / "report.md").read_text()
    for part in ("    slak 6 100", "The teachers are equal within 0.4 points", "| nkd + fd |",
                 "One teacher of each family", "A - B", "over longer", "table of similarity",
                 "table of erf", "![erf](erf.png)", "![curves](curves.png)"):
        assert part in report, part
    assert (out / "erf.png").exists() and "95 % interval" in result.stdout
    # which finds every teacher chosen
    again, more = study(tmp_path, "hours", OUT="my runs/of hours")
    assert again.returncode == 0 and (out / "report.md").read_text() == report
    assert not any("/teachers/" in line and "--output-dir" in line and "train_kd" in line
                   and "/students/" not in line for line in more)


def test_the_first_training_that_fails_ends_the_study_with_its_sentence(tmp_path):
    result, lines = study(tmp_path, "hours", FAIL="alone-seed1", JOBS="1")
    assert result.returncode == 2 and not any("analysis." in line for line in lines)
    sentence, where = result.stderr.splitlines()[-2:]
    assert sentence == "train_kd.py: error: out of luck"
    assert where == ("equal_teachers.sh: convnext_bn-alone-seed1 ended with 2; its log is runs/"
                     "equal_teachers-hours/logs/convnext_bn-alone-seed1.log")
    assert "alone-seed1" in lines[-1]
    result, lines = study(tmp_path, "hours", JOBS="1")
    assert result.returncode == 0 and not any("slak-8ep" in line and "--epochs 8" in line
                                              for line in lines)


@pytest.mark.parametrize("size", ["minutes", "hours", "full"])
def test_every_cell_of_the_study_can_be_built(size, tmp_path):
    every = {"LOSSES": "kd nkd ce+fd nkd+fd", "STUDENTS": "convnext_bn resnet",
             "TEACHERS": "slak convnext_bn resnet swin deit"}
    runs = trainings(script("equal_teachers"), tmp_path, size, "--dry-run",
                     **({} if size == "full" else every))
    for run in runs:
        check_that_it_can_be_built(run)
    if size == "full":
        assert len(runs) == 2 * (36 + 12 + 3 + 2) and {run.seed for run in runs} == {0, 1}
        return
    assert len(runs) == 5 + 2 * 2 * (2 + 5 * 4)
    assert {run.seed for run in runs} == {0, 1, 100} and all(run.dry_run for run in runs)
    teachers = [run for run in runs if run.seed == 100]
    sizes = [build(tuple(run.student)).num_parameters for run in teachers]
    assert max(sizes) < 2.5 * min(sizes)
    for student in ("alone", "longer"):
        assert sum(f"-{student}-seed" in str(run.output_dir) for run in runs) == 4


@pytest.mark.parametrize("words, environment, message", [
    ([], {}, "say how large: bash run_scripts/studies/equal_teachers.sh minutes, hours or full."),
    (["days"], {}, "say how large"), (["hours"], {"DATA": ""}, "set DATA to the folder"),
    (["hours"], {"TEACHERS": "slak swan"}, "no such teacher: 'swan'"),
    (["minutes"], {"STUDENTS": "swin"}, "no such student: 'swin'"),
    (["hours"], {"JOBS": "0"}, "JOBS is '0'; it must be a whole number, 1 or more.")])
def test_what_the_study_cannot_do_is_said(words, environment, message, tmp_path):
    result, lines = study(tmp_path, *words, **environment)
    assert result.returncode == 2 and not lines
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("equal_teachers.sh: ") and message in sentence


@pytest.mark.parametrize("top", [".", "imagenette128"])
def test_the_study_of_an_archive_leaves_few_files(top, tmp_path):
    for part in ("train", "val"):
        (tmp_path / "made" / top / part).mkdir(parents=True)
    bash("tar -cf images.tar -C made .", tmp_path)
    for _ in range(2):
        result, lines = study(tmp_path, "images.tar", "results", name="equal_teachers_gpu")
        assert result.returncode == 0, result.stderr
        assert {*re.findall(r"--data-path (\S+)", " ".join(lines))} == {
            str(Path("runs/unpacked") / top)}
        assert result.stdout.rstrip().endswith("are not compared.")
        assert {path.name for path in (tmp_path / "results").iterdir()} == {
            "report.md", "erf.png", "curves.png", "table.csv", "table-versus.csv", "logs.tar.gz"}
    listed = bash("tar -tzf results/logs.tar.gz", tmp_path).stdout
    assert "students/convnext_bn-alone-seed1/log.txt" in listed and "pth" not in listed
    result, _ = study(tmp_path, "none.tar", "results", name="equal_teachers_gpu")
    assert result.returncode == 2 and "no such archive: none.tar" in result.stderr


@pytest.mark.parametrize("name, parser, number", [
    ("robustness", evaluation.build_parser, 3 * 6), ("receptive_fields", erf_parser, 1)])
def test_what_scripts_evaluate(name, parser, number, tmp_path):
    """Their words are known to the program, their data sets and models exist."""
    result, lines = run_script(script(name), tmp_path)
    assert result.returncode == 0, result.stderr
    assert len({*lines}) == number
    for line in lines:
        run = parser().parse(shlex.split(re.split(r"eval\.py |analysis\.erf ", line)[1]))
        models = run.model if isinstance(run.model[0], list) else [run.model]
        assert all(published_source(model[0]) for model in models)
        if name == "robustness":
            assert run.data_set[0] in DATASETS.names()
            assert run.data_path == f"sets/{run.data_set[0]}"


# The launcher


def test_one_process_is_plain_python_several_are_torchrun(tmp_path):
    path, program = script("temperatures-120ep"), str(ROOT / "train_kd.py")
    _, lines = run_script(path, tmp_path)
    assert {line.split()[0] for line in lines} == {program} and len(lines) == 7
    _, lines = run_script(path, tmp_path, GPUS="3")
    assert {tuple(line.split()[:5]) for line in lines} == {
        ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", program)}


@pytest.mark.parametrize("visible, number", [("0,1,3", 3), ("2", 1), ("", 1)])
def test_processes_are_as_many_as_gpus(visible, number, tmp_path):
    _, (line,) = run_script(script("slak_t-300ep"), tmp_path, GPUS="", CUDA_VISIBLE_DEVICES=visible)
    assert (f"--nproc_per_node={number}" in line) == (number > 1)


def test_several_machines_meet_at_the_first(tmp_path):
    """A port for each training, the same on all machines."""
    _, lines = run_script(script("temperatures-120ep"), tmp_path, NNODES="2", HOST="node1",
                          RUN_ID="7", GPUS="8")
    for number, line in enumerate(lines):
        words = line.partition("train_kd.py ")[0].split()
        assert "--standalone" not in words
        assert {"--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=node1:{29500 + number}",
                "--rdzv-id=7", "--nproc_per_node=8"} < {*words}
    assert len(lines) == 7


def test_a_training_that_fails_ends_the_loop(tmp_path):
    failing = RECORDING.replace('>> "$ASKED"', '>> "$ASKED"; exit 3', 1)
    result, lines = run_script(script("temperatures-120ep"), tmp_path, python=failing)
    assert result.returncode == 3 and len(lines) == 1


SAVING = """#!/usr/bin/env bash
if [[ " $* " == *"/train_kd.py "* ]]; then
    trap 'echo saved >> "$ASKED"; exit 0' TERM
    echo started >> "$ASKED"
    for _ in {1..300}; do sleep 0.1; done
else exec "$REAL" "$@"; fi
"""


@pytest.mark.parametrize("words", [["temperatures-120ep"], ["equal_teachers", "hours"],
                                   ["equal_teachers_gpu", "images.tar", "results"]], ids=repr)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_training_and_ends_the_loop(number, words, tmp_path):
    """As a batch system's does, to this one process; Ctrl-C reaches the training by itself, too."""
    python, asked = tmp_path / "python", tmp_path / "asked"
    python.write_text(SAVING)
    python.chmod(0o755)
    (tmp_path / "train").mkdir()
    bash("tar -cf images.tar train", tmp_path)
    process = subprocess.Popen(
        ["bash", str(script(words[0])), *words[1:]], cwd=tmp_path, stderr=subprocess.PIPE,
        # Where the tests run in the background Ctrl-C is ignored, and bash cannot trap it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={"PATH": os.environ["PATH"], "PYTHON": str(python), "DATA": str(tmp_path),
             "ASKED": str(asked), "REAL": sys.executable, "GPUS": "1", "JOBS": "1"})
    deadline = time.monotonic() + 30
    while not (asked.exists() and asked.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert asked.read_text().split() == ["started", "saved"]


def test_the_quickstart_ends_with_its_table(tmp_path):
    """The whole script, on a few images."""
    command = (f"bash {RUN_SCRIPTS}/quickstart.sh --data-set outlines train_size=128 val_size=20 "
               "--num-workers 0")
    result = bash(command, tmp_path, timeout=240, L2S_PYTHON=sys.executable, EPOCHS="2",
                  OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-2000:]
    table = result.stdout[result.stdout.index("| teacher"):].splitlines()
    assert [row.split(" | ")[:3:2] for row in table[2:5]] == [
        ["| none", "convnext_bn_pico"], ["| none", "slak_pico"],
        ["| slak_pico", "convnext_bn_pico"]]
    assert "Run folders: runs/quickstart/" in table
    assert len([*(tmp_path / "runs" / "quickstart").iterdir()]) == 3
