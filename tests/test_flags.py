"""Every flag that claims to change the training changes it."""
import json

import pytest
import torch

import train_kd
from utils.checkpoint import load_file

BASE = ["--teacher", "none", "--student", "resnet_nano", "--data-set", "outlines", "train_size=64",
        "val_size=20", "--input-size", "48", "--batch-size", "8", "--effective-batch", "16",
        "--epochs", "1", "--warmup-steps", "1", "--num-workers", "0", "--lr", "1e-2",
        "--model-ema", "--model-ema-decay", "0.5", "--save-freq", "0"]

# Each changes what the run learns (its weights).
TRAINING = ["--seed 1", "--scale 0.5 0.6", "--ratio 1 1", "--hflip 0", "--aa none", "--reprob 0",
            "--mixup 0", "--cutmix 0", "--mixup-prob 0", "--mixup-switch-prob 1",
            "--mixup-mode pair", "--smoothing 0", "--fast-decode", "--batch-size 16",
            "--accum-steps 4", "--effective-batch 32", "--lr 1e-3", "--min-lr 5e-3",
            "--warmup-steps 3", "--weight-decay 0.5", "--weight-decay-end 5",
            "--layer-decay 0.7", "--opt-betas 0.5 0.9", "--opt-eps 1e-3",
            "--clip-grad 0.1", "--amp bf16", "--amp fp16", "--student resnet_nano drop_path=0.5",
            "--student resnet_nano zero_init_residual=false", "--loss ce weight=2", "--epochs 2",
            "--opt sgd", "--opt lamb", "--bce", "--repeated-aug", "--aa ta", "--aa 3a",
            "--freeze backbone", "--freeze 1", "--student resnet_nano stem=small"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[dict, dict]:
    return run(tmp_path_factory.mktemp("base"), "")


def run(folder, words: str) -> tuple[dict, dict]:
    """The last checkpoint and the last line of the log."""
    flags = words.split()
    kept = without(BASE, {word for word in flags if word.startswith("--")})
    assert train_kd.main([*kept, *flags, "--output-dir", str(folder / "run")]) == 0
    (run_folder,) = folder.iterdir()
    log = (run_folder / "log.txt").read_text().splitlines()
    return load_file(run_folder / "checkpoint-last.pth"), json.loads(log[-1])


def without(words: list[str], flags: set[str]) -> list[str]:
    """`words` less the contradiction that --accum-steps and --effective-batch would be."""
    if "--accum-steps" not in flags:
        return words
    start = words.index("--effective-batch")
    return words[:start] + words[start + 2:]


def differs(left: dict, right: dict) -> bool:
    return any(not torch.equal(value, right[name]) for name, value in left.items())


def test_the_same_command_gives_the_same_run(base, tmp_path):
    again, _ = run(tmp_path, "")
    saved, _ = base
    assert not differs(saved["model"], again["model"])
    assert not differs(saved["model_ema"], again["model_ema"])


@pytest.mark.parametrize("words", TRAINING)
def test_training_flags_matter(base, tmp_path, words):
    saved, log = base
    changed, changed_log = run(tmp_path, words)
    assert differs(saved["model"], changed["model"])
    assert log["train_loss"] != changed_log["train_loss"]


@pytest.mark.parametrize("words", ["--momentum 0.5", "--no-nesterov"])
def test_flags_of_sgd_matter(tmp_path, words):
    plain, _ = run(tmp_path / "plain", "--opt sgd")
    changed, _ = run(tmp_path / "changed", f"--opt sgd {words}")
    assert differs(plain["model"], changed["model"])


SPARSE_BASE = "--student slak_pico dims=16,32 --sparsity 0.4 --prune-every 1"


@pytest.fixture(scope="module")
def sparse_base(tmp_path_factory) -> tuple[dict, dict]:
    return run(tmp_path_factory.mktemp("sparse_base"), SPARSE_BASE)


@pytest.mark.parametrize("words", [
    "--sparsity 0", "--sparsity 0.6", "--sparse-init snip-mask", "--sparse-init erk",
    "--sparse-init uniform", "--sparse-layers large-kernel", "--prune-rate 0.5", "--prune-every 0",
    "--growth gradient", "--growth momentum"])
def test_sparsity_flags_matter(sparse_base, tmp_path, words):
    saved, log = sparse_base
    changed, changed_log = run(tmp_path, f"{SPARSE_BASE} {words}")
    assert differs(saved["model"], changed["model"])
    assert log["train_loss"] != changed_log["train_loss"]


def test_warmup_in_epochs_sets_the_steps(tmp_path):
    words = " ".join(BASE).replace("--warmup-steps 1", "--warmup-epochs 0.5").split()
    assert train_kd.main([*words, "--output-dir", str(tmp_path / "run")]) == 0
    (folder,) = tmp_path.iterdir()
    assert load_file(folder / "checkpoint-last.pth")["args"]["warmup_steps"] == 2


@pytest.mark.parametrize("words", ["--model-ema-decay 0.9", "--model-ema-warmup"])
def test_average_flags_change_the_average_only(base, tmp_path, words):
    saved, _ = base
    changed, _ = run(tmp_path, words)
    assert not differs(saved["model"], changed["model"])
    assert differs(saved["model_ema"], changed["model_ema"])


def test_crop_pct_changes_the_evaluation_only(base, tmp_path):
    saved, log = base
    changed, changed_log = run(tmp_path, "--crop-pct 0.5")
    assert not differs(saved["model"], changed["model"])
    assert log["test_loss"] != changed_log["test_loss"]


@pytest.mark.parametrize("words", ["--num-workers 1", "--no-channels-last", "--print-every 1",
                                   "--save-every-steps 1"])
def test_flags_of_the_machine_do_not_change_the_result(base, tmp_path, words):
    saved, log = base
    changed, changed_log = run(tmp_path, words)
    for name, value in saved["model"].items():
        torch.testing.assert_close(value, changed["model"][name], rtol=1e-3, atol=1e-4)
    assert log["test_loss"] == pytest.approx(changed_log["test_loss"], rel=1e-3)


def test_student_weights_are_the_start(tmp_path):
    run(tmp_path / "first", "")
    (folder,) = (tmp_path / "first").iterdir()
    file = folder / "checkpoint-last.pth"
    started, _ = run(tmp_path / "second", f"--lr 0 --min-lr 0 --student-weights {file}")
    first = load_file(file)["model"]
    for name, value in started["model"].items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(value, first[name]), name


def test_the_large_kernel_flag_changes_the_code_not_the_result(tmp_path, capsys):
    words = "--student slak_pico dims=16,32 --large-kernel"
    conv, _ = run(tmp_path / "conv", f"{words} conv")
    assert "large kernels by conv" in capsys.readouterr().out
    banded, _ = run(tmp_path / "banded", f"{words} banded")
    assert "large kernels by banded" in capsys.readouterr().out
    assert differs(conv["model"], banded["model"])  # in the last digits
    for name, value in conv["model"].items():
        torch.testing.assert_close(value, banded["model"][name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("words, telling", [
    ("--large-kernel triton --student slak_pico", "cannot run on cpu")])
def test_flags_of_a_gpu_are_refused_without_one(tmp_path, words, telling, capsys):
    assert train_kd.main([*BASE, *words.split(), "--output-dir", str(tmp_path / "run")]) == 2
    assert telling in capsys.readouterr().err and not list(tmp_path.iterdir())
