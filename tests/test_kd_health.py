"""--log-kd-health: its figures are right, and training does not notice that they are taken."""
import copy
import json
import math
import re

import pytest
import torch
from torch import nn

import engine
import losses
import train_kd
from models import ModelOutput
from models.distiller import Distiller, PendingOutput
from models.health import buffers_kept, gradient_shares, measure_health
from tests.helpers import (
    fill_by_name,
    make_batches,
    make_options,
    make_state,
    make_teacher,
    micro_convnext_bn,
    no_mix,
)
from tests.test_train import (
    REPOSITORY,
    Killed,
    assert_identical,
    kill_at,
    last_checkpoint,
    read_log,
    torchrun,
)
from utils.checkpoint import save_atomically
from utils.log import Meter, RunLog

PRECISIONS = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def as_it_is(loss: torch.Tensor) -> torch.Tensor:
    return loss


def small_batches(number: int, size: int = 4) -> list[tuple]:
    return make_batches(number, size, pixels=32)


def probe_of(state: engine.TrainState):
    return lambda *handed: measure_health(state.distiller, *handed)


# The figures


class PixelsAreLogits(nn.Module):
    """Three channels of one pixel, times three scales."""

    feature_info = ()

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.ones(3))

    def forward_with_features(self, images):
        return ModelOutput(images[:, :, 0, 0] * self.scales, [])


def test_accuracy_agreement_and_entropy_by_hand():
    teacher = torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, 0.0], [1.0, 0.0, 3.0], [0.0, 0.0, 0.1]])
    student = torch.tensor([[0.3, 0.2, 0.1], [9.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.5]])
    mixed = torch.tensor([[0.7, 0.3, 0.0], [0.4, 0.6, 0.0], [0.6, 0.0, 0.4], [0.0, 0.9, 0.1]])
    distiller = Distiller(PixelsAreLogits(), {"ce": losses.create_loss("ce", ())}, {"ce": 1.0})
    entropy = 0
    for row in teacher.tolist():
        total = sum(math.exp(value) for value in row)
        entropy -= sum(math.exp(v) / total * math.log(math.exp(v) / total) for v in row)
    for targets in (mixed, mixed.argmax(1)):
        figures = measure_health(distiller, student[:, :, None, None], targets,
                                 ModelOutput(teacher, []), as_it_is)
        assert figures.keys() == {"teacher_acc1", "agreement", "teacher_entropy", "grad_share_ce"}
        assert figures["teacher_acc1"] == 50  # the first two; of the others' mixtures the lesser
        assert figures["agreement"] == 50  # the first and the third
        assert figures["teacher_entropy"].item() == pytest.approx(entropy / 4, rel=1e-5)
        assert figures["grad_share_ce"] == 1
    sure = measure_health(distiller, student[:, :, None, None], mixed,
                          ModelOutput(torch.tensor([[-1e5, 0.0, 1e5]]).expand(4, 3), []), as_it_is)
    assert sure["teacher_entropy"] == 0  # and no NaN from 0 log 0


class Product(nn.Module):
    """A loss with a matrix product, which autocast would round in the backward pass, too."""

    def forward(self, student, teacher, targets):
        return (student.logits.float() @ torch.linspace(0, 1, 10)[:, None]).square().mean()


WEIGHTS = {"kd": 0.5, "fd": 20.0, "ce": -2.0, "product": 1.0}


@pytest.mark.parametrize("precision", ["none", "bf16"])
def test_shares_are_of_gradients_taken_one_at_a_time(precision):
    autocast = make_options(amp_dtype=PRECISIONS[precision]).autocast
    teacher = make_teacher()
    state = make_state(fill_by_name(micro_convnext_bn()), {"kd": {}, "fd": {}, "ce": {}}, teacher)
    distiller = state.distiller.train()
    distiller.losses["product"], distiller.weights = Product(), WEIGHTS
    ((images, labels, _),) = small_batches(1)
    output = teacher(images)
    norms = {}
    for name, weight in WEIGHTS.items():
        alone = copy.deepcopy(distiller)
        with autocast():
            _, terms = alone(images, labels, output)
        (weight * terms[name]).backward()
        assert (alone.student.head.weight.grad is None) == (name == "fd")
        squares = [p.grad.double().square().sum() for p in alone.student.parameters()
                   if p.grad is not None]
        norms[name] = math.sqrt(sum(squares))
    assert min(norms.values()) > 0.02 * max(norms.values())  # else nothing is compared
    for scale in (as_it_is, lambda loss: 2.0 ** 16 * loss):
        with autocast():
            figures = measure_health(distiller, images, labels, output, scale)
        for name, norm in norms.items():
            share = figures[f"grad_share_{name}"].item()
            assert share == pytest.approx(norm / sum(norms.values()), rel=1e-6), name
    assert all(p.grad is None for p in distiller.parameters())


def test_shares_of_odd_losses():
    student = nn.Linear(2, 1, bias=False)
    one, other = 3 * student.weight[0, 0], -student.weight[0, 1]
    constant, projection = torch.ones(()), nn.Parameter(torch.ones(())) * 7
    assert gradient_shares([one, other, constant, projection], student).tolist() == [
        0.75, 0.25, 0, 0]
    overflowed = one * torch.inf
    assert gradient_shares([one, overflowed], student).isnan().all()  # no share of 0 for the first
    assert gradient_shares([constant, 0 * one], student).isnan().all()


def test_a_teacher_on_its_own_stream_is_waited_for(monkeypatch):
    teacher = make_teacher()
    state = make_state(fill_by_name(micro_convnext_bn()), {"kd": {}, "fd": {}}, teacher)
    ((images, labels, _),) = small_batches(1)
    output = teacher(images)
    expected = measure_health(state.distiller, images, labels, output, as_it_is)
    monkeypatch.setattr(PendingOutput, "wait", lambda self: self.output)
    assert expected == measure_health(state.distiller, images, labels, PendingOutput(output, None),
                                      as_it_is)


def test_buffers_come_back_even_from_an_error():
    norm = nn.BatchNorm2d(3)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError), buffers_kept(norm):
        norm(torch.randn(4, 3, 2, 2))
        assert norm.num_batches_tracked == 1
        raise ValueError
    assert_identical(before, norm.state_dict())


# What the loop hands to the probe, and when


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_probe_sees_the_step_itself(precision):
    """Drop path, masks of mgd, precision and scale are the step's: so is the gradient."""
    teacher = make_teacher()
    state = make_state(fill_by_name(micro_convnext_bn(drop_path=0.5)), {"kd": {}, "mgd": {}},
                       teacher)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "fp16")
    found = []

    def probe(images, targets, teacher_output, scaled):
        total, _ = state.distiller(images, targets, teacher_output)
        with torch.autocast("cpu", enabled=False):
            found.extend(torch.autograd.grad(scaled(total), [*state.distiller.parameters()],
                                             materialize_grads=True))
        return {}

    state.wrapped.train()
    engine.accumulate_gradients(state, iter(small_batches(1)), teacher, no_mix,
                                make_options(amp_dtype=PRECISIONS[precision]), probe=probe)
    for parameter, gradient in zip(state.distiller.parameters(), found, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert gradient.isfinite().all() and gradient.any()


class Batches:
    """As many as asked for, as the training loader yields them."""

    def start_at(self, epoch: int, batch: int):
        return small_batches(10)[batch:]


def test_the_last_micro_batch_of_the_printed_and_the_last_update_is_measured():
    teacher = make_teacher()
    state = make_state(micro_convnext_bn(), {"kd": {}}, teacher)
    seen = []

    def probe(images, targets, teacher_output, scaled):
        batch = state.step % 5 * 2 + 1
        assert torch.equal(images, small_batches(10)[batch][0])
        assert torch.equal(teacher_output.logits, teacher(images).logits)
        assert scaled(torch.ones(())) == 0.5  # as the step's: of two micro-batches
        seen.append(state.step + 1)
        return {"count": torch.tensor(float(state.step))}

    for epoch, expected in enumerate(([2, 4, 5], [6, 8, 10])):
        state.epoch = epoch
        means = engine.train_one_epoch(
            state, Batches(), teacher, no_mix, lambda step: {"lr": 1e-3, "weight_decay": 0.0},
            options=make_options(accum_steps=2), steps_per_epoch=5, print_every=2,
            after_update=lambda state: False, probe=probe)
        assert seen == expected
        assert means["count"] == pytest.approx(sum(step - 1 for step in seen) / 3)
        seen.clear()


# What overflows


def test_an_overflow_is_left_out(tmp_path):
    teacher = make_teacher()
    state = make_state(fill_by_name(micro_convnext_bn()), {"kd": {}, "fd": {}}, teacher)
    state.wrapped.train()
    shares = []
    for scale in (2.0 ** 40, 2.0 ** 10):
        state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        engine.accumulate_gradients(state, iter(small_batches(1)), teacher, no_mix,
                                    make_options(amp_dtype=torch.float16), probe=probe_of(state))
        means = engine.checked_means(state)  # no failure is raised
        assert means["teacher_entropy"] > 0
        shares.append(means["grad_share_kd"])
        RunLog(tmp_path, tensorboard=False).write({"epoch": len(shares), **means})
    assert math.isnan(shares[0]) and 0 < shares[1] < 1
    assert state.meter.counts["grad_share_kd"] == 1 and state.meter.counts["agreement"] == 2
    text = (tmp_path / "log.txt").read_text()
    assert "NaN" not in text
    assert [json.loads(line)["grad_share_kd"] for line in text.splitlines()] == [None, shares[1]]


def test_only_what_may_be_missing_may_be():
    meter = Meter()
    meter.add({"share": torch.tensor(torch.nan)}, 3, may_be_missing=True)
    assert not meter.failures() and math.isnan(meter.means()["share"])
    meter.add({"share": torch.tensor(torch.nan)}, 4)
    assert meter.failures() == [(4, "share")]


# Whole runs

SMALL = ["--data-set", "outlines", "train_size=96", "val_size=20", "--input-size", "32",
         "--batch-size", "8", "--effective-batch", "16", "--epochs", "2", "--warmup-epochs", "1",
         "--num-workers", "0", "--lr", "1e-3", "--teacher", "slak_pico", "dims=8,16",
         "--teacher-weights", "random", "--student", "convnext_bn_pico", "dims=8,16",
         "drop_path=0.3", "--loss", "kd", "--loss", "mgd", "weight=1e-3", "--print-every", "4",
         "--model-ema", "--model-ema-decay", "0.9", "--sparsity", "0.4", "--prune-every", "3",
         "--growth", "gradient"]
HEALTH = {"train_teacher_acc1", "train_agreement", "train_teacher_entropy", "train_grad_share_kd",
          "train_grad_share_mgd"}
OWN = {"images_per_second", "peak_memory_gib"}  # never equal in two runs


def train(folder, *words: str) -> int:
    return train_kd.main([*SMALL, *words, "--output-dir", str(folder)])


def weights_of(folder) -> dict:
    """All that trains, and what it trains with."""
    kept = ("model", "model_ema", "losses", "optimizer", "sparsity", "scaler", "step")
    saved = last_checkpoint(folder)
    return {key: saved[key] for key in kept}


def without(record: dict, names: set[str]) -> dict:
    return {key: value for key, value in record.items() if key not in names}


def assert_only_health_differs(logged, plain) -> list[dict]:
    """The log of the first; of both, everything else is equal bit for bit."""
    assert_identical(weights_of(logged), weights_of(plain))
    logs = read_log(logged), read_log(plain)
    for with_it, without_it in zip(*logs, strict=True):
        assert HEALTH <= with_it.keys() and not HEALTH & without_it.keys()
        assert without(with_it, HEALTH | OWN) == without(without_it, OWN)
    return logs[0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_is_the_same_bit_for_bit(tmp_path, precision):
    for name, flag in (("logged", "--log-kd-health"), ("plain", "--no-log-kd-health")):
        assert train(tmp_path / name, "--amp", precision, flag) == 0
    for record in assert_only_health_differs(tmp_path / "logged", tmp_path / "plain"):
        assert 0 <= record["train_agreement"] <= 100 and 0 <= record["train_teacher_acc1"] <= 100
        assert 0 < record["train_teacher_entropy"] <= math.log(10)
        shares = record["train_grad_share_kd"], record["train_grad_share_mgd"]
        assert sum(shares) == pytest.approx(1) and min(shares) > 0
    counts = last_checkpoint(tmp_path / "logged")["meter"]["counts"]
    assert counts["agreement"] == 2 and counts["loss"] == 12  # updates 8 and 12 of the epoch 7-12


def test_a_compiled_run_is_the_same_bit_for_bit(tmp_path, monkeypatch):
    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, *args, **kwargs: real_compile(
        function, *args, backend="eager", **kwargs))
    for name, flags in (("logged", ["--log-kd-health"]), ("plain", [])):
        assert train(tmp_path / name, "--compile", "--epochs", "1", *flags) == 0
    (record,) = assert_only_health_differs(tmp_path / "logged", tmp_path / "plain")
    assert record["train_grad_share_kd"] + record["train_grad_share_mgd"] == pytest.approx(1)


def cut_and_go_on(folder, monkeypatch, flags: tuple[list[str], list[str]]) -> None:
    """Killed in the second epoch (updates 7 to 12) after a save at 8; continued."""
    words = ["--save-every-steps", "4", "--print-every", "2"]
    with monkeypatch.context() as patch:
        kill_at(patch, step=9)
        with pytest.raises(Killed):
            train(folder, *words, *flags[0])
    saved = last_checkpoint(folder)
    assert saved["step"] == 8
    if not flags[0]:  # as by a program that did not have the flag yet
        assert not saved["args"].pop("log_kd_health")
        (run,) = folder.iterdir()
        save_atomically(saved, run / "checkpoint-last.pth")
    assert train(folder, *words, *flags[1]) == 0


def test_a_resumed_epoch_has_the_figures_of_one_never_stopped(tmp_path, monkeypatch):
    flag = ["--log-kd-health"]
    assert train(tmp_path / "whole", "--print-every", "2", *flag) == 0
    cut_and_go_on(tmp_path / "cut", monkeypatch, (flag, flag))
    logs = [[without(record, OWN) for record in read_log(tmp_path / name)]
            for name in ("whole", "cut")]
    assert logs[0] == logs[1] and HEALTH <= logs[0][1].keys()


def test_the_flag_may_change_when_a_run_is_continued(tmp_path, monkeypatch):
    """An epoch's figures are of the updates that were measured; the training is the same."""
    flag = ["--log-kd-health"]
    cut_and_go_on(tmp_path / "on", monkeypatch, ([], flag))
    cut_and_go_on(tmp_path / "off", monkeypatch, (flag, []))
    assert_identical(weights_of(tmp_path / "on"), weights_of(tmp_path / "off"))
    on, off = read_log(tmp_path / "on"), read_log(tmp_path / "off")
    assert [HEALTH <= record.keys() for record in on] == [False, True]
    assert [HEALTH <= record.keys() for record in off] == [True, True]
    counts = [last_checkpoint(tmp_path / name)["meter"]["counts"]["grad_share_kd"]
              for name in ("on", "off")]
    assert counts == [2, 1]  # updates 10 and 12; update 8


def test_without_a_teacher_the_flag_is_refused(tmp_path, capsys):
    words = ["--teacher", "none", "--student", "resnet_nano", "--data-set", "outlines",
             "--output-dir", str(tmp_path)]
    assert train_kd.main([*words, "--log-kd-health"]) == 2
    message = capsys.readouterr().err
    assert "--log-kd-health" in message and "--teacher" in message and not list(tmp_path.iterdir())


# Started by torchrun: train_kd.py with the flag and without it. With it the second process has one
# overflow, and the means of each epoch are compared with what both processes measured.
COMPARING = '''
import math
import sys
import torch
import train_kd
from utils import distributed
from utils.distributed import gather_objects, rank

measure, finish, seen = train_kd.measure_health, train_kd.finish_epoch, []

def note(*handed):
    figures = measure(*handed)
    if rank() == 1 and len(seen) == 1:
        figures["grad_share_kd"] = figures["grad_share_kd"] * torch.nan
    seen.append({name: value.item() for name, value in figures.items()})
    return figures

def compare(args, parts, means, reference):
    if not args.log_kd_health:
        return finish(args, parts, means, reference)
    measured = [one for share in gather_objects(seen) for one in share]
    for name in seen[0]:
        finite = [one[name] for one in measured if math.isfinite(one[name])]
        assert all(each[name] == means[name] for each in gather_objects(dict(means)))
        assert math.isclose(means[name], sum(finite) / len(finite), rel_tol=1e-9), name
        print(f"{name} of {len(finite)} of {len(measured)}")
    assert len({one["agreement"] + one["grad_share_mgd"] for one in measured}) > 1
    seen.clear()
    return finish(args, parts, means, reference)

train_kd.measure_health, train_kd.finish_epoch = note, compare
distributed.shutdown = lambda: None  # the processes meet once for both runs
folder, *words = sys.argv[1:]
for flag in ("--log-kd-health", "--no-log-kd-health"):
    assert train_kd.main([*words, flag, "--output-dir", folder + "/" + flag]) == 0
'''


def test_two_processes_measure_together_and_train_as_ever(tmp_path):
    program = tmp_path / "comparing.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n{COMPARING}")
    folder = tmp_path / "runs"
    printed = torchrun(str(folder), *SMALL, "--batch-size", "4", program=str(program))
    assert "= 2 process(es) x 4 images x 2 accumulated" in printed
    assert set(re.findall(r"agreement of (\d of \d)", printed)) == {"4 of 4"}
    assert set(re.findall(r"grad_share_kd of (\d of \d)", printed)) == {"3 of 4"}
    assert_only_health_differs(folder / "--log-kd-health", folder / "--no-log-kd-health")
