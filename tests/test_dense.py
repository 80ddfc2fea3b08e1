"""models/large_kernel/dense.py, and the tables and layouts under it, against PyTorch in float64.

Triton's interpreter must be chosen before Triton is imported, so its part runs in a process of its
own: this file, as a script.
"""
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.large_kernel import layout
from models.large_kernel.dense import BACKEND, LARGEST_MAP
from models.large_kernel.operator import BACKENDS, choose, depthwise, set_backend
from models.slak import LargeKernel
from tests.kernels import SUCCESS, needs_triton, run_script, tell

# Of the maximum. Triton's interpreter cuts bfloat16 off where processors round.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.2e-2,
              torch.float16: 2e-3}
# images, channels, (height, width), kernels
CASES = [(3, 2, (7, 7), ((13, 5), (5, 13), (5, 5))),
         (9, 3, (14, 14), ((51, 5), (5, 51), (5, 5))),
         (2, 8, (1, 1), ((51, 5), (5, 5))),
         (2, 2, (4, 9), ((3, 1), (7, 9), (61, 3), (5, 5)))]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


def largest_error(case, dtype: torch.dtype, memory_format: torch.memory_format) -> float:
    num_images, channels, size, sizes = case
    torch.manual_seed(0)
    x, *gradients = [torch.randn(num_images, channels, *size).to(dtype).contiguous(
        memory_format=memory_format) for _ in (None, *sizes)]
    kernels = [torch.randn(channels, 1, *edges).to(dtype).float() for edges in sizes]
    if dtype == torch.float64:
        kernels = [kernel.double() for kernel in kernels]
    bias = torch.randn(channels).to(dtype)
    leaves = [tensor.double().clone().requires_grad_() for tensor in (x, *kernels)]
    outputs = [F.conv2d(leaves[0], kernel, padding=(kernel.shape[2] // 2, kernel.shape[3] // 2),
                        groups=channels) for kernel in leaves[1:]]
    expected = torch.autograd.grad(outputs, leaves, [g.double() for g in gradients])
    of_x, of_kernels = BACKEND.backward(x, gradients, kernels)
    total = BACKEND.total(x, kernels, BACKEND.prepare(x, kernels), bias)
    found = [*BACKEND.outputs(x, kernels), of_x, *of_kernels, total]
    expected = [*outputs, *expected, sum(outputs) + bias.double().view(-1, 1, 1)]
    assert {y.dtype for y in (found[0], of_x, total)} == {dtype}
    assert {g.dtype for g in of_kernels} == {torch.promote_types(dtype, torch.float32)}
    return max(relative_error(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_maps_and_gradients_equal_pytorchs_in_float64(dtype, case):
    for memory_format in (torch.channels_last, torch.contiguous_format):
        assert largest_error(case, dtype, memory_format) <= TOLERANCES[dtype]


def test_only_the_wanted_gradient_costs_a_product(monkeypatch):
    calls, real = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *factors: calls.append(0) or real(*factors))
    x, kernel = torch.randn(2, 3, 7, 7), torch.randn(3, 1, 5, 5)
    for wanted, products in (((True, False), 1), ((False, True), 1), ((True, True), 2)):
        calls.clear()
        found = BACKEND.backward(x, [x], [kernel], of_input=wanted[0], of_kernels=wanted[1])
        assert len(calls) == products and [part is not None for part in found] == list(wanted)


def test_gradients_of_kernels_are_the_same_each_time():
    x, gradient, kernel = torch.randn(4, 3, 7, 7), torch.randn(4, 3, 7, 7), torch.randn(3, 1, 5, 5)
    first, second = [BACKEND.backward(x, [gradient], [kernel])[1][0] for _ in range(2)]
    assert torch.equal(first, second)


def test_channels_without_a_kernel_give_zeros():
    x, kernels = torch.randn(2, 5, 7, 7, requires_grad=True), [torch.randn(3, 1, 5, 5)] * 2
    kernels = [kernel.clone().requires_grad_() for kernel in kernels]
    for backend in ("dense", "conv", "banded", "torch"):
        maps = depthwise(x, kernels, backend)
        expected = F.conv2d(x[:, :3], kernels[1], padding=2, groups=3)
        assert relative_error(maps[1][:, :3], expected.double()) < 1e-5
        assert not maps[1][:, 3:].any()
        gradient, *of_kernels = torch.autograd.grad(sum(maps).square().sum(), [x, *kernels])
        assert not gradient[:, 3:].any() and of_kernels[0].shape == kernels[0].shape


def test_auto_takes_it_for_small_maps_in_half_precision_on_a_gpu(monkeypatch):
    monkeypatch.setattr(type(BACKENDS["triton"]), "why_not", lambda backend, device: None)
    cuda, kernels = torch.device("cuda"), [torch.empty(2, 1, 13, 5, device="meta")]
    for dtype, pixels, is_dense in ((torch.bfloat16, 49, True), (torch.float16, LARGEST_MAP, True),
                                    (torch.bfloat16, LARGEST_MAP + 1, False),
                                    (torch.bfloat16, None, False), (torch.float32, 49, False)):
        assert (choose("auto", cuda, dtype, kernels, pixels) == "dense") is is_dense
    assert choose("auto", torch.device("cpu"), torch.bfloat16, kernels, 49) == "conv"


def test_a_large_map_is_left_to_auto():
    kernels = [torch.empty(2, 1, 13, 5)]
    assert choose("dense", torch.device("cpu"), torch.float32, kernels, LARGEST_MAP) == "dense"
    assert choose("dense", torch.device("cpu"), torch.float32, kernels, LARGEST_MAP + 1) == "conv"


def failures() -> list[str]:
    found = []
    for case, dtype in ((CASES[0], torch.bfloat16), (CASES[3], torch.float32)):
        error = largest_error(case, dtype, torch.channels_last)
        if not error <= TOLERANCES[dtype]:
            found.append(f"{case} in {dtype}: error {error:.1e}")
    for shape in ((2, 70, 3, 5), (1, 8, 9, 8), (3, 1, 4, 4)):
        x = torch.randn(shape)
        there = layout.to_channels_last(x)
        back = layout.to_contiguous(there)
        if not (torch.equal(there, x) and torch.equal(back, x) and back.is_contiguous()
                and layout.is_channels_last(there)):
            found.append(f"layout of {shape}")
    return found


@needs_triton
def test_interpreted_kernels_equal_the_plain_path():
    printed = run_script(__file__, TRITON_INTERPRET="1")
    assert SUCCESS in printed, printed


def test_a_compiled_training_step_gets_gradients_of_its_own():
    """Gradients of the kernels are parts of one tensor; an operator's outputs may not be."""
    maps = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = LargeKernel(8, 7, 3, decomposed=True, bn=True)
        set_backend("dense", layer)
        call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        call(torch.ones(2, 8, 6, 6)).square().sum().backward()
        maps.append([parameter.grad for parameter in layer.parameters()])
    for eager, found in zip(*maps):
        torch.testing.assert_close(found, eager)


if __name__ == "__main__":
    tell(failures())
