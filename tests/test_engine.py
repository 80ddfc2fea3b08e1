"""The step: one path whatever the precision, accumulation, EMA; a teacher that never trains."""
import copy
import shutil

import pytest
import torch
from torch import nn

import engine
import losses
from data.batch import Batch
from models import ModelOutput, create_model
from models.base import IMAGENET_MEAN, IMAGENET_STD
from models.distiller import Distiller, FrozenTeacher
from tests.helpers import (
    fill_by_name,
    make_batches,
    make_options,
    make_state,
    make_teacher,
    micro_convnext_bn,
    micro_slak,
    no_mix,
)
from utils.metrics import teacher_metrics
from utils.registry import NonFiniteLoss

PRECISIONS = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def take_steps(state, teacher, batches, options) -> None:
    """As many updates as the batches allow."""
    state.wrapped.train()
    queue = iter(batches)
    for _ in range(len(batches) // options.accum_steps):
        engine.accumulate_gradients(state, queue, teacher, no_mix, options)
        engine.optimizer_update(state, options.clip_grad)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("loss", [{"nkd": {}}, {"ce": {}, "fd": {"features": (0, -1)}}, {"kd": {}}])
def test_the_teacher_never_trains(precision, loss):
    teacher = make_teacher()
    before = copy.deepcopy(teacher.state_dict())
    state = make_state(micro_convnext_bn(), loss, teacher, ema=True,
                       fp16_scaler=precision == "fp16")
    student_before = copy.deepcopy(state.distiller.state_dict())
    teacher.train()  # as a careless caller would
    take_steps(state, teacher, make_batches(2), make_options(amp_dtype=PRECISIONS[precision]))
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    after = teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = [name for name, value in state.distiller.state_dict().items()
             if not torch.equal(value, student_before[name])]
    assert any(name.startswith("student.stages.3") for name in moved)
    if "fd" in loss:
        assert any(name.startswith("losses.fd.projections") for name in moved)


def test_an_equal_teacher_gives_zero_kl_and_zero_fd():
    student = fill_by_name(micro_slak()).eval()
    teacher = FrozenTeacher(copy.deepcopy(student), IMAGENET_MEAN, IMAGENET_STD)
    state = make_state(student, {"kd": {"alpha": 1.0, "temperature": 3.0}, "fd": {}}, teacher)
    images, labels, *_ = make_batches(1)[0]
    state.distiller.eval()
    _, terms, _ = state.distiller(images, labels, teacher.forward_with_features(images))
    assert terms["kd"] < 1e-6 and terms["fd"] < 1e-9


def test_total_is_the_weighted_sum_of_the_raw_terms():
    teacher = make_teacher()
    state = make_state(micro_convnext_bn(), {"ce": {}, "nkd": {}, "fd": {}}, teacher)
    state.distiller.weights = {"ce": 0.5, "nkd": 2.0, "fd": 1e-3}
    images, labels, *_ = make_batches(1)[0]
    total, terms, _ = state.distiller(images, labels, teacher.forward_with_features(images))
    expected = 0.5 * terms["ce"] + 2 * terms["nkd"] + 1e-3 * terms["fd"]
    torch.testing.assert_close(total.detach(), expected)


def test_teacher_sees_its_own_normalisation_and_size():
    class Probe(nn.Module):
        feature_info, num_classes, num_parameters = (), 10, 0
        input_size, fixed_size, input_filter = 16, True, "bicubic"
        input_mean, input_std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

        def fold(self):
            return self

        def forward_with_features(self, images):
            return ModelOutput(images.mean((2, 3)), [images])

    pixels = torch.rand(2, 3, 1, 1).expand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    teacher = FrozenTeacher(Probe(), IMAGENET_MEAN, IMAGENET_STD)
    seen = teacher.forward_with_features((pixels - mean) / std).features[0]
    assert seen.shape == (2, 3, 16, 16)
    torch.testing.assert_close(seen, ((pixels - 0.5) / 0.5)[..., :16, :16], atol=1e-5, rtol=1e-5)


def test_accumulation_equals_one_large_batch():
    batches = make_batches(2, size=4)
    large = [Batch(*(torch.cat(parts) for parts in zip(*batches)))]
    results = []
    for parts, accum in ((batches, 2), (large, 1)):
        state = make_state(fill_by_name(create_model("convnext_nano", 10)), {"ce": {}}, None)
        take_steps(state, None, parts, make_options(accum_steps=accum))
        results.append((state.meter.means()["loss"], state.distiller.student.state_dict()))
        assert state.step == 1
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    # Adam's first update is lr * sign(gradient): a gradient of rounding size may flip its sign.
    for name, value in results[0][1].items():
        close = torch.isclose(value, results[1][1][name], atol=1e-5)
        assert close.float().mean() > 0.999, name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_float32(precision):
    losses = {}
    for name in ("none", precision):
        teacher = make_teacher()
        state = make_state(fill_by_name(micro_convnext_bn()), {"nkd": {}, "fd": {}}, teacher,
                           fp16_scaler=name == "fp16")
        take_steps(state, teacher, make_batches(3), make_options(amp_dtype=PRECISIONS[name]))
        losses[name] = state.meter.means()
        assert all(p.dtype == torch.float32 for p in state.distiller.parameters())
    for term, value in losses["none"].items():
        assert losses[precision][term] == pytest.approx(value, rel=0.05), term


def test_float16_overflow_skips_the_update_and_lowers_the_scale():
    state = make_state(micro_convnext_bn(), {"ce": {}}, None, fp16_scaler=True)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 40)
    before = copy.deepcopy(state.distiller.student.head.weight)
    take_steps(state, None, make_batches(1), make_options(amp_dtype=torch.float16))
    assert torch.equal(before, state.distiller.student.head.weight)
    assert state.scaler.get_scale() < 2.0 ** 40
    assert state.meter.means()["grad_norm"] == 0


def test_clipping_bounds_the_update_and_logs_the_norm_before_it():
    norms, grads = [], []
    for clip in (None, 1e-3):
        state = make_state(fill_by_name(micro_convnext_bn()), {"ce": {}}, None)
        state.optimizer = torch.optim.SGD(state.distiller.parameters(), lr=1.0)
        before = [p.detach().clone() for p in state.distiller.parameters()]
        take_steps(state, None, make_batches(1), make_options(clip_grad=clip))
        moved = torch.cat([(p - b).flatten() for p, b in zip(state.distiller.parameters(), before)])
        norms.append(state.meter.means()["grad_norm"])
        grads.append(moved.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert grads == [pytest.approx(norms[0], rel=1e-3), pytest.approx(1e-3, rel=1e-2)]


def test_ema_follows_the_updated_weights():
    state = make_state(micro_convnext_bn(), {"ce": {}}, None, ema=True)
    start = state.distiller.student.head.weight.detach().clone()
    take_steps(state, None, make_batches(1), make_options())
    expected = 0.9 * start + 0.1 * state.distiller.student.head.weight
    torch.testing.assert_close(state.ema.model.head.weight, expected)


def test_a_nan_is_reported_with_the_evidence():
    teacher = make_teacher()
    state = make_state(micro_convnext_bn(), {"ce": {}, "fd": {}}, teacher)
    with torch.no_grad():
        state.distiller.losses["fd"].projections[0].weight.fill_(float("nan"))
    take_steps(state, teacher, make_batches(2), make_options())
    evidence = r"'fd' became NaN .*update 0, noticed at update 2 \(.*ce \d.*lr 1.0e-03, .*scale 1"
    with pytest.raises(NonFiniteLoss, match=evidence):
        engine.checked_means(state)


class FixedLoader:
    """Batches of given samples, as the evaluation loader yields them: images, labels, indices and
    which are readable (all, where it is left out)."""

    def __init__(self, batches: list[tuple], num_samples: int) -> None:
        self.batches = []
        for images, labels, indices, *readable in batches:
            everything = torch.ones(len(labels), dtype=torch.bool)
            self.batches.append(Batch(images, labels, indices, *(readable or [everything])))
        self.num_samples = num_samples

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class LogitsOfImages(nn.Module):
    """The first pixels of an image are its logits."""

    def forward(self, images):
        return images[:, 0, 0]


def logit_images(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, None, None, :].expand(-1, 3, logits.shape[1], -1)


def test_evaluation_counts_by_hand():
    logits = torch.eye(8) * 4 + torch.arange(8) * 0.01
    labels = torch.tensor([0, 1, 2, 3, 0, 0, 0, 7])  # five hits; three rank low or high
    batches = [(logit_images(logits[:5]), labels[:5], torch.arange(5)),
               (logit_images(logits[5:]), labels[5:], torch.arange(5, 8))]
    reference = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0])
    result = engine.evaluate(LogitsOfImages(), FixedLoader(batches, 8), options=make_options(),
                             reference=reference)
    assert result.acc1 == pytest.approx(100 * 5 / 8) and result.agreement == pytest.approx(75)
    in_top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert result.acc5 == pytest.approx(100 * in_top5)
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert result.num_samples == 8
    assert torch.equal(result.samples["top5"][:, 0], torch.arange(8))


def test_evaluation_leaves_skipped_images_out_and_notices_lost_ones():
    logits = torch.eye(4)
    batch = (logit_images(logits), torch.tensor([0, 1, 0, 3]), torch.arange(4),
             torch.tensor([True, True, False, True]))
    result = engine.evaluate(LogitsOfImages(), FixedLoader([batch], 4), options=make_options())
    assert result.num_samples == 3 and result.acc1 == 100
    with pytest.raises(AssertionError, match="evaluated 3 and skipped 1 of 5"):
        engine.evaluate(LogitsOfImages(), FixedLoader([batch], 5), options=make_options())


def test_fewer_than_five_classes():
    batch = (logit_images(torch.eye(3)), torch.arange(3), torch.arange(3))
    result = engine.evaluate(LogitsOfImages(), FixedLoader([batch], 3), options=make_options())
    assert result.acc5 == 100 and result.samples["top5"].shape == (3, 5)


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_a_compiled_step_carries_a_gradient():
    """With one loss of weight 1 the total and the raw term are one value; handed out both with and
    without a gradient, the compiler kept the one without."""
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 10)

        def forward_with_features(self, images):
            return ModelOutput(self.head(images.mean((2, 3))), [])

    distiller = Distiller(Pooled(), {"ce": losses.create_loss("ce", ())}, {"ce": 1.0})
    images, labels, *_ = make_batches(1)[0]
    expected, *_ = distiller(images, labels, None)
    distiller.compile()
    total, *_ = distiller(images, labels, None)
    total.backward()
    assert distiller.student.head.weight.grad.abs().sum() > 0
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_teacher_metrics_against_their_definitions(is_mixed):
    torch.manual_seed(3)
    student, teacher, labels = torch.randn(64, 10), 3 * torch.randn(64, 10), torch.arange(64) % 10
    teacher[:32, :] += 20 * torch.eye(10)[labels[:32]]  # right on half of them at least
    targets = labels
    if is_mixed:
        targets = 0.7 * torch.eye(10)[labels] + 0.3 * torch.eye(10)[labels.flip(0)]
    found = teacher_metrics(student, teacher, targets)
    prob = teacher.softmax(1)
    assert found["teacher_entropy"].item() == pytest.approx(
        -(prob * prob.log()).nan_to_num().sum(1).mean().item(), rel=1e-5)
    hits = [int(row.argmax()) == label for row, label in zip(teacher, labels.tolist())]
    assert found["teacher_acc1"].item() == pytest.approx(100 * sum(hits) / 64)
    same = [int(a.argmax()) == int(b.argmax()) for a, b in zip(student, teacher)]
    assert found["agreement"].item() == pytest.approx(100 * sum(same) / 64)
    assert 50 <= found["teacher_acc1"] < 100 and 0 < sum(same) < 64


def test_equal_logits_agree_and_a_teacher_without_logits_gives_no_metrics():
    logits = torch.randn(8, 10)
    assert teacher_metrics(logits, logits, logits.argmax(1))["agreement"] == 100
    assert teacher_metrics(logits, None, torch.zeros(8, dtype=torch.long)) == {}


def test_a_step_with_a_teacher_meters_its_metrics_and_one_without_none():
    for teacher in (make_teacher(), None):
        state = make_state(micro_convnext_bn(), {"ce": {}} if teacher is None else {"nkd": {}},
                           teacher)
        take_steps(state, teacher, make_batches(2), make_options())
        names = {"teacher_acc1", "teacher_entropy", "agreement"} & state.meter.means().keys()
        assert len(names) == (0 if teacher is None else 3)
