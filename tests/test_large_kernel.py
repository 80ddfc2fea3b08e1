"""models/large_kernel and what computes it on a CPU, against PyTorch's convolution in float64.

Triton's kernels have a file of their own.
"""
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.large_kernel import banded, operator
from models.large_kernel.operator import (
    BACKENDS,
    Prepared,
    cropped,
    depthwise,
    depthwise_sum,
    describe_choice,
    set_backend,
)
from models.slak import LargeKernel
from tests.helpers import fill_by_name, micro_slak
from utils.registry import UserError

OURS = ("conv", "banded", "dense")  # on a CPU
SLAK, PAIR, SINGLE = ((51, 5), (5, 51), (5, 5)), ((13, 3), (3, 13), (3, 3)), ((7, 7),)
MAPS = ((14, 14), (7, 9), (20, 13), (1, 1), (2, 15))  # the last: a tall kernel cropped to a wide
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Of the maximum. In 16 bits about three roundings: a map's, and that of each sum of two.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
IMAGES, CHANNELS = 2, 3


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; NaN stays NaN, which fails."""
    assert actual.shape == expected.shape
    difference = actual.detach().double() - expected.detach().double()
    return float(difference.abs().max() / expected.detach().double().abs().max())


def convolutions(x: Tensor, kernels: list[Tensor]) -> list[Tensor]:
    return [F.conv2d(x, kernel, padding=(kernel.shape[2] // 2, kernel.shape[3] // 2),
                     groups=x.shape[1]) for kernel in kernels]


@cache
def drawn(sizes: tuple, size: tuple[int, int], dtype: torch.dtype) -> tuple:
    """A map, kernels and a gradient per branch, of numbers that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(len(sizes))
    shapes = [(IMAGES, CHANNELS, *size), *[(CHANNELS, 1, *edges) for edges in sizes],
              *[(IMAGES, CHANNELS, *size) for _ in sizes]]
    x, *others = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return x, others[:len(sizes)], others[len(sizes):]


@cache
def expected_of(sizes: tuple, size: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Maps, and the gradients of the map and the kernels for a gradient per branch and for the
    first one at all, in float64."""
    x, kernels, gradients = drawn(sizes, size, dtype)
    leaves = [tensor.double().requires_grad_() for tensor in (x, *kernels)]
    maps = convolutions(leaves[0], leaves[1:])
    each = [gradient.double() for gradient in gradients]
    by_branch = torch.autograd.grad(maps, leaves, each, retain_graph=True)
    shared = torch.autograd.grad(maps, leaves, each[:1] * len(each))
    return [*[y.detach() for y in maps], *by_branch, *shared]


# Values and gradients


def results(branches, sizes: tuple, size: tuple[int, int], dtype: torch.dtype, layout, other
            ) -> list[Tensor]:
    """What `branches(x, kernels)` gives, and its gradients, in the order of `expected_of`: map and
    kernels in one memory layout, the gradients given in another."""
    x, kernels, gradients = drawn(sizes, size, dtype)
    leaves = [tensor.clone(memory_format=layout).requires_grad_() for tensor in (x, *kernels)]
    given = [gradient.contiguous(memory_format=other) for gradient in gradients]
    maps = branches(leaves[0], leaves[1:])
    by_branch = torch.autograd.grad(maps, leaves, given, retain_graph=True)
    shared = torch.autograd.grad(sum(maps), leaves, given[0])
    return [*maps, *by_branch, *shared]


# Each layout of map and gradient for each set of kernels, either of them first.
CASES = [(sizes, layout, other) for number, sizes in enumerate((SLAK, PAIR, SINGLE))
         for layout, other in ((LAYOUTS, LAYOUTS[::-1])[number % 2], (LAYOUTS[number % 2],) * 2)]


@pytest.mark.parametrize("size", MAPS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["auto", *OURS])
def test_maps_and_gradients_equal_pytorchs_in_float64(name, dtype, size):
    for sizes, *layouts in CASES:
        found = results(lambda x, kernels: depthwise(x, kernels, name), sizes, size, dtype,
                        *layouts)
        for tensor, reference in zip(found, expected_of(sizes, size, dtype), strict=True):
            assert tensor.dtype == dtype
            assert relative_error(tensor, reference) < TOLERANCES[dtype]


# PyTorch's own float16 takes minutes on a CPU that has no units for it.
@pytest.mark.parametrize("size", MAPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_is_pytorchs_convolution_and_gradient(dtype, size):
    """To the last bit. How far PyTorch's own bfloat16 gradients are from float64 depends on the
    processor."""
    for sizes, *layouts in CASES:
        found = results(lambda x, kernels: depthwise(x, kernels, "torch"), sizes, size, dtype,
                        *layouts)
        expected = results(convolutions, sizes, size, dtype, *layouts)
        for tensor, reference in zip(found, expected, strict=True):
            assert tensor.dtype == dtype and torch.equal(tensor, reference)


@pytest.mark.parametrize("wanted", [(0,), (1, 2, 3), (0, 1, 3), (2,)], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_only_the_gradients_that_are_needed(name, wanted):
    x, kernels, gradients = drawn(SLAK, (14, 14), torch.float32)
    leaves = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate((x, *kernels))]
    torch.autograd.backward(depthwise(leaves[0], leaves[1:], name), gradients)
    expected = expected_of(SLAK, (14, 14), torch.float32)[3:7]
    assert [i for i, leaf in enumerate(leaves) if leaf.grad is not None] == list(wanted)
    for i in wanted:
        assert relative_error(leaves[i].grad, expected[i]) < 1e-5


@pytest.mark.parametrize("name", ["conv", "banded"])  # tests/test_dense.py counts products
def test_what_is_not_needed_is_not_computed(name, monkeypatch):
    called = []
    for part in ("input_gradient", "kernel_gradients"):
        spy_on(monkeypatch, name, part, called)
    x, kernels, _ = drawn(PAIR, (7, 9), torch.float32)
    sum(depthwise(x.clone().requires_grad_(), kernels, name)).sum().backward()
    assert called == [(name, "input_gradient")]
    sum(depthwise(x, [k.clone().requires_grad_() for k in kernels], name)).sum().backward()
    assert called[1:] == [(name, "kernel_gradients")]


@pytest.mark.parametrize("unused", range(3))
@pytest.mark.parametrize("name", OURS)
def test_a_branch_without_use_changes_nothing(name, unused):
    x, kernels, gradients = drawn(SLAK, (7, 9), torch.float32)
    used = [i for i in range(3) if i != unused]
    results = []
    for branches in (convolutions, lambda x, kernels: depthwise(x, kernels, name)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *kernels)]
        maps = branches(leaves[0], leaves[1:])
        torch.autograd.backward([maps[i] for i in used], [gradients[i] for i in used])
        results.append([leaf.grad for leaf in leaves])
    idle = results[1].pop(1 + unused)
    assert results[0].pop(1 + unused) is None and (idle is None or not idle.any())
    for found, expected in zip(results[1], results[0], strict=True):
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", OURS)
def test_a_second_derivative_is_refused_and_not_wrong(name):
    x, kernels, _ = drawn(SINGLE, (7, 9), torch.float32)
    x = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="differentiate twice|not require"):
        gradient, = torch.autograd.grad(depthwise(x, kernels, name)[0].square().sum(), x,
                                        create_graph=True)
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", OURS)
def test_an_empty_batch_has_gradients_of_zero(name):
    x = torch.empty(0, CHANNELS, 7, 9, requires_grad=True)
    kernel = torch.randn(CHANNELS, 1, 5, 3, requires_grad=True)
    depthwise(x, [kernel], name)[0].sum().backward()
    assert x.grad.shape == x.shape and not kernel.grad.any()


# The blocks of SLaK


class Convolutions(nn.Module):
    """The same sum of branches made of nn.Conv2d, as published."""

    def __init__(self, like: LargeKernel) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(branch.conv, branch.bn) for branch in like.children())

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)


@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize("name", OURS)
def test_a_block_equals_one_of_convolutions(name, bn, decomposed):
    results = []
    for of_block in (lambda block: block, Convolutions):
        block = fill_by_name(LargeKernel(4, 13, 5, decomposed, bn)).train()
        set_backend(name, block)
        x, gradient = torch.randn(2, 3, 4, 9, 11, generator=torch.Generator().manual_seed(1))[:, :2]
        x.requires_grad_()
        y = of_block(block)(x)
        y.backward(gradient)
        parameters = {key: value.grad for key, value in block.named_parameters()}
        buffers = {key: value for key, value in block.named_buffers() if value.is_floating_point()}
        results.append({"map": y, "x": x.grad, **parameters, **buffers})
    for key, expected in results[1].items():
        assert relative_error(results[0][key], expected) < 1e-5, key


@pytest.mark.parametrize("name", OURS)
def test_every_backend_trains_the_same_network(name):
    logits, gradients = train_step(name)
    expected_logits, expected = train_step("torch")
    assert relative_error(logits, expected_logits) < 1e-5
    for key, gradient in expected.items():
        assert relative_error(gradients[key], gradient) < 1e-4, key


def train_step(name: str, compiled: bool = False, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and parameter gradients of a micro SLaK."""
    model = fill_by_name(micro_slak(**options)).train()
    set_backend(name, model)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    logits = run(images)
    F.cross_entropy(logits, torch.tensor([3, 5])).backward()
    return logits, {key: value.grad for key, value in model.named_parameters()}


# The sum


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_sum_with_bias_for_maps_of_every_size_in_turn(name, dtype):
    bias, prepared = torch.arange(1., 1 + CHANNELS), Prepared()
    # Parameters stay in float32; what they are rounded to is no error of ours.
    kernels = [kernel.float() for kernel in drawn(SLAK, (14, 14), dtype)[1]]
    for size in (*MAPS, MAPS[0]):
        x = drawn(SINGLE, size, dtype)[0]
        doubles = [kernel.double() for kernel in kernels]
        expected = sum(convolutions(x.double(), doubles)) + bias.double().view(-1, 1, 1)
        for _ in range(2):  # prepared, then reused
            y = depthwise_sum(x, kernels, bias, prepared, name)
            assert y.dtype == dtype and relative_error(y, expected) < TOLERANCES[dtype]
            assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", OURS)
def test_sum_prepares_once_for_a_kind_of_map(name, monkeypatch):
    called = []
    spy_on(monkeypatch, name, "prepare", called)
    kernels, prepared, bias = drawn(PAIR, (7, 9), torch.float32)[1], Prepared(), torch.zeros(3)

    def count(num_images: int, size: tuple[int, int], dtype: torch.dtype) -> int:
        depthwise_sum(torch.randn(num_images, 3, *size).to(dtype), kernels, bias, prepared, name)
        return len(called)

    assert [count(2, (7, 9), torch.float32), count(1, (7, 9), torch.float32)] == [1, 1]
    assert [count(2, (9, 7), torch.float32), count(2, (9, 7), torch.bfloat16)] == [2, 3]
    assert [count(2, (9, 7), torch.bfloat16), count(2, (9, 7), torch.float32)] == [3, 3]


@pytest.mark.parametrize("wanted", [(0,), (1, 2, 3, 4), (0, 4), (2,)], ids=str)
@pytest.mark.parametrize("name", ["auto", *OURS, "torch"])
def test_sum_is_in_the_graph_where_a_gradient_is_needed(name, wanted):
    """Of the map (0), kernels and bias (4)."""
    x, kernels, (gradient, *_) = drawn(SLAK, (7, 9), torch.float32)
    bias, prepared, results = torch.arange(1., 1 + CHANNELS), Prepared(), []
    with torch.no_grad():
        depthwise_sum(x, kernels, bias, prepared, name)  # what it kept must not be used below
    for ours in (True, False):
        leaves = [tensor.clone().requires_grad_(i in wanted)
                  for i, tensor in enumerate((x, *kernels, bias))]
        x_leaf, *kernel_leaves, bias_leaf = leaves
        if ours:
            y = depthwise_sum(x_leaf, kernel_leaves, bias_leaf, prepared, name)
        else:
            y = sum(convolutions(x_leaf, kernel_leaves)) + bias_leaf.view(-1, 1, 1)
        y.backward(gradient)
        results.append([y, *[leaves[i].grad for i in wanted]])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", OURS)
def test_what_inference_mode_prepared_serves_elsewhere(name):
    x, kernels, _ = drawn(PAIR, (7, 9), torch.float32)
    prepared, bias = Prepared(), torch.zeros(CHANNELS)
    with torch.inference_mode():
        expected = depthwise_sum(x, kernels, bias, prepared, name)
    assert torch.equal(depthwise_sum(x, kernels, bias, prepared, name), expected)


# Precision, and what PyTorch asks of an operator


@pytest.mark.parametrize("name", OURS)
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_theirs(name):
    x, kernels, gradients = drawn(SLAK, (14, 14), torch.bfloat16)
    leaves = [tensor.float().requires_grad_() for tensor in (x, *kernels)]  # copies
    prepared, bias = Prepared(), torch.arange(1., 1 + CHANNELS)
    with torch.autocast("cpu", torch.bfloat16):
        maps = depthwise(leaves[0], leaves[1:], name)
        with torch.no_grad():
            total = depthwise_sum(leaves[0], leaves[1:], bias, prepared, name)
    assert {y.dtype for y in (*maps, total)} == {torch.bfloat16}
    torch.autograd.backward(maps, gradients)
    expected = expected_of(SLAK, (14, 14), torch.bfloat16)
    assert relative_error(total, sum(expected[:3]) + bias.view(-1, 1, 1)) < 1.2e-2
    for leaf, gradient in zip(leaves, expected[3:7], strict=True):
        assert leaf.grad.dtype == torch.float32
        assert relative_error(leaf.grad, gradient) < 1.2e-2


def test_autocast_leaves_float64_alone_as_it_does_for_pytorchs():
    x, kernel = torch.randn(1, 1, 5, 5).double(), torch.randn(1, 1, 3, 3).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert F.conv2d(x, kernel, padding=1).dtype == torch.float64
        assert depthwise(x, [kernel])[0].dtype == torch.float64


def test_float16_is_computed_in_float32_under_autocast_too(monkeypatch):
    """As conv.py means to: in float16 a CPU may take 100 times as long."""
    dtypes, real = [], F.conv2d

    def noting(*inputs, **options):
        dtypes.append(real(*inputs, **options).dtype)
        return real(*inputs, **options)

    monkeypatch.setattr(F, "conv2d", noting)
    x, kernels, _ = drawn(PAIR, (7, 9), torch.float16)
    depthwise(x, kernels, "conv")
    with torch.autocast("cpu", torch.float16):
        depthwise(x, kernels, "conv")
    assert dtypes == [torch.float32] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", ["branches", "branches_backward", "total"])
@pytest.mark.parametrize("name", OURS)
def test_operators_are_what_torch_compile_believes(name, operator, dtype):
    """Among others, the shapes, dtypes and strides that they announce to it."""
    x, kernels, gradients = drawn(PAIR, (7, 9), dtype)
    kernels, op = [cropped(k, 7, 9).contiguous() for k in kernels], torch.ops.large_kernel
    if operator == "total":
        prepared = BACKENDS[name].prepare(x, kernels)
        bias = torch.ones(3, dtype=dtype)
        for any_layout in (False, True):
            torch.library.opcheck(op.total, (x, kernels, prepared, bias, name, any_layout))
    elif operator == "branches_backward":
        torch.library.opcheck(op.branches_backward, (x, kernels, gradients, name, True, True))
    else:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *kernels)]
        torch.library.opcheck(op.branches, (leaves[0], leaves[1:], name))


@pytest.mark.parametrize("name", OURS)
def test_a_compiled_training_step_is_the_eager_one(name):
    smaller = dict(depths=(1, 1), dims=(8, 16), kernel_size=(13, 7, 5))
    logits, gradients = train_step(name, compiled=True, **smaller)
    expected_logits, expected = train_step(name, **smaller)
    assert relative_error(logits, expected_logits) < 1e-5
    for key, gradient in expected.items():
        assert relative_error(gradients[key], gradient) < 1e-5, key


# Choice


def set_reason(monkeypatch, reason: str | None) -> None:
    """Why Triton does not run on any device; None: it does."""
    monkeypatch.setattr(type(BACKENDS["triton"]), "why_not", lambda backend, device: reason)


def kernels_on(edge: int) -> list[Tensor]:
    return [torch.empty(2, 1, edge, 5, device="meta"), torch.empty(2, 1, 5, edge, device="meta")]


@pytest.mark.parametrize("device, dtype, expected", [
    ("cpu", torch.float32, "conv"), ("cpu", torch.bfloat16, "conv"), ("cpu", torch.float16, "conv"),
    ("cpu", torch.float64, "torch"), ("meta", torch.float32, "torch"),
    ("meta", torch.bfloat16, "torch"), ("mps", torch.float32, "torch")])
def test_auto_without_a_gpu(device, dtype, expected):
    for edge in (3, 51):
        found = operator.choose("auto", torch.device(device), dtype, kernels_on(edge))
        assert found == expected


@pytest.mark.parametrize("dtype, with_triton, without", [
    (torch.bfloat16, "triton", "banded"), (torch.float16, "triton", "banded"),
    (torch.float32, "banded", "banded"), (torch.float64, "torch", "torch")])
def test_auto_on_a_gpu(dtype, with_triton, without, monkeypatch):
    device = torch.device("cuda")
    for reason, expected in ((None, with_triton), ("Triton is not installed.", without)):
        set_reason(monkeypatch, reason)
        for edge in (9, 51):
            assert operator.choose("auto", device, dtype, kernels_on(edge)) == expected
        assert operator.choose("auto", device, dtype, kernels_on(7)) == "torch"


def test_what_is_asked_for_is_taken():
    for name in (*OURS, "torch"):
        for device, expected in (("cpu", name), ("cuda", name), ("meta", "torch")):
            found = operator.choose(name, torch.device(device), torch.float32, kernels_on(3), 196)
            assert found == expected


def test_triton_on_a_cpu_is_refused_in_words(monkeypatch):
    reason = "Triton's kernels need a GPU."
    set_reason(monkeypatch, reason)
    with pytest.raises(UserError) as caught:
        depthwise(torch.zeros(1, 2, 3, 3), [torch.zeros(2, 1, 3, 3)], "triton")
    assert str(caught.value) == (f"--large-kernel triton cannot run on cpu: {reason} Use auto.")


def test_an_unknown_name_is_refused_with_the_known_ones():
    known = ", ".join(operator.CHOICES)
    with pytest.raises(UserError, match=f"unknown .*'tritom'.*Known: {known}"):
        depthwise(torch.zeros(1, 2, 3, 3), [torch.zeros(2, 1, 3, 3)], "tritom")


def spy_on(monkeypatch, name: str, part: str, called: list) -> None:
    """Notes (name, part) in `called` whenever that method of a backend runs."""
    kind = type(BACKENDS[name])
    real = getattr(kind, part)

    def noting(backend, *inputs):
        called.append((name, part))
        return real(backend, *inputs)

    monkeypatch.setattr(kind, part, noting)


def test_set_backend_reaches_every_large_kernel_of_every_network(monkeypatch):
    called = []
    for name in OURS:
        for part in ("outputs", "total"):
            spy_on(monkeypatch, name, part, called)
    student, teacher = micro_slak().eval(), micro_slak().eval().fold()
    images, num_blocks = torch.randn(1, 3, 32, 32), sum(student.depths)
    for name, runs in (("auto", "conv"), ("banded", "banded"), ("conv", "conv"), ("torch", None)):
        set_backend(name, student, None, teacher)
        modules = [m for net in (student, teacher) for m in net.modules()
                   if isinstance(m, operator.LargeKernelModule)]
        assert [m.backend for m in modules] == [name] * 2 * num_blocks
        called.clear()
        with torch.no_grad():
            student(images), teacher(images)
        assert called == ([(runs, "outputs")] * num_blocks + [(runs, "total")] * num_blocks
                          if runs else [])


def test_the_old_name_of_torch_is_understood_with_a_hint(capsys):
    model = micro_slak()
    set_backend("library", model)
    assert {module.backend for module in operator.large_kernel_modules(model)} == {"torch"}
    assert capsys.readouterr().out == "--large-kernel library is understood as torch.\n"


def test_only_kernels_above_nine_taps_are_announced(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    small, large = [micro_slak(kernel_size=(k, 7, 5, 5, 3)) for k in (9, 11)]
    for name, says in (("auto", "conv"), ("banded", "banded")):
        set_backend(name, small, large)
        assert describe_choice(small, cpu, torch.float32) == ""
        assert describe_choice(large, cpu, torch.float32) == f", large kernels by {says}"
    set_backend("auto", large)
    set_reason(monkeypatch, "Triton is not installed.")
    assert describe_choice(large, cuda, torch.bfloat16) == (
        ", large kernels by banded, on maps of at most 196 pixels by dense (Triton is not "
        "installed.)")
    set_reason(monkeypatch, None)
    assert describe_choice(large, cuda, torch.bfloat16) == (
        ", large kernels by triton, on maps of at most 196 pixels by dense")


def test_what_cannot_run_is_refused_where_nothing_is_announced(monkeypatch):
    set_reason(monkeypatch, "Triton's kernels need a GPU.")
    model = micro_slak(kernel_size=(7, 7, 5, 5, 3))
    set_backend("triton", model)
    with pytest.raises(UserError, match="--large-kernel triton cannot run on cpu"):
        describe_choice(model, torch.device("cpu"), torch.float32)


def test_a_choice_without_any_module_is_refused():
    set_backend("auto", nn.Conv2d(3, 3, 3))
    with pytest.raises(UserError, match="--large-kernel conv has no effect"):
        set_backend("conv", nn.Conv2d(3, 3, 3), None)


def test_macs_do_not_depend_on_the_backend():
    for make in (micro_slak, lambda: micro_slak().eval().fold()):
        counts = []
        for name in operator.CHOICES:
            model = make()
            set_backend(name, model)
            counts.append(model.count_macs(64))
        assert len(set(counts)) == 1 and counts[0] > 0


# Parts


@pytest.mark.parametrize("edges, size, expected", [
    ((47, 5), (14, 14), (27, 5)), ((5, 47), (20, 14), (5, 27)), ((47, 5), (24, 24), (47, 5)),
    ((47, 5), (23, 23), (45, 5)), ((51, 5), (1, 1), (1, 1)), ((7, 7), (7, 2), (7, 3))])
def test_cropped_keeps_what_a_map_reaches(edges, size, expected):
    kernel = torch.randn(2, 1, *edges)
    inner = cropped(kernel, *size)
    assert inner.shape == (2, 1, *expected)
    top, left = [(outer - edge) // 2 for outer, edge in zip(edges, expected)]
    assert torch.equal(inner, kernel[:, :, top:top + expected[0], left:left + expected[1]])


@pytest.mark.parametrize("name", ["auto", *OURS])
def test_taps_out_of_reach_have_a_gradient_of_zero(name):
    kernel = torch.randn(CHANNELS, 1, 47, 5, requires_grad=True)
    depthwise(torch.randn(2, CHANNELS, 14, 14), [kernel], name)[0].square().sum().backward()
    assert kernel.grad.shape == kernel.shape
    reached = kernel.grad.ne(0).flatten(2).any(1)  # any image, any channel
    assert kernel.grad[:, :, 10:37].ne(0).all() and reached.any()
    assert not kernel.grad[:, :, :10].any() and not kernel.grad[:, :, 37:].any()


def test_toeplitz_by_hand():
    kernel = torch.tensor([[1., 10.], [2., 20.], [3., 30.]]).view(1, 1, 3, 2)
    expected = torch.tensor([[2., 3., 0., 20., 30., 0.],
                             [1., 2., 3., 10., 20., 30.],
                             [0., 1., 2., 0., 10., 20.]])
    assert torch.equal(banded.toeplitz(kernel, 3), expected[None])
    assert torch.equal(banded.toeplitz(kernel, 2), expected[None, :2, [0, 1, 3, 4]])


def test_diagonal_sums_by_hand():
    matrix = torch.tensor([[1., 2., 3.],
                           [40., 50., 60.],
                           [700., 800., 900.]])
    expected = torch.tensor([700., 840., 951., 62., 3.])
    assert torch.equal(banded.diagonal_sums(matrix), expected)
    several = banded.diagonal_sums(torch.stack([matrix, 2 * matrix])[:, None])
    assert torch.equal(several, torch.stack([expected, 2 * expected])[:, None])
