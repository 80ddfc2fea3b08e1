"""Losses: the published values, the contract of every registered one, and their options."""
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_kd
from losses import create_loss, list_losses
from losses.base import hard_labels
from models.base import FeatureInfo, ModelOutput
from models.distiller import Distiller
from tests.helpers import FIXTURES
from utils.registry import UnknownName, UserError

PUBLISHED = np.load(FIXTURES / "losses.npz")
LOGIT_CASES = [key.removesuffix("/loss") for key in PUBLISHED.files if key.endswith("/loss")]
FD_CASES = {"smoothl1_beta2": {}, "mse": {"kind": "mse"},
              "smoothl1_beta2_whitened": {"whiten": True}}
STUDENT_INFO = (FeatureInfo(6, 16), FeatureInfo(8, 32))
TEACHER_INFO = (FeatureInfo(10, 16), FeatureInfo(12, 32))
OTHER_WORD = {("fd", "kind"): "mse"}  # another legal value of each option that is a word
ZERO_WHEN_EQUAL = {"dist": {}, "dkd": {}, "fd": {}, "kd": {"alpha": 1.0}}  # with these options
RELATES_IMAGES = {"dist"}  # no means over images
MEAN_OVER_IMAGES = [name for name in list_losses() if name not in RELATES_IMAGES]


def make_output(info: tuple[FeatureInfo, ...], seed: int, *, num: int = 4, num_classes: int = 10,
                scale: float = 1.0) -> ModelOutput:
    """Random logits and maps of a 64 px input."""
    rng = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num, num_classes, generator=rng)
    return ModelOutput(logits, [scale * torch.randn(num, c, 64 // stride, 64 // stride,
                                                    generator=rng) for c, stride in info])


def make_targets(kind: str, num: int = 4, num_classes: int = 10) -> Tensor:
    labels = torch.arange(num) * 3 % num_classes
    if kind == "hard":
        return labels
    mixed = F.one_hot(labels, num_classes).float()
    return 0.9 * (0.7 * mixed + 0.3 * mixed.flip(0)) + 0.1 / num_classes


def make_loss(name: str, student_info=STUDENT_INFO, teacher_info=TEACHER_INFO, **options):
    torch.manual_seed(0)  # of the projections
    return create_loss(name, student_info, teacher_info, **options)


def seeded(function, *batch):
    """Called with the masks that seed 0 draws."""
    torch.manual_seed(0)
    return function(*batch)


def tensors(output: ModelOutput) -> list[Tensor]:
    return [output.logits, *output.features]


def convert(output: ModelOutput, dtype: torch.dtype) -> ModelOutput:
    return ModelOutput(output.logits.to(dtype), [f.to(dtype) for f in output.features])


def with_gradient(output: ModelOutput) -> ModelOutput:
    return ModelOutput(output.logits.clone().requires_grad_(),
                       [f.clone().requires_grad_() for f in output.features])


def logits_only(logits: Tensor) -> ModelOutput:
    return ModelOutput(logits, [])


# The published values


def read_case(case: str) -> tuple[str, dict, str]:
    """'b8c10/kd_T4.0_alpha0.9_soft' -> the loss, its options, the array of its targets. The
    published nkd calls gamma alpha."""
    name, *words = case.partition("/")[2].split("_")
    targets = "soft" if words[-1] == "soft" else "labels"
    if name == "ce":
        return name, {} if targets == "soft" else {"label_smoothing": 0.1}, targets
    if words[0] == "hard":
        return name, {"hard": True}, targets
    factor = "alpha" if name == "kd" else "gamma"
    options = {"temperature": float(words[0].removeprefix("T").removeprefix("temp")),
               factor: float(words[1].removeprefix("alpha"))}
    return name, options, targets


@pytest.mark.parametrize("case", LOGIT_CASES)
def test_value_and_gradient_equal_the_published_code(case):
    name, options, targets = read_case(case)
    batch = case.partition("/")[0]
    student = torch.tensor(PUBLISHED[f"{batch}/student"]).requires_grad_()
    teacher = torch.tensor(PUBLISHED[f"{batch}/teacher"])
    loss = make_loss(name, **options)(logits_only(student), logits_only(teacher),
                                      torch.tensor(PUBLISHED[f"{batch}/{targets}"]))
    loss.backward()
    expected = torch.tensor(PUBLISHED[f"{case}/grad"])
    assert loss.item() == pytest.approx(float(PUBLISHED[f"{case}/loss"]), rel=1e-5)
    assert (student.grad - expected).abs().max() < 1e-4 * expected.abs().max()


def test_every_published_setting_is_there():
    names = {read_case(case)[0] for case in LOGIT_CASES}
    assert names == {"ce", "kd", "nkd"} and len(LOGIT_CASES) == 32


@pytest.mark.parametrize("case", FD_CASES)
def test_feature_distance_equals_the_published_code(case):
    """Between equal channel counts the projection starts as the identity."""
    info = (FeatureInfo(12, 32),)
    student = torch.tensor(PUBLISHED["fd/student"]).requires_grad_()
    teacher = torch.tensor(PUBLISHED["fd/teacher"])
    loss = make_loss("fd", info, info, **FD_CASES[case])(
        ModelOutput(None, [student]), ModelOutput(None, [teacher]), None)
    loss.backward()
    assert loss.item() == pytest.approx(float(PUBLISHED[f"fd/{case}"]), rel=1e-5)
    # d/ds of smooth L1 is d / beta clipped to [-1, 1], of the square 2 d; over the element count.
    target = teacher
    if case.endswith("whitened"):
        mean, var = teacher.mean(1, keepdim=True), teacher.var(1, keepdim=True, unbiased=False)
        target = (teacher - mean) / (var + 1e-5).sqrt()
    difference = student.detach() - target
    slope = 2 * difference if case == "mse" else (difference / 2).clamp(-1, 1)
    torch.testing.assert_close(student.grad, slope / student.numel(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.3])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_bce_is_a_question_per_class(kind, threshold):
    student, targets = make_output(STUDENT_INFO, 1), make_targets(kind)
    y = targets if kind == "soft" else F.one_hot(targets, 10).float()
    if threshold is not None:
        y = (y > threshold).float()
        assert 0 < y.mean() <= 1
    p = student.logits.double().sigmoid()
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    value = make_loss("bce", threshold=threshold)(student, None, targets)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)


# The contract, for everything that is registered


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize("name", list_losses())
def test_a_finite_scalar_that_reaches_the_student(name, targets):
    loss = make_loss(name)
    student = with_gradient(make_output(STUDENT_INFO, 1))
    value = loss(student, make_output(TEACHER_INFO, 2), make_targets(targets))
    value.backward()
    assert value.shape == () and value.dtype == torch.float32 and value.isfinite()
    reached = student.logits if loss.trains_logits else student.features[-1]
    assert reached.grad.isfinite().all() and reached.grad.any()
    assert (student.logits.grad is not None) == loss.trains_logits
    assert all(p.grad.any() for p in loss.parameters())


@pytest.mark.parametrize("name", list_losses())
def test_no_gradient_reaches_the_teacher(name):
    teacher = with_gradient(make_output(TEACHER_INFO, 2))
    student = with_gradient(make_output(STUDENT_INFO, 1))
    make_loss(name)(student, teacher, make_targets("soft")).backward()
    assert all(value.grad is None for value in tensors(teacher))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list_losses())
def test_float32_whatever_the_inputs(name, dtype):
    loss, targets = make_loss(name), make_targets("soft")
    student, teacher = [convert(make_output(info, seed), dtype)
                        for seed, info in enumerate((STUDENT_INFO, TEACHER_INFO))]
    value = seeded(loss, student, teacher, targets)
    expected = seeded(loss, *[convert(output, torch.float32) for output in (student, teacher)],
                      targets)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


class FixedNetwork(nn.Module):
    """Gives the same output whatever the images."""

    fixed_size = False

    def __init__(self, output: ModelOutput) -> None:
        super().__init__()
        self.output = output

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        return self.output


@pytest.mark.parametrize("name", list_losses())
def test_float32_inside_autocast(name):
    loss, targets = make_loss(name), make_targets("soft")
    student, teacher = [convert(make_output(info, seed), torch.bfloat16)
                        for seed, info in enumerate((STUDENT_INFO, TEACHER_INFO))]
    distiller = Distiller(FixedNetwork(student), {name: loss}, {name: 2.0})
    with torch.autocast("cpu", torch.bfloat16):
        total, terms, _ = seeded(distiller, torch.zeros(4, 3, 8, 8), targets, teacher)
    expected = seeded(loss, *[convert(output, torch.float32) for output in (student, teacher)],
                      targets)
    assert total.dtype == terms[name].dtype == torch.float32
    torch.testing.assert_close(terms[name], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(total, 2 * expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize("name", list_losses())
def test_bfloat16_outputs_cost_bfloat16_rounding_only(name, targets):
    loss, targets = make_loss(name), make_targets(targets)
    outputs = make_output(STUDENT_INFO, 1), make_output(TEACHER_INFO, 2)
    rounded = [convert(output, torch.bfloat16) for output in outputs]
    torch.testing.assert_close(seeded(loss, *rounded, targets), seeded(loss, *outputs, targets),
                               rtol=5e-3, atol=0)


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize("name", list_losses())
def test_finite_at_a_gap_of_ten_thousand(name, targets):
    student = with_gradient(make_output(STUDENT_INFO, 1, scale=1e4))
    value = make_loss(name)(student, make_output(TEACHER_INFO, 2, scale=1e4),
                            make_targets(targets))
    value.backward()
    assert value.isfinite()
    assert all(t.grad.isfinite().all() for t in tensors(student) if t.grad is not None)


@pytest.mark.parametrize("name, options, expected", [
    ("ce", {}, 1e4),
    ("kd", {"alpha": 1.0}, 1e4),
    ("kd", {"alpha": 1.0, "temperature": 10.0}, 1e5),  # T^2 * 1e4 / T
    ("kd", {"hard": True}, 1e4),
    ("nkd", {}, 1e4 + 1e4 * 3 / 4),  # p_t[c] = 1; q_t uniform over 4 others, 3 of them at -1e4
    ("nkd", {"gamma": 2.0, "temperature": 10.0}, 1e4 + 2 * 100 * 1e3 * 3 / 4),
    ("dkd", {}, 1e4 + 0.5 * (1e4 * 3 / 4 - math.log(4))),  # b_t = (1, 0); q_t as above
    ("dkd", {"alpha": 2.0, "beta": 3.0, "temperature": 10.0},
     100 * (2 * 1e3 + 3 * (1e3 * 3 / 4 - math.log(4)))),
])
def test_value_at_a_gap_of_ten_thousand(name, options, expected):
    """The student is sure of class 0, the teacher and the label say class 1; 5 classes."""
    student = torch.tensor([[1e4, 0, 0, 0, 0]]).requires_grad_()
    teacher = torch.tensor([[0, 1e4, 0, 0, 0]])
    value = make_loss(name, **options)(logits_only(student), logits_only(teacher),
                                       torch.tensor([1]))
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert student.grad.isfinite().all() and student.grad[0, 0] > 0 > student.grad[0, 1]


def repeat_rows(output: ModelOutput) -> ModelOutput:
    return ModelOutput(*[[t.repeat(2, *[1] * (t.dim() - 1)) for t in part] if type(part) is list
                         else part.repeat(2, 1) for part in output])


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize("name", list_losses())
def test_a_batch_seen_twice_counts_once(name, targets):
    loss, targets = make_loss(name).eval(), make_targets(targets)
    student, teacher = make_output(STUDENT_INFO, 1), make_output(TEACHER_INFO, 2)
    twice = loss(repeat_rows(student), repeat_rows(teacher), torch.cat([targets, targets]))
    torch.testing.assert_close(twice, loss(student, teacher, targets))


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize("name", MEAN_OVER_IMAGES)
def test_mean_over_the_batch(name, targets):
    loss, targets = make_loss(name).eval(), make_targets(targets)
    student, teacher = make_output(STUDENT_INFO, 1), make_output(TEACHER_INFO, 2)

    def part(rows: slice) -> Tensor:
        return loss(*[ModelOutput(out.logits[rows], [f[rows] for f in out.features])
                      for out in (student, teacher)], targets[rows])

    halves = part(slice(0, 2)), part(slice(2, 4))
    assert not torch.isclose(*halves, rtol=1e-3)
    torch.testing.assert_close(part(slice(None)), sum(halves) / 2)


@pytest.mark.parametrize("num_classes", [2, 3, 1001])
@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize("name", list_losses())
def test_any_number_of_classes(name, targets, num_classes):
    student = with_gradient(make_output(STUDENT_INFO, 1, num_classes=num_classes))
    value = make_loss(name)(student, make_output(TEACHER_INFO, 2, num_classes=num_classes),
                            make_targets(targets, num_classes=num_classes))
    value.backward()
    assert value.isfinite() and value > 0
    assert all(t.grad.isfinite().all() for t in tensors(student) if t.grad is not None)


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize("name", sorted({*MEAN_OVER_IMAGES} - {"bce"}))  # that is a mean
def test_a_class_that_nobody_expects_changes_nothing(name, targets):
    """Sums over classes, not means."""
    loss, targets = make_loss(name).eval(), make_targets(targets)
    outputs = make_output(STUDENT_INFO, 1), make_output(TEACHER_INFO, 2)
    wider = [output._replace(logits=F.pad(output.logits, (0, 1), value=-1e4))
             for output in outputs]
    wider_targets = targets if targets.dim() == 1 else F.pad(targets, (0, 1))
    torch.testing.assert_close(loss(*wider, wider_targets), loss(*outputs, targets))


@pytest.mark.parametrize("name", ZERO_WHEN_EQUAL)
def test_zero_when_the_student_is_the_teacher(name):
    loss = make_loss(name, STUDENT_INFO, STUDENT_INFO, **ZERO_WHEN_EQUAL[name])
    teacher = make_output(STUDENT_INFO, 1, scale=2)
    student = with_gradient(teacher)
    value = loss(student, teacher, make_targets("soft"))
    value.backward()
    assert value.abs() < 1e-5  # of dist, its epsilon
    reached = student.logits if loss.trains_logits else student.features[-1]
    assert reached.grad.abs().max() < 1e-5
    assert loss(make_output(STUDENT_INFO, 2), teacher, make_targets("soft")) > 0.1


def other_value(name: str, option: str, value):
    """A legal value that differs from the default."""
    if value is None or isinstance(value, bool):
        return 0.0 if value is None else not value
    if isinstance(value, str):
        return OTHER_WORD[name, option]
    return 0 if isinstance(value, int) else 0.5 * value + 0.3


OPTIONS = [(name, option, parameter.default) for name in list_losses()
           for option, parameter in inspect.signature(
               type(create_loss(name, STUDENT_INFO, TEACHER_INFO))).parameters.items()
           if option not in ("student_info", "teacher_info")]


@pytest.mark.parametrize("name, option, default", OPTIONS)
def test_every_option_matters(name, option, default):
    info = (FeatureInfo(8, 16), FeatureInfo(8, 32))  # equal channels, so that project may be off
    student, teacher = make_output(info, 1, scale=3), make_output(info, 2, scale=3)
    values = []
    for options in ({}, {option: default}, {option: other_value(name, option, default)}):
        loss = make_loss(name, info, info, **options)
        rng = torch.Generator().manual_seed(3)
        for parameter in loss.parameters():
            nn.init.normal_(parameter, generator=rng)
        kind = "soft" if option == "threshold" else "hard"
        values.append(seeded(loss, student, teacher, make_targets(kind)).item())
    assert values[0] == values[1]
    assert values[2] != pytest.approx(values[0], rel=1e-4)


@pytest.mark.parametrize("name", list_losses())
def test_only_a_loss_that_needs_no_teacher_works_without(name):
    if create_loss(name, STUDENT_INFO, TEACHER_INFO).needs_teacher:
        with pytest.raises(UserError, match=f"'{name}' compares with a teacher.*--teacher"):
            create_loss(name, STUDENT_INFO)
    else:
        value = create_loss(name, STUDENT_INFO)(make_output(STUDENT_INFO, 1), None,
                                                make_targets("soft"))
        assert value.isfinite()


def test_which_losses_need_a_teacher_and_train_the_head():
    made = {name: make_loss(name) for name in ("ce", "dist", "dkd", "fd", "kd", "mgd", "nkd")}
    assert [name for name in made if not made[name].needs_teacher] == ["ce"]
    assert [name for name in made if not made[name].trains_logits] == ["fd", "mgd"]


# Plain formulas, in float64; targets (N, K)


def plain_ce(loss, student: ModelOutput, teacher: ModelOutput, targets: Tensor) -> Tensor:
    return -(targets * student.logits.softmax(1).log()).sum(1).mean()


def plain_kd(loss, student: ModelOutput, teacher: ModelOutput, targets: Tensor) -> Tensor:
    s, t = student.logits.softmax(1), teacher.logits.softmax(1)
    divergence = (t * (t / s).log()).sum(1).mean()
    return 0.1 * divergence + 0.9 * plain_ce(loss, student, teacher, targets)


def without(prob: Tensor, c: Tensor) -> Tensor:
    rest = torch.cat([prob[:c], prob[c + 1:]])
    return rest / rest.sum()


def plain_nkd(loss, student: ModelOutput, teacher: ModelOutput, targets: Tensor) -> Tensor:
    terms = []
    for s, t, c in zip(student.logits.softmax(1), teacher.logits.softmax(1), targets.argmax(1)):
        terms.append(-t[c] * s[c].log() - (without(t, c) * without(s, c).log()).sum())
    return torch.stack(terms).mean()


def plain_dkd(loss, student: ModelOutput, teacher: ModelOutput, targets: Tensor) -> Tensor:
    terms = []
    for s, t, c in zip(student.logits.softmax(1), teacher.logits.softmax(1), targets.argmax(1)):
        binary = t[c] * (t[c] / s[c]).log() + (1 - t[c]) * ((1 - t[c]) / (1 - s[c])).log()
        rest = without(t, c) * (without(t, c) / without(s, c)).log()
        terms.append(binary + 0.5 * rest.sum())
    return torch.stack(terms).mean()


def plain_dist(loss, student: ModelOutput, teacher: ModelOutput, targets: Tensor) -> Tensor:
    s, t = student.logits.softmax(1), teacher.logits.softmax(1)
    inter, intra = [torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*rows)])
                    for rows in ((s, t), (s.T, t.T))]
    return (1 - inter).mean() + (1 - intra).mean()


def plain_fd(loss, student: ModelOutput, teacher: ModelOutput, targets: Tensor) -> Tensor:
    weight, bias = [p.double() for p in loss.parameters()]
    projected = torch.einsum("oc,nchw->nohw", weight[:, :, 0, 0], student.features[-1])
    distance = (projected + bias.view(-1, 1, 1) - teacher.features[-1]).abs()
    return torch.where(distance < 2, distance ** 2 / 4, distance - 1).mean()


def plain_mgd(loss, student: ModelOutput, teacher: ModelOutput, targets: Tensor) -> Tensor:
    align, align_bias, first, first_bias, second, second_bias = [p.double()
                                                                 for p in loss.parameters()]
    mask = torch.rand(4, 12, 1, 1) >= 0.15
    masked = F.conv2d(student.features[-1], align, align_bias) * mask
    generated = F.conv2d(F.conv2d(masked, first, first_bias, padding=1).clamp(min=0), second,
                         second_bias, padding=1)
    return 7e-5 * ((generated - teacher.features[-1]) ** 2).sum() / 4


PLAIN = {"ce": plain_ce, "dist": plain_dist, "dkd": plain_dkd, "fd": plain_fd, "kd": plain_kd,
         "mgd": plain_mgd, "nkd": plain_nkd}


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize("name", list_losses())
def test_value_and_gradient_of_the_plain_formula(name, targets):
    if name not in PLAIN:
        pytest.skip(f"no plain formula of {name} here")
    loss, targets = make_loss(name), make_targets(targets)
    dense = (F.one_hot(targets, 10) if targets.dim() == 1 else targets).double()
    outputs = make_output(STUDENT_INFO, 1, scale=2), make_output(TEACHER_INFO, 2, scale=2)
    student, exact = with_gradient(outputs[0]), with_gradient(convert(outputs[0], torch.float64))
    value = seeded(loss, student, outputs[1], targets)
    expected = seeded(PLAIN[name], loss, exact, convert(outputs[1], torch.float64), dense)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    value.backward(), expected.backward()
    for ours, plain in zip(tensors(student), tensors(exact)):
        assert (ours.grad is None) == (plain.grad is None)
        if plain.grad is not None:
            assert (ours.grad - plain.grad).abs().max() < 1e-5 * plain.grad.abs().max()


# What each promises


def test_hard_labels():
    assert hard_labels(torch.tensor([2, 0])).tolist() == [2, 0]
    assert hard_labels(torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.4, 0.0]])).tolist() == [2, 0]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_zero_when_the_student_is_the_teacher(temperature):
    output = logits_only(5 * torch.randn(6, 9, generator=torch.Generator().manual_seed(0)))
    loss = make_loss("kd", alpha=1.0, temperature=temperature)
    assert loss(output, output, make_targets("hard", 6, 9)).abs() < 1e-6


@pytest.mark.parametrize("name", ["nkd", "dkd"])
def test_the_largest_of_mixed_targets_is_taken(name):
    loss = make_loss(name)
    outputs = make_output(STUDENT_INFO, 1), make_output(TEACHER_INFO, 2)
    mixed = make_targets("soft")
    assert torch.equal(loss(*outputs, mixed), loss(*outputs, mixed.argmax(1)))
    assert not torch.isclose(loss(*outputs, mixed), loss(*outputs, mixed.flip(0).argmax(1)))


@pytest.mark.parametrize("options", [{}, {"kind": "mse"}, {"project": False},
                                     {"features": (0, 1)}])
def test_fd_is_zero_for_equal_maps(options):
    output = make_output(STUDENT_INFO, 1)
    loss = make_loss("fd", STUDENT_INFO, STUDENT_INFO, **options)
    assert loss(output, output, None) == 0


def test_fd_projects_to_the_teachers_channels():
    loss = make_loss("fd", features=(0, -1))
    shapes = [tuple(p.shape) for p in loss.parameters()]
    assert shapes == [(10, 6, 1, 1), (10,), (12, 8, 1, 1), (12,)]
    assert [tuple(p.shape) for p in make_loss("fd").parameters()] == [(12, 8, 1, 1), (12,)]
    assert list(make_loss("fd", STUDENT_INFO, STUDENT_INFO, project=False).parameters()) == []


def test_fd_of_several_features_is_their_mean():
    student, teacher = make_output(STUDENT_INFO, 1), make_output(STUDENT_INFO, 2)
    single = [make_loss("fd", STUDENT_INFO, STUDENT_INFO, features=i)(student, teacher, None)
              for i in (0, 1)]
    both = make_loss("fd", STUDENT_INFO, STUDENT_INFO, features=(0, 1))(student, teacher, None)
    torch.testing.assert_close(both, sum(single) / 2)
    assert not torch.isclose(*single)


def test_fd_projection_is_a_convolution_before_the_distance():
    loss = make_loss("fd", kind="mse")
    student, teacher = make_output(STUDENT_INFO, 1), make_output(TEACHER_INFO, 2)
    weight, bias = loss.parameters()
    projected = torch.einsum("oc,nchw->nohw", weight[:, :, 0, 0], student.features[-1])
    expected = ((projected + bias.view(-1, 1, 1) - teacher.features[-1]) ** 2).mean()
    torch.testing.assert_close(loss(student, teacher, None), expected)


def test_fd_interpolates_the_student_to_the_teachers_size():
    info = (FeatureInfo(5, 32),)
    student, teacher = torch.randn(2, 5, 7, 7), torch.randn(2, 5, 14, 14)
    loss = make_loss("fd", info, info, kind="mse")
    value = loss(ModelOutput(None, [student]), ModelOutput(None, [teacher]), None)
    enlarged = student.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(value, ((enlarged - teacher) ** 2).mean())
    shrunk = loss(ModelOutput(None, [teacher]), ModelOutput(None, [student]), None)
    torch.testing.assert_close(shrunk, ((teacher[:, :, ::2, ::2] - student) ** 2).mean())


def test_fd_whitens_the_teacher_only():
    info = (FeatureInfo(5, 32),)
    student, teacher = torch.randn(2, 5, 4, 4), 7 + 3 * torch.randn(2, 5, 4, 4)
    loss = make_loss("fd", info, info, kind="mse", whiten=True)
    mean, std = teacher.mean(1, keepdim=True), teacher.std(1, keepdim=True, unbiased=False)
    value = loss(ModelOutput(None, [student]), ModelOutput(None, [teacher]), None)
    torch.testing.assert_close(value, ((student - (teacher - mean) / std) ** 2).mean(), rtol=1e-4,
                               atol=0)


@pytest.mark.parametrize("name, options", [("kd", {"alpha": 1.0}), ("dkd", {}), ("dist", {})])
def test_temperature_divides_the_logits_and_its_square_multiplies(name, options):
    outputs = make_output(STUDENT_INFO, 1, scale=3), make_output(TEACHER_INFO, 2, scale=3)
    cooled = [logits_only(output.logits / 4) for output in outputs]
    targets = make_targets("hard")
    torch.testing.assert_close(make_loss(name, temperature=4.0, **options)(*outputs, targets),
                               16 * make_loss(name, **options)(*cooled, targets))


def test_dkd_is_kd_taken_apart():
    """KL = binary KL + (1 - p_t[c]) KL of the rest (the paper's decomposition), image by image."""
    outputs = make_output(STUDENT_INFO, 1, num=1), make_output(TEACHER_INFO, 2, num=1)
    targets = torch.tensor([3])
    others = 1 - outputs[1].logits.softmax(1)[0, 3].item()
    divergence = make_loss("kd", alpha=1.0)(*outputs, targets)
    torch.testing.assert_close(make_loss("dkd", beta=others)(*outputs, targets), divergence)


def test_dist_does_not_depend_on_the_number_of_classes():
    """Every class twice halves the probabilities and repeats rows and columns: means, not sums."""
    outputs = make_output(STUDENT_INFO, 1), make_output(TEACHER_INFO, 2)
    doubled = [logits_only(output.logits.repeat(1, 2)) for output in outputs]
    loss = make_loss("dist")
    torch.testing.assert_close(loss(*doubled, None), loss(*outputs, None))


def test_dist_weighs_classes_by_beta_and_images_by_gamma():
    outputs = make_output(STUDENT_INFO, 1), make_output(TEACHER_INFO, 2)
    inter = make_loss("dist", gamma=0.0)(*outputs, None)
    intra = make_loss("dist", beta=0.0)(*outputs, None)
    torch.testing.assert_close(make_loss("dist", beta=2.0, gamma=3.0)(*outputs, None),
                               2 * inter + 3 * intra)
    single = [logits_only(output.logits[:1]) for output in outputs]
    assert make_loss("dist", beta=0.0)(*single, None) == 1  # one image, nothing to relate
    assert make_loss("dist", gamma=0.0)(*single, None) != 1


def test_dist_sees_shape_only():
    """A shift and a scale of the probabilities change nothing."""
    teacher = make_output(TEACHER_INFO, 2).logits.softmax(1)
    student = logits_only((0.05 + 0.5 * teacher).log())
    assert make_loss("dist")(student, logits_only(teacher.log()), None).abs() < 1e-5


FLAT = {"a head at zero": torch.zeros(4, 10), "of one image": torch.linspace(-1, 2, 10)[None],
        "the same for all images": torch.linspace(0, 2, 10).repeat(4, 1),
        "sure of one class": 1e4 * torch.eye(10)[[3, 3, 3, 3]]}


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("case", FLAT)
def test_dist_of_probabilities_that_do_not_vary(case, side):
    flat = FLAT[case]
    lively = make_output(STUDENT_INFO, 1, num=len(flat)).logits
    student = (lively if side == "teacher" else flat).clone().requires_grad_()
    teacher = lively if side == "student" else flat
    value = make_loss("dist")(logits_only(student), logits_only(teacher), None)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all() and student.grad.abs().max() < 1
    if case == "a head at zero":
        assert value == 2 and not student.grad.any()


def test_mgd_masks_whole_channels_by_the_global_generator():
    info = (FeatureInfo(64, 32),)
    loss = make_loss("mgd", info, info, mask_ratio=0.4)
    seen = []
    loss.generators[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    student, teacher = make_output(info, 1, num=16), make_output(info, 2, num=16)
    values = [seeded(loss, student, teacher, None), loss(student, teacher, None),
              seeded(loss, student, teacher, None)]
    assert values[0] == values[2] != values[1]
    kept = seen[0].abs().amax((2, 3)) > 0  # (N, C)
    assert 0.55 < kept.float().mean() < 0.65 and kept.any(0).all() and not kept.all(0).any()
    assert torch.equal(seen[0], student.features[-1] * kept[:, :, None, None])  # not rescaled
    assert not torch.equal(seen[0], seen[1])


def test_mgd_masks_nothing_in_evaluation_and_leaves_the_generator():
    loss = make_loss("mgd")
    student, teacher = make_output(STUDENT_INFO, 1), make_output(TEACHER_INFO, 2)
    distiller = Distiller(FixedNetwork(student), {"mgd": loss}, {"mgd": 1.0})
    before = torch.get_rng_state()
    distiller.check(torch.zeros(4, 3, 8, 8), make_targets("soft"), FixedNetwork(teacher),
                    batch_size=4)
    values = [loss.eval()(student, teacher, None) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before) and values[0] == values[1]
    unmasked = make_loss("mgd", mask_ratio=0.0)
    torch.testing.assert_close(unmasked(student, teacher, None), values[0])


def test_mgd_sums_its_stages_and_aligns_unequal_channels_only():
    info = (FeatureInfo(6, 16), FeatureInfo(12, 32))
    student, teacher = make_output(info, 1), make_output(TEACHER_INFO, 2)
    loss = make_loss("mgd", info, TEACHER_INFO, features=(0, 1)).eval()
    shapes = [tuple(p.shape) for p in loss.parameters() if p.dim() == 4]
    assert shapes == [(10, 6, 1, 1), (10, 10, 3, 3), (10, 10, 3, 3), (12, 12, 3, 3), (12, 12, 3, 3)]
    singles = []
    for stage in (0, 1):
        single = make_loss("mgd", info, TEACHER_INFO, features=stage).eval()
        single.aligns[0], single.generators[0] = loss.aligns[stage], loss.generators[stage]
        singles.append(single(student, teacher, None))
    torch.testing.assert_close(loss(student, teacher, None), sum(singles))


@pytest.mark.parametrize("sizes", [(4, 7), (7, 4)])
def test_mgd_interpolates_the_student_to_the_teachers_size(sizes):
    info = (FeatureInfo(5, 32),)
    student, teacher = [torch.randn(2, 5, size, size) for size in sizes]
    loss = make_loss("mgd", info, info).eval()
    resized = F.interpolate(student, teacher.shape[2:], mode="bilinear", align_corners=False)
    value, expected = [loss(ModelOutput(None, [s]), ModelOutput(None, [teacher]), None)
                       for s in (student, resized)]
    torch.testing.assert_close(value, expected)


def test_ce_refuses_to_smooth_twice():
    loss = make_loss("ce", label_smoothing=0.1)
    with pytest.raises(UserError, match="label_smoothing=0.1.*already soft.*--smoothing"):
        loss(make_output(STUDENT_INFO, 1), None, make_targets("soft"))


# Wrong names and options


def test_unknown_loss_names_the_nearest():
    with pytest.raises(UnknownName) as caught:
        make_loss("nkdd")
    message = str(caught.value)
    assert message.startswith("unknown loss 'nkdd'. Known: bce, ce, ")
    assert "Did you mean 'nkd'?" in message and "losses/__init__.py" in message


@pytest.mark.parametrize("name, option, nearest", [
    ("kd", "temprature", "temperature"), ("nkd", "gama", "gamma"), ("fd", "feature", "features"),
    ("ce", "smoothing", "label_smoothing"), ("dkd", "bet", "beta"), ("dist", "gama", "gamma"),
    ("mgd", "masked_ratio", "mask_ratio")])
def test_unknown_option_names_the_nearest(name, option, nearest):
    with pytest.raises(UserError, match=f"'{option}' of loss '{name}'.*Did you mean '{nearest}'"):
        make_loss(name, **{option: 1})


@pytest.mark.parametrize("name", list_losses())
@pytest.mark.parametrize("option", ["name", "student_info", "teacher_info"])
def test_what_the_program_passes_is_no_option(name, option):
    with pytest.raises(UserError, match=f"^{option} .*loss '{name}'"):
        create_loss(name, STUDENT_INFO, TEACHER_INFO, **{option: 3})


@pytest.mark.parametrize("option", ["name=x", "student_info=3"])
def test_such_an_option_on_the_command_line_gets_one_sentence(option, capsys, tmp_path):
    code = train_kd.main(["--teacher", "none", "--student", "resnet_nano", "--loss", "ce", option,
                          "--data-set", "outlines", "--output-dir", str(tmp_path / "runs")])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and not (tmp_path / "runs").exists()
    assert lines[0].startswith(f"train_kd.py: error: {option.partition('=')[0]} ")
    assert "loss 'ce'" in lines[0]


@pytest.mark.parametrize("name, options, sentence", [
    ("ce", {"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\], got 1.5"),
    ("kd", {"alpha": -0.1}, r"alpha must lie in \[0, 1\], got -0.1"),
    ("kd", {"alpha": "x"}, "'alpha'.* must be int or float, got 'x'"),
    ("kd", {"hard": 1}, "'hard'.* must be bool, got 1"),
    ("kd", {"temperature": 0}, "temperature must be a positive number, got 0"),
    ("kd", {"temperature": float("inf")}, "temperature must be a positive number, got inf"),
    ("nkd", {"temperature": -1.0}, "temperature must be a positive number, got -1.0"),
    ("nkd", {"temperature": float("nan")}, "temperature must be a positive number, got nan"),
    ("nkd", {"gamma": -1}, "gamma must not be negative or infinite, got -1"),
    ("fd", {"kind": "l1"}, "kind must be smooth_l1 or mse, got 'l1'"),
    ("fd", {"beta": 0.0}, "beta must be a positive number, got 0.0"),
    ("fd", {"features": 2}, r"features=2: the student has 2 stage\(s\).*\[-2, 1\].*features=-1"),
    ("fd", {"features": (0, -3)}, "features=0,-3: the student has 2"),
    ("fd", {"features": ()}, "features="),
    ("fd", {"features": "last"}, "features="),
    ("fd", {"project": False}, "equal channels; the student has 8, the teacher 12"),
    ("dkd", {"alpha": -1}, "dkd alpha must not be negative or infinite, got -1"),
    ("dkd", {"beta": -0.5}, "dkd beta must not be negative or infinite, got -0.5"),
    ("dkd", {"temperature": 0}, "dkd temperature must be a positive number, got 0"),
    ("dist", {"beta": -1}, "dist beta must not be negative or infinite, got -1"),
    ("dist", {"gamma": float("inf")}, "dist gamma must not be negative or infinite, got inf"),
    ("dist", {"temperature": -1}, "dist temperature must be a positive number, got -1"),
    ("mgd", {"mask_ratio": 1}, r"mask_ratio must lie in \[0, 1\), got 1; at 1 nothing is left"),
    ("mgd", {"mask_ratio": -0.1}, r"mask_ratio must lie in \[0, 1\), got -0.1"),
    ("mgd", {"alpha": 0}, "mgd alpha must be a positive number, got 0"),
    ("mgd", {"features": 2}, r"mgd features=2: the student has 2 stage\(s\).*features=-1"),
])
def test_wrong_options_are_refused_in_words(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        make_loss(name, **options)


@pytest.mark.parametrize("name, options", [
    ("fd", {"features": 1.5}), ("fd", {"features": None}), ("fd", {"features": True}),
    ("nkd", {"gamma": float("nan")}), ("nkd", {"gamma": float("inf")}),
    ("dkd", {"beta": float("nan")}), ("dist", {"gamma": float("nan")}),
    ("mgd", {"mask_ratio": float("nan")}), ("mgd", {"features": "last"})])
def test_impossible_values_are_refused_in_words(name, options):
    with pytest.raises(UserError, match=next(iter(options))):
        make_loss(name, **options)


def test_fd_names_the_side_that_lacks_the_stage():
    with pytest.raises(UserError, match=r"features=0,1: the teacher has 1 stage\(s\)"):
        make_loss("fd", STUDENT_INFO, TEACHER_INFO[-1:], features=(0, 1))
