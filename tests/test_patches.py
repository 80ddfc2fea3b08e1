"""The stem and the down-sampling of models/layers as products of patches, against the layers in
float64, gradients included. The kernels run in a process of their own, as in
tests/test_fused_layers.py: this file, as a script.
"""
import copy
import sys

import pytest
import torch
from torch import nn

from models import layers as of_models
from models.convnext import ConvNeXt
from models.fused import layer_norm, stem
from models.layers import Conv2d, LayerNorm2d, down_sampled, pad_to
from tests.helpers import MICRO, fill_by_name
from tests.kernels import check_comparisons, on_both, tell

TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the maximum
# (images, height, width), own channels, channels in memory. Not all rows fill a patch, and not all
# patches a tile.
STEMS = [((2, 9, 34), 12, 16), ((3, 16, 20), 124, 128), ((1, 4, 4), 130, 136), ((5, 12, 12), 7, 7)]
# own channels and those in memory before, the same after, size, kernel
MAPS = [((6, 8), (9, 16), (2, 7, 5), 2), ((16, 16), (24, 24), (3, 4, 6), 2),
        ((5, 8), (3, 8), (1, 7, 9), 3), ((130, 136), (12, 16), (1, 2, 2), 2)]


def make(is_stem: bool, before: int, after: int, size: int) -> nn.Sequential:
    conv = Conv2d(before, after, size, stride=size)
    norm = LayerNorm2d(after if is_stem else before, eps=1e-6)
    for parameter in (*conv.parameters(), *norm.parameters()):
        nn.init.normal_(parameter, std=0.5)
    layers = nn.Sequential(conv, norm) if is_stem else nn.Sequential(norm, conv)
    return layers.to(memory_format=torch.channels_last)


def rounded(layers: nn.Sequential, dtype: torch.dtype) -> nn.Sequential:
    """In float64, the values those of `dtype`."""
    return copy.deepcopy(layers).cpu().to(dtype).double()


def results(layers: nn.Sequential, x: torch.Tensor, width: int, gradient: torch.Tensor,
            dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The output and all gradients, in autocast of a dtype if one is given."""
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        y = down_sampled(layers, x, width)
    learns = {name: value for name, value in [*layers.named_parameters(), ("x", x)]
              if value.requires_grad}
    found = torch.autograd.grad(y, list(learns.values()), gradient[:, :y.shape[1]].to(y.dtype))
    return {"output": y, **dict(zip(learns, found))}


def differences(what: str, found: dict, expected: dict, dtype: torch.dtype) -> list[str]:
    """NaN, which no tolerance admits, where something was left unwritten."""
    assert found.keys() == expected.keys() and len(found) > 4
    lines = []
    for name, value in expected.items():
        got = found[name].detach().cpu().double()
        if got.shape[1:] != value.shape[1:] and name in ("output", "x"):
            if got[:, value.shape[1]:].any():
                lines.append(f"{what}: {name} is not zero behind its channels")
            got = got[:, :value.shape[1]]
        error = ((got - value).abs().max() / value.abs().max()).item()
        if not error <= TOLERANCES[dtype]:
            lines.append(f"{what} in {dtype}: {name}: error {error:.1e}")
    return lines


def stem_failures(device: str) -> list[str]:
    lines = []
    for number, ((num_images, height, width), own, padded) in enumerate(STEMS):
        for dtype in TOLERANCES:
            layers = make(True, 3, own, 4)
            layout = torch.contiguous_format if number == 1 else torch.channels_last
            images = torch.randn(num_images, 3, height, width).to(dtype).contiguous(
                memory_format=layout)
            gradient = torch.randn(num_images, own, height // 4, width // 4).to(dtype)
            expected = results(rounded(layers, dtype), images.double(), own, gradient.double())
            images = images.float() if number % 2 == 0 else images
            found = results(layers.to(device), images.to(device), padded,
                            pad_to(gradient, num_images, padded).to(device), dtype)
            assert type(found["output"].grad_fn).__name__ == "StemBackward"
            if (found["output"].dtype != dtype or found["0.weight"].dtype != torch.float32
                    or not found["output"].is_contiguous(memory_format=torch.channels_last)):
                lines.append(f"stem {number}: {found['output'].dtype}, another layout or dtype")
            lines += differences(f"stem {number}", found, expected, dtype)
            # Frozen, in half precision throughout, weights stored with their zeros.
            frozen = copy.deepcopy(layers).requires_grad_(False).to(dtype)
            frozen[0].weight.data = pad_to(frozen[0].weight, padded)
            frozen[0].bias.data = pad_to(frozen[0].bias, padded)
            y = down_sampled(frozen, images.to(device, dtype), padded)
            lines += differences(f"frozen stem {number}", {**found, "output": y},
                                 {**expected}, dtype)
    return lines


def map_failures(device: str) -> list[str]:
    lines = []
    for number, ((before, in_memory), (after, padded), shape, size) in enumerate(MAPS):
        for dtype in TOLERANCES:
            layers = make(False, before, after, size)
            num_images, height, width = shape
            x = torch.randn(num_images, before, height, width).to(dtype)
            gradient = torch.randn(num_images, after, height // size, width // size).to(dtype)
            expected = results(rounded(layers, dtype), x.double().requires_grad_(), after,
                               gradient.double())
            x = pad_to(x, num_images, in_memory).to(device).contiguous(
                memory_format=torch.channels_last)
            x = x.float() if number == 1 else x
            found = results(layers.to(device), x.requires_grad_(), padded,
                            pad_to(gradient, num_images, padded).to(device), dtype)
            cut = found["x"][:, :, height // size * size:], found["x"][..., width // size * size:]
            if any(part.any() for part in cut):
                lines.append(f"map {number}: a gradient of what fills no patch")
            if not found["output"].is_contiguous(memory_format=torch.channels_last):
                lines.append(f"map {number}: another layout")
            lines += differences(f"map {number}", found, expected, dtype)
    return lines


def network(device: str) -> tuple[ConvNeXt, torch.Tensor]:
    model = fill_by_name(ConvNeXt(**{**MICRO, "dims": (7, 9, 16, 33)})).to(device)
    return model, torch.randn(2, 3, 38, 33, device=device)


def network_failures(device: str) -> list[str]:
    """What takes the products, and what its layers."""
    model, images = network(device)
    launched, lines = [], []
    launch, stem.launch = stem.launch, lambda *inputs: launched.append(1) or launch(*inputs)
    frozen = copy.deepcopy(model).requires_grad_(False)
    plain = frozen.double()(images.double())

    def check(what: str, is_launched: bool, call) -> None:
        launched.clear()
        with torch.autocast(device, torch.bfloat16):
            logits = call()
        error = (logits.double() - plain).abs().max() / plain.abs().max()
        if bool(launched) != is_launched or not error < 5e-2:
            lines.append(f"{what}: {len(launched)} launches, error {error:.1e}")

    check("network", True, lambda: model(images))
    model.width_multiple = 8
    check("padded network", True, lambda: model(images))
    check("images with a gradient", False, lambda: model(images.clone().requires_grad_()))
    hook = model.downsample_layers[0][1].register_forward_hook(lambda *_: None)
    check("watched", False, lambda: model(images))
    hook.remove()
    check("exported", False, lambda: torch.export.export(model.eval(), (images,),
                                                         strict=False).module()(images))
    check("compiled", False, torch.compile(lambda: model(images), fullgraph=True, backend="eager"))
    stem.launch = launch
    return lines


def failures(device: str) -> list[str]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what empty returns with NaN
    return stem_failures(device) + map_failures(device) + network_failures(device)


@on_both
def test_products_equal_layers(device):
    check_comparisons(__file__, device)


def patches_of(monkeypatch, before: int, width: int, watched: int | None = None) -> list[str]:
    """What a down-sampling calls on a device with kernels; `watched`: its layer with a hook."""
    seen, layers = [], make(False, before, width, 2)
    kernel = layer_norm.layer_norm
    monkeypatch.setattr(of_models, "has_kernels", lambda device: True)
    monkeypatch.setattr(layer_norm, "layer_norm",
                        lambda *inputs: seen.append("kernel") or kernel(*inputs))
    if watched is not None:
        layers[watched].register_forward_hook(lambda *_: seen.append("hook"))
    with torch.autocast("cpu", torch.bfloat16):
        down_sampled(layers, torch.randn(1, before, 4, 4), width)
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("form, seen", [
    ((8, 16), ["kernel"]), ((8, 16, 0), ["hook"]), ((8, 16, 1), ["hook"]), ((12, 16), []),
    ((8, 12), [])], ids=str)
def test_watched_layers_and_widths_of_no_16_bytes_are_left_to_the_layers(form, seen, monkeypatch):
    assert patches_of(monkeypatch, *form) == seen


def test_stems_of_too_many_channels_take_the_layers():
    def can_fuse(channels: int, padded: int) -> bool:
        return stem.can_fuse(torch.zeros(1, 3, 4, 4), torch.zeros(channels, 3, 4, 4),
                             torch.zeros(channels), padded)

    assert can_fuse(stem.WIDEST, stem.WIDEST) and can_fuse(5, 8) and not can_fuse(8, 5)
    assert not can_fuse(5, stem.WIDEST + 8)


if __name__ == "__main__":
    tell(failures(sys.argv[1]))
