"""The program as users start it: one process or two, stopped anywhere and continued."""
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import engine
import eval as evaluation
import train_kd
from data import create_dataset
from utils.checkpoint import load_file

REPOSITORY = Path(__file__).parent.parent
SMALL = ["--data-set", "outlines", "train_size=160", "val_size=37", "--input-size", "32",
         "--batch-size", "16", "--effective-batch", "16", "--epochs", "2", "--warmup-epochs", "1",
         "--num-workers", "0", "--lr", "1e-3"]
TAUGHT = ["--teacher", "slak_nano", "--teacher-weights", "random", "--student", "convnext_nano"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def train(folder: Path, *words: str) -> int:
    return train_kd.main([*SMALL, *words, "--output-dir", str(folder / "run")])


def run_folder(folder: Path) -> Path:
    (only,) = folder.iterdir()
    return only


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder(folder) / "log.txt").read_text().splitlines()]


def last_checkpoint(folder: Path) -> dict:
    return load_file(run_folder(folder) / "checkpoint-last.pth")


def assert_identical(left, right, path: str = "checkpoint") -> None:
    """Bit for bit, through dicts and lists."""
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_identical(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for i, (a, b) in enumerate(zip(left, right)):
            assert_identical(a, b, f"{path}[{i}]")
    else:
        assert left == right, path


def test_a_run_leaves_what_design_promises(tmp_path, capsys):
    words = [*TAUGHT, "--loss", "nkd", "gamma=1.5", "--loss", "fd", "weight=0.1", "--model-ema",
             "--save-freq", "1", "--save-num", "1"]
    assert train(tmp_path, *words) == 0
    folder = run_folder(tmp_path)
    files = {path.name for path in folder.iterdir()}
    assert {"args.yaml", "command.txt", "log.txt", "checkpoint-last.pth", "checkpoint-1.pth",
            "checkpoint-best.pth", "checkpoint-best-ema.pth"} == files
    records = read_log(tmp_path)
    assert [record["epoch"] for record in records] == [0, 1]
    expected = {"train_loss", "train_nkd", "train_fd", "train_lr", "train_grad_norm", "test_loss",
                "test_acc1", "test_acc5", "test_acc1_ema", "test_acc5_ema", "agreement",
                "agreement_ema", "n_parameters", "images_per_second", "epoch"}
    assert expected <= records[1].keys()
    last = records[1]
    assert last["train_loss"] == pytest.approx(last["train_nkd"] + 0.1 * last["train_fd"], rel=1e-5)
    assert last["train_lr"] == pytest.approx(1e-6, abs=3e-5)
    saved = last_checkpoint(tmp_path)
    assert {"model", "model_ema", "optimizer", "scaler", "epoch", "step", "args", "losses",
            "best_acc1", "git"} <= saved.keys()
    assert saved["epoch"] == 2 and saved["step"] == 20
    assert saved["classes"] == create_dataset("outlines", "val", None).classes
    assert not any(name.startswith("losses") for name in saved["model"])
    assert any(name.startswith("fd.projections") for name in saved["losses"])
    printed = capsys.readouterr().out
    for name in ("checkpoint-best.pth", "checkpoint-1.pth"):
        weights = load_file(folder / name)  # and its checksums are checked
        assert {"model", "model_ema", "classes", "args", "epoch", "best_acc1"} <= weights.keys()
        assert not weights.keys() & {"optimizer", "losses", "scaler", "meter"}
    assert train(tmp_path, *words, "--resume", str(folder / "checkpoint-best.pth")) == 2
    assert ("holds weights alone, with which no run can go on. Continue the checkpoint-last.pth of "
            "its run" in capsys.readouterr().err)
    assert "effective batch 16 = 1 process(es) x 16 images x 1 accumulated" in printed
    assert "160 images // 16 = 10 updates per epoch, 20 in 2 epochs" in printed
    assert train(tmp_path, *words) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_run_without_a_folder_gets_one_with_a_telling_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*TAUGHT, "--loss", "nkd", "gamma=1.5", "--loss", "fd", "weight=0.1", "--epochs", "1"]
    assert train_kd.main([*SMALL, *words]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "slak_nano-convnext_nano-nkd_gamma1.5_fd_weight0.1-1ep"


@pytest.mark.parametrize("words, telling", [
    (["--student", "resnet51"], "unknown model 'resnet51'"),  # before the processes join
    (["--student", "vit_nano"], "224 px only")])  # after
def test_one_mistake_under_torchrun_is_one_sentence(words, telling, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "train_kd.py", *SMALL, "--batch-size", "8", *words, "--output-dir", str(tmp_path / "run")],
        cwd=REPOSITORY, env=ONE_THREAD, capture_output=True, text=True, timeout=200)
    said = [line for line in result.stderr.splitlines() if "train_kd.py (process" in line
            and "error:" in line]
    assert result.returncode and len(said) == 1 and telling in said[0]
    assert not (tmp_path / "run").exists()


def test_the_console_shows_an_epoch_in_one_line(tmp_path, capsys):
    assert train(tmp_path, *TAUGHT, "--model-ema") == 0
    out = capsys.readouterr().out
    assert len(re.findall(
        r"^epoch [12]/2  loss \d+\.\d{3}  top-1 [\d.]+ \(best [\d.]+\)  top-1 of the average "
        r"[\d.]+ \(best [\d.]+\)  agreement [\d.]+  lr \d\.\de-\d\d  [\d,]+ images/s  "
        r"eta \d+:\d\d$",
        out, flags=re.MULTILINE)) == 2
    assert re.search(r"^done: top-1 [\d.]+ %, best [\d.]+ %; everything is in ", out, re.MULTILINE)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_loader_processes_may_be_started_in_any_way(method, tmp_path):
    words = [*SMALL, "--teacher", "none", "--student", "convnext_nano", "--epochs", "1",
             "--num-workers", "2", "--output-dir"]
    code = (f"import sys, torch, train_kd\ntorch.multiprocessing.set_start_method({method!r})\n"
            f"sys.exit(train_kd.main({words!r} + [sys.argv[1]]))")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], cwd=REPOSITORY,
                   env=ONE_THREAD, check=True, timeout=200, capture_output=True)
    assert train(tmp_path / "fork", *words[len(SMALL):-3]) == 0
    assert read_log(tmp_path / "fork")[0]["test_loss"] == json.loads(
        (tmp_path / "run" / "log.txt").read_text())["test_loss"]


def test_help_needs_nothing_that_windows_lacks():
    code = ("import signal, sys\nsys.modules['resource'] = sys.modules['fcntl'] = None\n"
            "del signal.alarm\nimport math, torch, train_kd, eval\n"
            "from utils.log import peak_memory_gib\n"
            "assert math.isnan(peak_memory_gib(torch.device('cpu')))\ntrain_kd.main(['--help'])")
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=ONE_THREAD,
                            check=True, timeout=100, capture_output=True, text=True)
    assert "--teacher" in result.stdout and len(result.stdout.splitlines()) < 200


def test_the_log_has_the_teachers_accuracy(tmp_path, capsys):
    assert train(tmp_path, *TAUGHT, "--epochs", "1") == 0
    said = re.search(r"teacher: top-1 ([\d.]+) %", capsys.readouterr().out)
    assert read_log(tmp_path)[0]["teacher_acc1"] == pytest.approx(float(said[1]), abs=0.01)


@pytest.mark.parametrize("words, telling", [
    (["--teacher", "slak_t", "--teacher-weights", "random", "--model-ema", "--sparsity", "0.4"], [
        "GiB of weights, gradients, optimizer state and average",
        "G MACs forward at 32 px, ", "% of a step", "sparsity: "]),
    (["--teacher", "none"], ["1 x ce", "10 updates per epoch, 20 in 2 epochs"])])
def test_a_dry_run_shows_everything_and_writes_nothing(tmp_path, capsys, words, telling):
    words = ["--student", "slak_pico", "dims=16,32", *words, "--dry-run"]
    assert train(tmp_path / "runs", *words) == 0
    printed = capsys.readouterr().out
    for text in [*telling, "student: slak_pico dims=16,32", "nothing was trained, nothing written"]:
        assert text in printed, text
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_needs_weights_that_have_an_address(tmp_path, capsys):
    words = ["--teacher", "cswin_nano", "--student", "resnet_nano", "--dry-run"]
    assert train(tmp_path / "runs", *words) == 2
    assert "no published weights are known for 'cswin_nano'" in capsys.readouterr().err
    words = ["--student", "resnet18", "--student-weights", "published", "--dry-run"]
    assert train(tmp_path / "runs", *words) == 0
    assert "not fetched in a dry run" in capsys.readouterr().out


class Killed(BaseException):
    """Stands for a power cut: nothing of the program runs after it."""


def kill_at(monkeypatch, step: int) -> None:
    original = engine.optimizer_update

    def update(state, clip_grad):
        if state.step == step:
            raise Killed
        original(state, clip_grad)

    monkeypatch.setattr(engine, "optimizer_update", update)


@pytest.mark.parametrize("student, workers, others", [
    ("convnext_nano", ("2", "2"), ["--opt", "sgd"]), ("convnext_bn_nano", ("2", "1"), []),
    ("resnet_nano", ("0", "2"), ["--opt", "lamb", "--freeze", "1", "--repeated-aug", "--aa", "3a",
                                 "--bce"])])
def test_killed_and_resumed_equals_never_stopped(tmp_path, monkeypatch, student, workers, others):
    words = [*TAUGHT, "--student", student, "drop_path=0.2", *others, "--loss", "kd",
             "temperature=2", "alpha=0.5", "--model-ema", "--model-ema-decay", "0.9",
             "--effective-batch", "32", "--clip-grad", "5", "--save-every-steps", "3",
             "--print-every", "2"]
    assert train(tmp_path / "whole", *words, "--num-workers", workers[0]) == 0
    with monkeypatch.context() as patch:
        kill_at(patch, step=8)  # the second epoch has updates 5 to 9; the last save was at 6
        with pytest.raises(Killed):
            train(tmp_path / "cut", *words, "--num-workers", workers[0])
    assert last_checkpoint(tmp_path / "cut")["step"] == 6
    assert train(tmp_path / "cut", *words, "--num-workers", workers[1]) == 0
    whole, cut = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "cut")
    for name in ("output_dir", "num_workers"):
        whole["args"].pop(name), cut["args"].pop(name)
    whole.pop("checksums"), cut.pop("checksums")  # of what is compared here itself
    assert_identical(whole, cut)
    logs = [read_log(tmp_path / name) for name in ("whole", "cut")]
    for record in [*logs[0], *logs[1]]:
        record.pop("images_per_second"), record.pop("peak_memory_gib")
    assert logs[0] == logs[1]


def start(folder: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "train_kd.py", *SMALL, *words, "--output-dir", str(folder / "run")],
        cwd=REPOSITORY, env=ONE_THREAD, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_so(tmp_path, number):
    """Sent to the whole process group, loader workers included, as schedulers and terminals do."""
    process = start(tmp_path, "--teacher", "none", "--student", "convnext_nano", "--epochs", "5000",
                    "--num-workers", "2", "--save-freq", "0")
    log = tmp_path / "run" / "log.txt"
    deadline = time.monotonic() + 300  # a busy machine takes its time
    while not log.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "stopped on request" in out and "Traceback" not in err
    saved = load_file(log.parent / "checkpoint-last.pth")
    assert saved["step"] >= 10


def torchrun(*words: str, program: str = "train_kd.py") -> str:
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         program, *words], cwd=REPOSITORY, env=ONE_THREAD, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_two_processes_equal_one(tmp_path):
    """The same global batches, mixed in pairs; a student without BatchNorm; a large Adam eps so
    that rounding does not decide the sign of an update."""
    words = [*TAUGHT, "--loss", "nkd", "--loss", "fd", "weight=0.1", "--mixup-mode", "pair",
             "--opt-eps", "1e-3", "--effective-batch", "32", "--model-ema", "--model-ema-decay",
             "0.9"]
    assert train(tmp_path / "one", *words, "--batch-size", "16") == 0  # 2 micro-batches of 16
    torchrun(*SMALL, *words, "--batch-size", "8", "--output-dir", str(tmp_path / "two" / "run"))
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    for a, b in zip(one, two):
        for key in ("train_loss", "train_nkd", "train_fd", "train_grad_norm", "test_loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
        assert a["test_acc1"] == b["test_acc1"]
    left, right = last_checkpoint(tmp_path / "one"), last_checkpoint(tmp_path / "two")
    for key in ("model", "model_ema"):
        for name, value in left[key].items():
            torch.testing.assert_close(value, right[key][name], rtol=1e-3, atol=1e-5)


def test_eval_repeats_the_log_under_any_number_of_processes(tmp_path, capsys):
    torchrun(*SMALL, "--teacher", "none", "--student", "resnet_nano", "--batch-size", "8",
             "--output-dir", str(tmp_path / "run"))  # plain BatchNorm: statistics of two processes
    best = max(record["test_acc1"] for record in read_log(tmp_path))
    file = str(run_folder(tmp_path) / "checkpoint-best.pth")
    words = ["--checkpoint", file, "--batch-size", "8", "--num-workers", "0"]
    capsys.readouterr()
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    assert evaluation.main([*words, "--predictions", str(one)]) == 0
    printed = [capsys.readouterr().out,
               torchrun(*words, "--predictions", str(two), program="eval.py")]
    for text in printed:
        assert f"{best:.2f} %" in text and "310,746" in text
        assert text.split("top-1")[0].rstrip().endswith(" 37")  # 37 images, not 38 padded ones
    one, two = np.load(one), np.load(two)
    assert list(one["index"]) == list(range(37))
    assert 100 * np.mean(one["top5"][:, 0] == one["label"]) == pytest.approx(best)
    for key in ("index", "label", "top5", "name", "classes"):
        np.testing.assert_array_equal(one[key], two[key])


def test_compile_gives_the_same_losses_and_the_same_names(tmp_path, monkeypatch):
    # Captured and differentiated as ever, but run without the minute of code generation.
    compiled_modules = []

    def compile_fast(function, *args, **kwargs):
        if inspect.ismethod(function):  # not the line on which the compiler is tried
            compiled_modules.append(type(function.__self__).__name__)
        return real_compile(function, *args, backend="aot_eager", **kwargs)

    real_compile = torch.compile
    for name, flag in (("plain", "--no-compile"), ("compiled", "--compile")):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", compile_fast)
            assert train(tmp_path / name, *TAUGHT, "--epochs", "1", "--warmup-epochs", "0",
                         flag, "--student", "convnext_nano", "depths=1,1,1,1") == 0
    assert sorted(compiled_modules) == ["Distiller", "FrozenTeacher"]
    plain, compiled = last_checkpoint(tmp_path / "plain"), last_checkpoint(tmp_path / "compiled")
    assert plain["model"].keys() == compiled["model"].keys()
    losses = [read_log(tmp_path / name)[0]["train_loss"] for name in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_sparse_run_killed_after_its_masks_changed_goes_on(tmp_path, monkeypatch):
    """The checkpoint falls right on a change of the masks: what was grown is still zero in it."""
    words = ["--teacher", "none", "--student", "slak_pico", "dims=16,32", "--sparsity", "0.4",
             "--prune-every", "3", "--growth", "gradient", "--model-ema", "--save-every-steps", "6"]
    assert train(tmp_path / "whole", *words) == 0
    with monkeypatch.context() as patch:
        kill_at(patch, step=7)
        with pytest.raises(Killed):
            train(tmp_path / "cut", *words)
    saved = last_checkpoint(tmp_path / "cut")
    assert saved["step"] == saved["sparsity"]["changed_at"] == 6
    assert train(tmp_path / "cut", *words) == 0
    whole, cut = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "cut")
    whole["args"].pop("output_dir"), cut["args"].pop("output_dir")
    whole.pop("checksums"), cut.pop("checksums")
    assert_identical(whole, cut)
    assert whole["sparsity"]["num_changes"] == 6  # of 20 updates


# Started by torchrun: train_kd.py, but every save compares the processes' masks and weights.
COMPARING = '''
import sys
import engine
import train_kd
from utils import checkpoint
from utils.distributed import gather_objects

save, build_state, states = checkpoint.save, engine.build_state, []

def keep(*args, **kwargs):
    states.append(build_state(*args, **kwargs))
    return states[0]

def compare(content, folder, names, keep, is_whole):
    sparsity = states[0].sparsity
    for name, mask in sparsity.masks.items():
        everywhere = gather_objects((mask, sparsity.weights[name].detach()))
        assert all(m.equal(mask) for m, _ in everywhere), name
        assert all(not (w[~m] != 0).any() for m, w in everywhere), name
    if names == ["checkpoint-last.pth"]:
        print(f"compared {len(sparsity.masks)} after {sparsity.num_changes} changes", flush=True)
    save(content, folder, names, keep, is_whole)

engine.build_state, checkpoint.save = keep, compare
sys.exit(train_kd.main())
'''


def test_two_processes_have_the_same_masks(tmp_path):
    """Although each has its own share of the images, for SNIP, too."""
    program = tmp_path / "comparing.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n{COMPARING}")
    words = ["--teacher", "none", "--student", "slak_pico", "dims=16,32", "--sparsity", "0.4",
             "--prune-every", "3", "--growth", "gradient", "--model-ema", "--batch-size", "4"]
    printed = torchrun(*SMALL, *words, "--output-dir", str(tmp_path / "runs" / "run"),
                       program=str(program))
    assert "= 2 process(es) x 4 images x 2 accumulated" in printed
    compared = re.findall(r"compared (\d+) after (\d+) changes", printed)
    assert len(compared) == 2 + 2 and compared[-1][1] == "6" and int(compared[0][0]) > 10
