"""models/fused/mlp.py against the layers that it replaces, in float64, and in frozen networks.

Triton's interpreter must be chosen before Triton is imported, so the kernel runs in a process of
its own: this file, as a script. It prints comparisons that fail; asserts stand beside them.
"""
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from models.convnext import ConvNeXt, ConvNeXtV2
from models.distiller import FrozenTeacher
from models.fused import jit, mlp, tl, wide_mlp
from models.fused.gelu import gelu
from models.large_kernel.operator import set_backend
from models.slak import SLaK
from tests.kernels import check_comparisons, on_both, tell

# Of the norm. The interpreter cuts off what bfloat16 does not hold, where a GPU rounds.
TOLERANCES = {torch.bfloat16: 1.2e-2, torch.float16: 1.2e-3}
# (images, channels in memory, height, width), true channels: tiles not filled by positions, by
# channels or by hidden ones
MAPS = [((3, 16, 7, 9), 10), ((1, 128, 4, 4), 124), ((2, 24, 8, 8), 24), ((1, 136, 3, 5), 130)]
# of wide_mlp, and by how much the mean of y is moved, which it subtracts behind the product
WIDE = [((9, 264, 5, 3), 259, 0.0), ((1, 320, 3, 5), 320, 30.0)]
HAS_WIDE = wide_mlp.TensorDescriptor is not None


@jit
def gelu_kernel(out, x, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, gelu(tl.load(x + place)))


def gelu_error(device: str) -> float:
    """Absolute below 1 and relative above."""
    values = torch.cat([torch.linspace(-14, 14, 2 ** 14), torch.linspace(-6e4, 6e4, 2 ** 14)])
    out = torch.empty_like(values, device=device)
    gelu_kernel[(2,)](out, values.to(device), BLOCK=2 ** 14)
    wide = values.double()
    expected = wide * torch.special.erfc(-wide / 2 ** 0.5) / 2
    return ((out.cpu().double() - expected).abs() / expected.abs().clamp(min=1)).max().item()


def reference(x, y, weight1, bias1, weight2, bias2, eps, width):
    """In float64, of maps (N, C, H, W)."""
    x, y, weight1, bias1, weight2, bias2 = [
        value.cpu().double() for value in (x, y, weight1, bias1, weight2, bias2)]
    y = F.layer_norm(y.permute(0, 2, 3, 1)[..., :width], (width,), eps=eps)
    y = F.gelu(F.linear(F.pad(y, (0, x.shape[1] - width)), weight1, bias1))
    return x + F.linear(y, weight2, bias2).permute(0, 3, 1, 2)


def inputs_of(shape, width: int, dtype: torch.dtype, device: str):
    """x, y and weights, zeros behind `width` but in y, where they must not matter."""
    channels = shape[1]
    own = (torch.arange(channels) < width).view(-1, 1, 1)
    x, y = [(torch.randn(shape) * 0.3 + 0.2) * own + shift * ~own for shift in (0, 7)]
    weight1 = torch.randn(4 * channels, channels) / width ** 0.5 * own.view(1, -1)
    weight2 = torch.randn(channels, 4 * channels) / width ** 0.5 * own.view(-1, 1)
    biases = torch.randn(4 * channels), torch.randn(channels) * own.flatten()
    return [value.to(device, dtype).contiguous(
        memory_format=torch.channels_last if value.dim() == 4 else torch.contiguous_format)
        for value in (x, y, weight1, biases[0], weight2, biases[1])]


def comparisons(device: str):
    """(what, dtype, got, expected)."""
    for shape, width in MAPS:
        for dtype in TOLERANCES:
            x, y, *weights = inputs_of(shape, width, dtype, device)
            expected = reference(x, y, *weights, 1e-6, width)
            # a map of half the memory is neither of the layouts
            for what, same in (("last", y), ("first", y.contiguous()), ("cut", torch.cat(
                    [y, y], 3)[..., :shape[3]])):
                got = mlp.mlp(x, same, *weights, 1e-6, width)
                assert got.dtype == dtype and not got[:, width:].any()
                assert got.is_contiguous(memory_format=torch.channels_last)
                yield f"{shape} {width} {what}", dtype, got, expected


def wide_comparisons(device: str):
    if not HAS_WIDE:
        print("wide blocks are not compared: this Triton has no TensorDescriptor")
    for shape, width, shift in WIDE if HAS_WIDE else ():
        for dtype in TOLERANCES:
            x, y, *weights = inputs_of(shape, width, dtype, device)
            y += shift
            got = mlp.mlp(x, y.contiguous(), *weights, 1e-6, width)
            assert got.dtype == dtype and not got[:, width:].any()
            assert got.is_contiguous(memory_format=torch.channels_last)
            yield f"{shape} {width}", dtype, got, reference(x, y, *weights, 1e-6, width)


NETWORKS = {  # and how many of their blocks one kernel takes: 264 channels are too many
    "slak": (lambda: SLaK(4, (1,), (10,), (5, 3), 1.0, layer_scale_init=1.0), 1),
    "convnext": (lambda: ConvNeXt(4, (1, 1, 1), (10, 24, 264), layer_scale_init=1.0), 2),
    "wide": (lambda: ConvNeXt(4, (1,), (264,), layer_scale_init=1.0), 0),
    "convnextv2": (lambda: ConvNeXtV2(4, (1, 1), (8, 16)), 0)}


def frozen(name: str, dtype: torch.dtype, device: str) -> FrozenTeacher:
    """With weights at which every block matters."""
    network = NETWORKS[name][0]()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    network = FrozenTeacher(network, (0.0,) * 3, (1.0,) * 3, dtype=dtype).to(device)
    if name == "slak":
        set_backend("triton", network)  # which gives contiguous maps
    return network


def network_comparisons(device: str):
    """Frozen networks with the kernel and without."""
    images = torch.randn(1, 3, 32, 32, device=device)
    for name, dtype in (("slak", torch.bfloat16), ("convnext", torch.float16),
                        ("convnext", torch.bfloat16), ("convnextv2", torch.float16),
                        ("wide", torch.float16)):
        network = frozen(name, dtype, device)
        compiled = torch.compile(network._run, fullgraph=True, backend="aot_eager")
        with mock.patch.object(mlp, "can_fuse", return_value=False):
            expected = network.forward_with_features(images)
        for what, run in (("eager", network._run), ("compiled", compiled)):
            with (mock.patch.object(mlp.forward_kernel, "run", wraps=mlp.forward_kernel.run
                                    ) as kernel,
                  mock.patch.object(wide_mlp, "launch", wraps=wide_mlp.launch) as products,
                  mock.patch.object(wide_mlp, "FEWEST", 1 if name == "wide" else wide_mlp.FEWEST),
                  torch.no_grad()):
                got = run(images)
            assert kernel.call_count == NETWORKS[name][1], (name, what, kernel.call_count)
            assert products.call_count == (name == "wide" and HAS_WIDE), (name, what)
            if kernel.called:  # what the large kernel's backend makes need not be turned
                assert kernel.call_args.kwargs["Y_LAST"] == (name != "slak")
            for one, other in zip([got.logits, *got.features],
                                  [expected.logits, *expected.features]):
                yield f"{name}, {what}", dtype, one, other.cpu().double()


def failures(device: str) -> list[str]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what empty returns with NaN
    found, worst = [], dict.fromkeys(TOLERANCES, 0.0)
    error = gelu_error(device)
    if not error < 1.5e-7:
        found.append(f"GELU: error {error:.1e}")
    for what, dtype, got, expected in (*comparisons(device), *network_comparisons(device),
                                       *wide_comparisons(device)):
        error = ((got.cpu().double() - expected).norm() / expected.norm()).item()
        worst[dtype] = max(worst[dtype], error)
        if not error <= TOLERANCES[dtype]:  # NaN, where something was left unwritten, fails
            found.append(f"{what} in {dtype}: error {error:.1e}")
    print("largest errors:", worst)
    return found


@on_both
def test_kernel_equals_plain_layers(device):
    check_comparisons(__file__, device)


@pytest.fixture
def _fits(monkeypatch):
    """A device that suits: what is left are the map and the layers."""
    monkeypatch.setattr(mlp, "suits", lambda device: True)


def can_fuse(channels: int = 16, dtype: torch.dtype = torch.bfloat16, *, hidden: int = 4,
             weights: torch.dtype | None = None, learns: bool = False, images: int = 1) -> bool:
    x = torch.zeros(1, dtype=dtype).expand(images, channels, 64, 64)
    weight = torch.zeros(hidden * channels, channels, dtype=weights or dtype)
    return mlp.can_fuse(x, weight, [weight, torch.zeros(3, requires_grad=learns)])


def test_only_what_the_kernel_computes_is_left_to_it(_fits):
    assert can_fuse() and can_fuse(mlp.WIDEST, torch.float16)
    assert not can_fuse(10) and not can_fuse(hidden=2)
    assert not can_fuse(dtype=torch.float32) and not can_fuse(weights=torch.float32)
    with torch.autocast("cpu", torch.float16):
        assert not can_fuse() and can_fuse(dtype=torch.float16)
    assert not can_fuse(learns=True)
    with torch.no_grad():
        assert can_fuse(learns=True)
        with mock.patch.object(torch.jit, "is_tracing", return_value=True):
            assert not can_fuse()


def test_wide_blocks_are_fused_where_there_are_many_positions(_fits, monkeypatch):
    monkeypatch.setattr(wide_mlp, "TensorDescriptor", object)
    monkeypatch.setattr(wide_mlp, "FEWEST", 2 * 64 * 64)
    assert can_fuse(264, images=2) and not can_fuse(264) and not can_fuse(260, images=2)
    assert can_fuse(mlp.WIDEST) and not can_fuse(wide_mlp.WIDEST + 8, images=2)
    monkeypatch.setattr(wide_mlp, "TensorDescriptor", None)
    assert not can_fuse(264, images=2)


def test_blocks_of_other_layers_stay_as_they_are(_fits, monkeypatch):
    monkeypatch.setattr(mlp, "launch", lambda x, *others: torch.full_like(x, 7))
    images = torch.randn(1, 3, 32, 32)
    for network, is_absorbed, is_left in (
            (ConvNeXt(4, (1,), (8,)), True, True), (ConvNeXt(4, (1,), (8,)), False, False),
            (ConvNeXtV2(4, (1,), (8,)), True, False)):
        if is_absorbed:
            network.stages[0][0].absorb_scales()
        network.eval().to(torch.bfloat16)
        with torch.no_grad():
            x = network.downsample_layers[0](images.bfloat16())
            assert (network.stages[0](x) == 7).all() == is_left
            network.load_state_dict(network.state_dict())
            assert (network.stages[0](x) != 7).any()
            network.train()
            assert (network.stages[0](x) != 7).any()


@pytest.mark.skipif(not HAS_WIDE, reason="no TensorDescriptor")
def test_the_copy_engine_gets_addresses_that_are_multiples_of_16():
    memory = torch.randn(8 * 16 + 1).half()
    aligned, shifted = memory[:-1].view(8, 16), memory[1:].view(8, 16)
    assert wide_mlp._blocks(aligned, 4, 16).base is aligned
    found = wide_mlp._blocks(shifted, 4, 16).base
    assert found.data_ptr() % 16 == 0 and torch.equal(found, shifted)


if __name__ == "__main__":
    tell(failures(sys.argv[1]))
