"""That a folded network, and the layers that inference takes shortcuts in, keep their function."""
import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from models.base import ModelOutput, VisionModel
from models.convnext import ConvNeXt
from models.distiller import PIXELS_AT_A_TIME, FrozenTeacher
from models.large_kernel.operator import set_backend
from models.layers import GELU, PointwiseLinear
from models.slak import FoldedLargeKernel, SLaK
from tests.helpers import MICRO, fill_by_name, micro_convnext_bn, micro_slak

LARGER_THAN_MAPS = (51, 49, 47, 13, 5)
VARIANTS = {
    "decomposed": {}, "plain": {"decomposed": False},
    "decomposed, no bn": {"bn": False}, "plain, no bn": {"decomposed": False, "bn": False},
    "no small kernel": {"kernel_size": (5, 5, 5, 5, 5)},
    "small kernels in some stages": {"kernel_size": (9, 5, 3, 7, 5)},
    "plain, no small kernel": {"kernel_size": (13, 11, 9, 7, 100), "decomposed": False},
    "larger than maps": {"kernel_size": LARGER_THAN_MAPS},
    "plain, larger than maps": {"kernel_size": (31, 29, 27, 13, 5), "decomposed": False},
    "larger than maps, no bn": {"kernel_size": LARGER_THAN_MAPS, "bn": False},
    "no layer scale": {"layer_scale_init": 0.0}, "width factor": {"width_factor": 0.7},
    "convnext_bn": {"kernel_size": (7, 7, 7, 7, 100), "width_factor": 1.0, "decomposed": False},
    "convnext_nobn": {"kernel_size": (7, 7, 7, 7, 100), "width_factor": 1.0, "decomposed": False,
                      "bn": False},
}
SIZES = ((32, 32), (64, 64), (96, 96), (50, 50), (75, 75), (101, 101), (64, 96), (97, 40))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; NaN stays NaN, which fails."""
    assert actual.shape == expected.shape
    difference = actual.double() - expected.double()
    return float(difference.abs().max() / expected.double().abs().max())


def error_of(output: ModelOutput, expected: ModelOutput) -> float:
    """The largest of the logits' and of every stage map's."""
    pairs = zip([output.logits, *output.features], [expected.logits, *expected.features],
                strict=True)
    return max(relative_error(*pair) for pair in pairs)


def draw_images(num_images: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(num_images, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


def pair(**options) -> tuple[SLaK, SLaK]:
    """A network with statistics, scales and shifts of its own, and the same folded."""
    model, folded = [fill_by_name(micro_slak(**options)).eval() for _ in range(2)]
    return model, folded.fold()


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> ModelOutput:
    return model.forward_with_features(images)


@pytest.mark.parametrize("name", VARIANTS)
def test_folded_equals_unfolded_at_every_size_in_turn(name):
    model, folded = pair(**VARIANTS[name])
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(isinstance(m, FoldedLargeKernel) for m in folded.modules()) == sum(model.depths)
    for size in (*SIZES, SIZES[0]):  # the first again: what was prepared for it is gone
        images = draw_images(2, size)
        assert error_of(run(folded, images), run(model, images)) < 1e-5, size


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", ["conv", "banded", "torch"])
def test_folded_equals_unfolded_by_every_backend_in_turn(backend, layout):
    model, folded = pair()
    images = draw_images(2, (64, 96)).contiguous(memory_format=layout)
    run(folded, images)  # by another one
    expected = run(model, images)
    set_backend(backend, folded.to(memory_format=layout))
    for _ in range(2):
        assert error_of(run(folded, images), expected) < 1e-5


@pytest.mark.parametrize("name", ["decomposed", "plain, larger than maps", "convnext_bn"])
def test_precision_may_change_between_calls(name):
    for size in ((64, 64), (50, 75)):
        model, folded = pair(**VARIANTS[name])
        images = draw_images(2, size)
        expected = run(model, images)
        with torch.autocast("cpu", torch.bfloat16):
            in_half = [run(net, images) for net in (folded, folded, model)]
        # Of the maximum; the un-folded network loses as much.
        assert max(error_of(output, expected) for output in in_half) < 3e-2
        assert in_half[0].logits.dtype == torch.bfloat16
        assert error_of(run(folded, images), expected) < 1e-5
        assert error_of(run(folded.bfloat16(), images.bfloat16()), expected) < 3e-2


def test_folding_again_is_harmless():
    model, folded = pair()
    images = draw_images(2, (64, 64))
    first = run(folded, images)
    before = {key: value.clone() for key, value in folded.state_dict().items()}
    assert folded.fold() is folded
    assert all(torch.equal(value, before[key]) for key, value in folded.state_dict().items())
    assert torch.equal(run(folded, images).logits, first.logits)


def test_folding_leaves_the_precision_of_the_weights():
    model = fill_by_name(micro_slak()).eval().double()
    images = draw_images(1, (64, 64)).double()
    expected = run(model, images)
    folded = model.fold()
    assert {p.dtype for p in folded.parameters()} == {torch.float64}
    assert error_of(run(folded, images), expected) < 1e-12


def test_folded_network_gives_the_gradient_of_its_input():
    """In evaluation mode, also where its weights are frozen and something is prepared."""
    model, folded = pair()
    folded.requires_grad_(False)
    images = draw_images(2, (64, 64))
    run(folded, images)
    gradients = []
    for net in (model, folded):
        leaf = images.clone().requires_grad_()
        net(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-5


# The teacher


AT_A_TIME = PIXELS_AT_A_TIME // 64 ** 2
MAKERS = {"convnext_bn": micro_convnext_bn, "convnext": lambda: ConvNeXt(**MICRO),
          "slak": micro_slak}


def make_teacher(make=micro_convnext_bn) -> tuple[FrozenTeacher, VisionModel]:
    """Of a network as it is normalised itself, and the same network un-folded."""
    model, same = [fill_by_name(make()).eval() for _ in range(2)]
    return FrozenTeacher(model, model.input_mean, model.input_std), same


@pytest.mark.parametrize("num_images", [1, 2 * AT_A_TIME, 2 * AT_A_TIME + 1])
@pytest.mark.parametrize("name", MAKERS)
def test_teacher_in_parts_equals_one_call(name, num_images):
    teacher, model = make_teacher(MAKERS[name])
    images = draw_images(num_images, (64, 64))
    output = teacher.forward_with_features(images)
    assert error_of(output, run(model, images)) < 1e-5
    for tensor in (output.logits, *output.features):
        assert not tensor.requires_grad and tensor.grad_fn is None and len(tensor) == num_images


def test_teacher_has_no_graph_even_for_images_that_want_one():
    teacher, model = make_teacher()
    images = draw_images(2, (64, 64)).requires_grad_()
    output = teacher.forward_with_features(images)
    assert all(t.grad_fn is None for t in (output.logits, *output.features))
    assert not any(p.requires_grad for p in teacher.parameters())
    # What it gives can be saved for the backward pass of the student.
    weight = torch.ones(10, requires_grad=True)
    (output.logits * weight).sum().backward()
    assert torch.equal(weight.grad, output.logits.sum(0))


def test_teacher_leaves_the_images_as_they_are():
    teacher, _ = make_teacher()
    images = draw_images(2, (64, 64))
    before = images.clone()
    teacher(images)
    assert torch.equal(images, before)


def test_compiled_teacher_equals_eager_at_every_size_in_turn(monkeypatch):
    teacher, model = make_teacher(
        lambda: micro_slak(depths=(1, 1), dims=(8, 16), kernel_size=(13, 7, 5)))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    teacher.compile()
    for size in ((32, 32), (32, 32), (48, 80)):
        images = draw_images(2, size)
        assert error_of(run(teacher, images), run(model, images)) < 1e-5


# The layers


def test_gelu_trains_as_torchs():
    x = torch.randn(2, 5, 5, 8)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for leaf, gelu in zip(leaves, (GELU(), nn.GELU())):
        given = leaf * 1
        y = gelu(given)
        assert torch.equal(y, nn.GELU()(x)) and torch.equal(given, x)  # not in place
        y.square().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gelu_is_in_place_where_no_gradient_is_recorded(dtype):
    expected = nn.GELU()(torch.linspace(-4, 4, 99, dtype=dtype))
    x = torch.linspace(-4, 4, 99, dtype=dtype)
    assert GELU()(x) is x and torch.equal(x, expected)
    parameter = torch.linspace(-4, 4, 99, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        y = parameter.clone()
        assert GELU()(y) is y and torch.equal(y, expected)


def test_gelu_keeps_its_approximation():
    x = torch.linspace(-4, 4, 99)
    assert torch.equal(GELU("tanh")(x.clone()), nn.GELU("tanh")(x))


def test_a_block_with_frozen_first_layers_trains():
    """GELU works in place on what no gradient is recorded for, though later layers have one."""
    model = fill_by_name(micro_slak()).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("stages.3", "norm", "head")))
    expected = fill_by_name(micro_slak()).train()
    images = draw_images(2, (64, 64))
    for net in (model, expected):
        net(images).square().sum().backward()
    for (name, found), true in zip(model.named_parameters(), expected.parameters()):
        if found.requires_grad:
            assert relative_error(found.grad, true.grad) < 1e-5, name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 7, 8), (1, 1, 1, 8), (3, 8), (2, 6, 8)], ids=str)
@pytest.mark.parametrize("amp", [False, True])
def test_pointwise_linear_equals_linear(shape, bias, amp):
    ours, theirs = PointwiseLinear(8, 12, bias=bias), nn.Linear(8, 12, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x, tolerance = torch.randn(shape), 1.2e-2 if amp else 1e-5
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = layer(leaf)
        y.float().square().sum().backward()
        results.append([y, leaf.grad, *[p.grad for p in layer.parameters()]])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype and found.is_contiguous()
        assert relative_error(found.detach(), expected.detach()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_pointwise_linear_in_other_precisions_is_pytorchs(dtype):
    ours = PointwiseLinear(8, 12).to(dtype)
    x = torch.randn(2, 5, 7, 8, dtype=dtype)
    assert torch.equal(ours(x), nn.functional.linear(x, ours.weight, ours.bias))


def test_other_weights_in_a_folded_network_are_the_ones_that_count():
    images = torch.randn(2, 3, 40, 40)
    first, second = [fill_by_name(micro_slak(), salt).eval().fold() for salt in (1, 2)]
    with torch.no_grad():
        first(images)  # precomputes
        copied = copy.deepcopy(first)
        copied.load_state_dict(second.state_dict())
        first.load_state_dict(second.state_dict())
        for network in (first, copied):
            torch.testing.assert_close(network(images), second(images), rtol=1e-5, atol=1e-5)
