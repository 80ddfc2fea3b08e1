"""models/fused/max_pool.py against F.max_pool2d in float64, in Triton's interpreter or, as a script
with the word cuda, on a GPU."""
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.fused import max_pool
from models.fused.max_pool import max_pool2d
from models.layers import MaxPool2d
from tests.kernels import check_comparisons, on_both, tell, traced

FIRST, LAST = torch.contiguous_format, torch.channels_last
# (images, channels, height, width); window, stride, padding
CASES = [((2, 6, 9, 8), (3, 2, 1)), ((1, 70, 7, 5), (3, 2, 1)), ((3, 4, 6, 6), (2, 2, 0)),
         ((1, 2, 5, 7), (5, 1, 2)), ((2, 3, 1, 2), (3, 2, 1)), ((1, 3, 8, 7), (2, 3, 1))]


def compare(x: torch.Tensor, window: tuple[int, int, int]) -> str | None:
    x = x.contiguous(memory_format=LAST).requires_grad_()
    out = max_pool2d(x, *window)
    assert "MaxPool" in type(out.grad_fn).__name__ and "2D" not in type(out.grad_fn).__name__
    gradient = torch.randn(out.shape, device=x.device).to(x.dtype)
    out.backward(gradient)
    twin = x.detach().cpu().double().requires_grad_()
    expected = F.max_pool2d(twin, *window)
    expected.backward(gradient.cpu().double())
    if not torch.equal(out.detach().cpu().double().nan_to_num(7e4), expected.nan_to_num(7e4)):
        return "another maximum"
    if not torch.equal(max_pool2d(x.detach(), *window).nan_to_num(7e4), out.nan_to_num(7e4)):
        return "another maximum where no gradient is recorded"
    if not out.is_contiguous(memory_format=LAST) or not x.grad.is_contiguous(memory_format=LAST):
        return "not channels-last"
    # A pixel adds up the gradients of several windows.
    sizes, = torch.autograd.grad(F.max_pool2d(twin, *window), twin, gradient.cpu().double().abs())
    error = (x.grad.cpu().double() - twin.grad).abs()
    return None if (error <= torch.finfo(x.dtype).eps * sizes).all() else "a gradient"


def failures(device: str) -> list[str]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what empty returns with NaN
    found = []
    for number, (shape, window) in enumerate(CASES):
        dtype = [torch.float32, torch.bfloat16, torch.float16][number % 3]
        x = torch.randn(shape, device=device)
        # Whole numbers make equal ones in a window, of which the first is taken.
        for kind, value in (("random", x), ("equal", x.round())):
            wrong = compare(value.to(dtype), window)
            found += [f"{shape} {window} {dtype}, {kind}: {wrong}"] if wrong else []
    x = torch.randn(1, 2, 6, 6, device=device)
    x[0, 0, 2, 3], x[0, 1, :3] = float("nan"), float("-inf")
    wrong = compare(x, (3, 2, 1))
    return found + ([f"NaN and infinity: {wrong}"] if wrong else [])


@on_both
def test_kernels_equal_the_layer(device):
    check_comparisons(__file__, device)


@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_the_module_is_that_of_pytorch(layout):
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=layout)
    assert torch.equal(MaxPool2d(5, 3, 2)(x), nn.MaxPool2d(5, 3, 2)(x))


def is_fused(*window: int, size: int = 20, layout: torch.memory_format = LAST,
             dtype: torch.dtype = torch.float32) -> bool:
    x = torch.zeros(1, 2, size, size, dtype=dtype).contiguous(memory_format=layout)
    return max_pool2d(x.requires_grad_(), *window) == "kept"


def test_only_what_the_kernels_compute_is_left_to_them(monkeypatch):
    monkeypatch.setattr(max_pool, "has_kernels", lambda device: True)
    monkeypatch.setattr(max_pool.MaxPool, "apply", lambda *inputs: "kept")
    monkeypatch.setattr(max_pool, "pooled", lambda *inputs: ("not kept", None))
    monkeypatch.setattr(F, "max_pool2d", lambda *inputs: "a layer")
    assert all(is_fused(3, 2, 1, dtype=dtype)
               for dtype in (torch.float32, torch.bfloat16, torch.float16))
    with torch.no_grad():
        assert max_pool2d(torch.zeros(1, 1, 9, 9), 3, 2, 1) == "not kept"
    assert is_fused(15, 1, 7) and is_fused(2, 2, 1) and is_fused(3, 1, 1, size=1)
    assert not is_fused(3, 2, 1, dtype=torch.float64) and not is_fused(3, 2, 1, layout=FIRST)
    assert not is_fused(16, 1, 8) and not is_fused(3, 2, 2) and not is_fused(4, 1, 1, size=1)
    for is_traced in traced():
        with is_traced:
            assert not is_fused(3, 2, 1)


if __name__ == "__main__":
    tell(failures(sys.argv[1]))
