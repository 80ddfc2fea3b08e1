"""models/fused/block: the kernels against float64, gradients included, by themselves and within
ConvNeXt's blocks.

Triton's interpreter must be chosen before Triton is imported, so the kernels run in a process of
their own: this file, as a script. It prints comparisons that fail; asserts stand beside them.
"""
import sys
import weakref
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.convnext import ConvNeXtBlock
from models.fused import block as fused
from models.fused import has_kernels
from models.layers import DepthwiseConv2d, pad_to
from tests.kernels import check_comparisons, on_both, tell, traced

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the maximum
# images, height, width, true channels, channels in memory; with the tiles of models/fused/block the
# first has several columns of them, the second many rows.
SIZES = [(2, 3, 7, 259, 264), (3, 17, 19, 5, 8), (1, 2, 3, 24, 24), (2, 1, 1, 1, 1)]
EXACT = torch.float64


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.detach().cpu().double() - expected).abs().max() / expected.abs().max()).item()


def gradients(function, inputs, gradient):
    """What function gives, and the gradients of all inputs but those that are None."""
    output = function(*inputs)
    wanted = [value for value in inputs if value is not None]
    return [output, *torch.autograd.grad(output, wanted, gradient)]


def compared(what, function, plain, inputs, dtype):
    """(what, got, expected) of function, by which `dtype` is given, and of `plain` in float64."""
    exact = [None if value is None else value.detach().cpu().double().requires_grad_()
             for value in inputs]
    output = function(*inputs)
    assert output.dtype == dtype, output.dtype
    gradient = torch.randn(output.shape).to(dtype)
    if what.endswith("turned"):
        gradient = gradient.contiguous()
    elif gradient.dim() == 4 and "add" in what:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
    got = gradients(function, inputs, gradient.to(output.device))
    names = ["output", *[f"of input {i}" for i, value in enumerate(inputs) if value is not None]]
    for name, mine, theirs in zip(names, got, gradients(plain, exact, gradient.double())):
        yield f"{what}: {name}", mine, theirs.detach()


def padded(width: int, channels: int, *leading: int) -> torch.Tensor:
    return F.pad(torch.randn(*leading, width), (0, channels - width))


def gelu_comparisons(device: str):
    for number, (images, height, long, width, channels) in enumerate(SIZES):
        for dtype in TOLERANCES:
            h = padded(width, channels, images, height, long)
            h[0, 0, 0, :min(width, 3)] = torch.tensor([40.0, -40.0, -4.0])[:min(width, 3)]
            bias = torch.randn(width).to(device, dtype if number % 2 else torch.float32)
            inputs = [h.to(device, dtype).requires_grad_(), bias.requires_grad_()]

            def plain(h, bias, width=width):
                return F.pad(F.gelu(h[..., :width] + bias), (0, h.shape[-1] - width))

            yield from compared(f"gelu {width} {dtype}", fused.bias_gelu, plain, inputs, dtype)


def add_comparisons(device: str):
    cases = [  # dtypes of x and y, whether scaled, kept images
        (torch.float32, torch.bfloat16, True, (1, 0, 1)), (torch.float32, torch.float32, True, ()),
        (torch.bfloat16, torch.bfloat16, False, (0, 1, 1)),
        (torch.float16, torch.float16, True, (1, 1, 1)), (torch.float32, torch.float16, False, ())]
    for size, (images, height, long, width, channels) in enumerate(SIZES):
        for number, (of_x, of_y, is_scaled, kept) in enumerate(cases):
            x, y = [padded(width, channels, images, height, long).to(device, dtype)
                    for dtype in (of_x, of_y)]
            bias, gamma = [torch.randn(width, device=device) for _ in range(2)]
            inputs = [x.permute(0, 3, 1, 2), y, bias, gamma if is_scaled else None]
            inputs = [value if value is None else value.requires_grad_() for value in inputs]
            kept = torch.tensor(kept[:images], device=device).bool().view(-1, 1, 1, 1)
            share = kept.cpu().double() / 0.75 if len(kept) else 1.0

            def function(x, y, bias, gamma, kept=kept):
                return fused.add_branch(x, y, bias, gamma, kept if len(kept) else None, 0.75)

            def plain(x, y, bias, gamma, share=share):
                gamma = torch.ones_like(bias) if gamma is None else gamma
                bias, gamma = pad_to(bias, y.shape[-1]), pad_to(gamma, y.shape[-1])
                return x + share * (gamma * (y + bias)).permute(0, 3, 1, 2)

            dtype = torch.float32 if is_scaled else torch.promote_types(of_x, of_y)
            what = f"add {width} {of_x} {of_y} {'turned' if (size + number) % 2 else 'last'}"
            yield from compared(what, function, plain, inputs, dtype)


def block_comparisons(device: str):
    """Whole blocks, and the same in float64, which takes the plain layers; both drop the branches
    of the same images. A width of 6 in 8 channels."""
    for grn, channels, half in ((False, 8, None), (True, 8, None), (False, 8, torch.bfloat16)):
        block = ConvNeXtBlock(6, "mixer", DepthwiseConv2d(6, 3), drop_path=0.5, grn=grn,
                              layer_scale_init=0.0 if grn else 1.0).train()
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.5)
        exact, block = deepcopy(block).double(), block.to(device)
        x = padded(6, channels, 8, 3, 4).permute(0, 3, 1, 2)
        gradient = padded(6, channels, 8, 3, 4).permute(0, 3, 1, 2)
        results = []
        for network, place, dtype in ((block, device, torch.float32), (exact, "cpu", EXACT)):
            inputs = [x.to(place, dtype).requires_grad_(), *network.parameters()]
            torch.manual_seed(6)
            if place == "cuda":  # whose generator is another
                drawn = network.drop_path.draw(inputs[0]).cpu()
                exact.drop_path.draw = lambda _, drawn=drawn: drawn
                torch.manual_seed(6)
            with torch.autocast(place, half or torch.bfloat16, enabled=half is not None):
                output = network(inputs[0])
            is_fused = type(output.grad_fn).__name__ == "_AddBranchBackward"
            assert is_fused == (dtype != EXACT), output.grad_fn
            results.append([output, *torch.autograd.grad(output, inputs,
                                                         gradient.to(place, dtype))])
        assert not results[0][0][:, 6:].any() and not results[0][1][:, 6:].any()
        names = ["output", "of x", *[name for name, _ in block.named_parameters()]]
        for name, got, expected in zip(names, *results):
            assert got.dtype == torch.float32
            yield f"block {channels} {grn} {half or 'float32'}: {name}", got, expected.detach()


def tolerance(what: str, dtype: torch.dtype) -> float:
    if what.startswith("block"):  # in autocast its values are rounded in between
        return 4e-2 if "bfloat16" in what else 1e-5
    return TOLERANCES[dtype]


def watched_and_foreign_layers(device: str) -> list[str]:
    """A layer with a hook is called, and so is one that is not the block's own."""
    found = []
    for name in ("act", "pwconv1", "drop_path"):
        block = ConvNeXtBlock(8, "mixer", DepthwiseConv2d(8, 3), drop_path=0.0,
                              layer_scale_init=1.0).to(device)
        calls = []
        block.get_submodule(name).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        foreign = deepcopy(block)
        foreign.get_submodule(name)._forward_hooks.clear()
        foreign.act = nn.Tanh()
        x = torch.randn(1, 8, 4, 4, device=device, requires_grad=True).contiguous(
            memory_format=torch.channels_last)
        outputs = block(x), foreign(x)
        if len(calls) != 1 or torch.allclose(*outputs):
            found.append(f"{name}: called {len(calls)} times, tanh {torch.allclose(*outputs)}")
    return found


def kept_and_derived(device: str) -> list[str]:
    """What a graph keeps without need, and second derivatives, which could only be wrong."""
    found = []
    x, y, bias = [torch.ones(size, device=device, requires_grad=True)
                  for size in ((1, 8, 2, 2), (1, 2, 2, 8), (8,))]
    product = y * 1
    left = weakref.ref(product)
    output = fused.add_branch(x, product, bias, None, None, 1.0)
    del product
    if left() is not None:
        found.append(f"{output.grad_fn} keeps a product")
    for result in (output, fused.bias_gelu(y, bias)):
        gradient, = torch.autograd.grad(result.square().sum(), bias, create_graph=True)
        try:
            gradient.sum().backward()
        except RuntimeError:
            continue
        found.append(f"{result.grad_fn} has a second derivative")
    return found


def failures(device: str) -> list[str]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what empty returns with NaN
    found, worst = [], {}
    for comparisons in (gelu_comparisons, add_comparisons, block_comparisons):
        for what, got, expected in comparisons(device):
            if not expected.any():
                assert not got.any(), what
                continue
            error, bound = relative_error(got, expected), tolerance(what, got.dtype)
            worst[comparisons.__name__] = max(worst.get(comparisons.__name__, 0), error / bound)
            if not error <= bound:  # NaN, where something was left unwritten, fails
                found.append(f"{what}: error {error:.1e}")
    print("largest share of the tolerance:", worst)
    return found + watched_and_foreign_layers(device) + kept_and_derived(device)


@on_both
def test_kernels_equal_plain_layers(device):
    check_comparisons(__file__, device)


@pytest.mark.skipif(has_kernels(torch.device("cpu")), reason="interpreted")
def test_plain_layers_where_no_kernel_runs():
    x = torch.randn(1, 8, 4, 4, requires_grad=True).contiguous(memory_format=torch.channels_last)
    assert not fused.can_fuse(x)
    block = ConvNeXtBlock(8, "mixer", DepthwiseConv2d(8, 3), drop_path=0.0, layer_scale_init=1.0)
    assert "AddBranch" not in type(block(x).grad_fn).__name__


def map_of(channels: int = 8, layout: torch.memory_format = torch.channels_last,
           dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, channels, 4, 3).to(dtype).contiguous(memory_format=layout)


def test_only_what_the_kernels_compute_is_left_to_them(monkeypatch):
    monkeypatch.setattr(fused, "has_kernels", lambda device: True)
    x = map_of().requires_grad_()
    assert fused.can_fuse(x) and not fused.can_fuse(x.detach())
    for dtype in (torch.bfloat16, torch.float16):
        assert fused.can_fuse(map_of(dtype=dtype).requires_grad_())
    for other in (map_of(dtype=torch.float64), map_of(12), map_of(layout=torch.contiguous_format)):
        assert not fused.can_fuse(other.requires_grad_())
    with torch.no_grad():
        assert not fused.can_fuse(x)
    for is_traced in traced():
        with is_traced:
            assert not fused.can_fuse(x)


def test_a_fork_casts_the_branch_and_adds_its_gradient():
    x = map_of().requires_grad_()
    assert all(one is x for one in fused.fork(x))
    with torch.autocast("cpu", torch.bfloat16):
        kept, cast = fused.fork(x)
        assert all(one is cast for one in fused.fork(cast))
    assert kept.grad_fn is cast.grad_fn is not None
    assert torch.equal(kept, x) and torch.equal(cast, x.bfloat16()) and kept.dtype == x.dtype
    gradients = map_of(), map_of(dtype=torch.bfloat16)
    found, = torch.autograd.grad([kept, cast], x, gradients)
    assert found.dtype == x.dtype and torch.equal(found, gradients[0] + gradients[1])


if __name__ == "__main__":
    tell(failures(sys.argv[1]))
