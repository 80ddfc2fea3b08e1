"""models/fused: the kernels and the plain layers beside them against float64, gradients included.

Triton's interpreter must be chosen before Triton is imported, so the kernels run in a process of
their own: this file, as a script. It prints one line for each comparison that fails.
"""
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.fused import has_kernels
from models.fused.depthwise import HAS_TUPLES, depthwise_conv2d
from models.fused.layer_norm import layer_norm
from models.layers import DepthwiseConv2d
from tests.kernels import ROOT, check_comparisons, on_both, tell

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # of the maximum
# (images, channels, height, width), kernel
MAPS = [((2, 6, 7, 7), 7), ((3, 34, 5, 6), 3), ((1, 2, 1, 2), 7), ((1, 3, 4, 9), 5),
        ((2, 2, 6, 3), 9)]
# leading shape, true width, width in memory
ROWS = [((3, 5), 12, 16), ((7,), 24, 24), ((2, 2, 3), 249, 256), ((2,), 499, 504), ((1,), 1, 8)]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.detach().cpu().double() - expected).abs().max() / expected.abs().max()).item()


def reference(function, inputs, gradient):
    """The output and the gradients of all inputs but those that are None, in float64."""
    inputs = [value if value is None else value.detach().cpu().double().requires_grad_()
              for value in inputs]
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(
        output, [value for value in inputs if value is not None], gradient.cpu().double())]


def compared(function, inputs, gradient):
    output = function(*inputs)
    return [output, *torch.autograd.grad(
        output, [value for value in inputs if value is not None], gradient)]


def convolution_comparisons(device: str):
    """(what, dtype of the map, got, expected)."""
    for number, (shape, size) in enumerate(MAPS):
        dtype = torch.float16 if number % 2 else torch.bfloat16
        x, gradient = [torch.randn(shape).to(device, dtype).contiguous(
            memory_format=torch.channels_last) for _ in range(2)]
        weight = torch.randn(shape[1], 1, size, size, device=device)
        weight = weight.to(dtype) if number == 2 else weight
        bias = torch.randn(shape[1], device=device) if number % 3 else None
        inputs = [value if value is None else value.requires_grad_() for value in (x, weight, bias)]

        def plain(x, weight, bias=None, size=size):
            return F.conv2d(x, weight, bias, padding=size // 2, groups=len(weight))

        got = compared(depthwise_conv2d, inputs, gradient)
        assert "fused" in type(got[0].grad_fn).__name__, got[0].grad_fn
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        for name, mine, theirs in zip(("output", "of x", "of weight", "of bias"), got,
                                      reference(plain, inputs, gradient)):
            yield f"convolution {shape} {size}: {name}", dtype, mine, theirs


def norm_comparisons(device: str):
    for number, (leading, width, padded) in enumerate(ROWS):
        for dtype in TOLERANCES:
            x, gradient = [F.pad(torch.randn(*leading, width), (0, padded - width)).to(
                device, dtype) for _ in range(2)]
            if number == 2:  # what stands in the padding must not matter
                x[..., width:] = gradient[..., width:] = 7
            affine = [torch.randn(width).to(device, dtype if number % 2 else torch.float32)
                      for _ in range(2)]
            inputs = [value.requires_grad_() for value in (x, *affine)]

            def plain(x, weight, bias, width=width, padded=padded):
                y = F.layer_norm(x[..., :width], (width,), weight, bias, 1e-6)
                return F.pad(y, (0, padded - width))

            got = compared(lambda x, weight, bias, width=width: layer_norm(
                x, weight, bias, 1e-6, width), inputs, gradient)
            assert "fused" in type(got[0].grad_fn).__name__, got[0].grad_fn
            assert got[0].dtype == x.dtype
            assert not got[0][..., width:].any() and not got[1][..., width:].any()
            for name, mine, theirs in zip(("output", "of x", "of weight", "of bias"), got,
                                          reference(plain, inputs, gradient)):
                if width > 1 or name == "of bias":  # one channel minus its mean is nothing
                    yield f"layer norm {leading} {width}: {name}", dtype, mine, theirs


def compiled_comparisons(device: str):
    """One graph of both operators, and half precision from the convolution to the norm's result."""
    model = nn.Sequential(DepthwiseConv2d(8, 3), Norm(8)).to(device)
    x = torch.randn(2, 8, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
    inputs, results = [x.requires_grad_(), *model.parameters()], []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        with torch.autocast(device, torch.bfloat16):
            output = call(x)
        assert output.dtype == torch.bfloat16
        results.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
    for got, expected in zip(results[1], results[0]):
        assert got.dtype == expected.dtype
        yield "compiled", torch.float32, got, expected.detach().cpu().double()


def second_derivatives(device: str) -> list[str]:
    """Which layers give one, which could only be wrong."""
    x = torch.randn(1, 8, 5, 5, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    found = []
    for layer in (Norm(8), DepthwiseConv2d(8, 3)) if HAS_TUPLES else (Norm(8),):
        gradient, = torch.autograd.grad(layer.to(device)(x).square().sum(), x, create_graph=True)
        try:
            gradient.sum().backward()
        except RuntimeError:
            continue
        found.append(f"{type(layer).__name__} has a second derivative")
    return found


def recorded(device: str) -> list[str]:
    """Kernels of ours that torch.export or the tracer wrote down for other programs."""
    x = torch.randn(1, 8, 5, 5, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(DepthwiseConv2d(8, 3), Norm(8)).to(device, torch.bfloat16)
    exported = torch.export.export(model, (x,), strict=False).graph.nodes
    nodes = [str(node.target) for node in exported]
    nodes += [node.kind() for node in torch.jit.trace(model, x).inlined_graph.nodes()]
    assert len(nodes) > 10
    return [f"recorded: {node}" for node in nodes if "fused" in node]


def needlessly_kept(device: str) -> list[str]:
    """A graph keeps what its backward pass reads, and no other input."""
    x, weight, bias = [torch.ones(8, device=device, requires_grad=True) for _ in range(3)]
    left = weakref.ref(bias := bias.clone())
    y = layer_norm(x[None], weight, bias, 1e-6)
    del bias
    return [f"{y.grad_fn} keeps the bias"] if left() is not None else []


class Norm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x.permute(0, 2, 3, 1), self.weight, self.bias, self.eps)


def failures(device: str) -> list[str]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what empty returns with NaN
    found, worst = [], dict.fromkeys(TOLERANCES, 0.0)
    comparisons = [*norm_comparisons(device)]
    if HAS_TUPLES:
        comparisons += [*convolution_comparisons(device), *compiled_comparisons(device)]
    for what, dtype, got, expected in comparisons:
        error = relative_error(got, expected)
        worst[dtype] = max(worst[dtype], error)
        if not error <= TOLERANCES[dtype]:  # NaN, where something was left unwritten, fails
            found.append(f"{what} in {dtype}: error {error:.1e}")
    print("largest errors:", worst)
    return found + second_derivatives(device) + recorded(device) + needlessly_kept(device)


def test_rows_in_patch_order():
    x, weight, bias = torch.randn(2, 5, 4, 6), torch.randn(6), torch.randn(6)
    rows = layer_norm(x, weight, bias, 1e-6)
    patches = layer_norm(x, weight, bias, 1e-6, patch=2)
    assert patches.shape == (2, 2, 2, 24)
    assert torch.equal(patches[1, 1, 0], rows[1, 2:4, :2].flatten())


@on_both
def test_kernels_equal_plain_layers(device):
    check_comparisons(__file__, device)


# Where no kernel runs

plain_cpu = pytest.mark.skipif(has_kernels(torch.device("cpu")), reason="interpreted")


@plain_cpu
def test_layers_on_a_cpu_are_pytorchs_to_the_bit():
    x = torch.randn(2, 8, 6, 6)
    ours, plain = DepthwiseConv2d(8, 5), nn.Conv2d(8, 8, 5, padding=2, groups=8)
    plain.load_state_dict(ours.state_dict())
    weight, bias = torch.randn(6), torch.randn(6)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(ours(x), plain(x))
            for rows in (x, x.bfloat16()):
                assert torch.equal(layer_norm(rows, weight, bias, 1e-6),
                                   F.layer_norm(rows, (6,), weight, bias, 1e-6))


@plain_cpu
def test_padded_norm_of_plain_pytorch():
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    weight, bias = [torch.randn(13, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    y = layer_norm(x, weight, bias, 1e-6, 13)
    assert torch.equal(y[:, :13], F.layer_norm(x[:, :13], (13,), weight, bias, 1e-6))
    assert not y[:, 13:].any()
    y.sum().backward()
    assert not x.grad[:, 13:].any() and (bias.grad == 3).all()


@plain_cpu
def test_plain_layers_are_one_graph():
    model = nn.Sequential(DepthwiseConv2d(8, 3), Norm(8))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(compiled(x), model(x))


def test_wrong_shapes_are_named():
    x = torch.zeros(1, 8, 4, 4)
    for call in (lambda: depthwise_conv2d(x, torch.zeros(8, 1, 3, 5)),
                 lambda: depthwise_conv2d(x, torch.zeros(8, 1, 4, 4)),
                 lambda: depthwise_conv2d(x, torch.zeros(4, 1, 3, 3)),
                 lambda: layer_norm(x, torch.ones(5), torch.ones(5), 1e-6),
                 lambda: layer_norm(x, torch.ones(5), torch.ones(5), 1e-6, 5),
                 lambda: layer_norm(x, torch.ones(3), torch.ones(4), 1e-6, 3)):
        with pytest.raises(ValueError, match="got"):
            call()


def test_missing_triton_leaves_plain_layers():
    code = ("import sys; sys.modules['triton'] = None; import torch\n"
            "from models.fused.depthwise import depthwise_conv2d\n"
            "from models.fused.layer_norm import layer_norm\n"
            "y = depthwise_conv2d(torch.ones(1, 4, 3, 3), torch.ones(4, 1, 3, 3))\n"
            "print(y[0, 0, 1, 1].item(), layer_norm(y, torch.ones(3), torch.ones(3), 1e-6).shape)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert run.stdout == "9.0 torch.Size([1, 4, 3, 3])\n", run.stderr


if __name__ == "__main__":
    tell(failures(sys.argv[1]))
