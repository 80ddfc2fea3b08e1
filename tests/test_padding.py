"""Networks whose maps are filled up with channels of zeros are the same functions."""
import copy

import pytest
import torch
from torch import Tensor, nn

from models.base import IMAGENET_MEAN, IMAGENET_STD, create_model
from models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtFrame, ConvNeXtV2
from models.distiller import FrozenTeacher
from models.layers import layer_norm, pad_to
from tests.helpers import MICRO, fill_by_name, micro_slak
from tests.test_folding import VARIANTS, draw_images, error_of, relative_error, run

ODD = {**MICRO, "dims": (7, 9, 16, 33)}
MAKERS = {
    **{name: lambda options=options: micro_slak(**{"dims": ODD["dims"], **options})
       for name, options in VARIANTS.items()},
    "multiples of 8": lambda: micro_slak(dims=(8, 16, 24, 32), width_factor=1.0),
    "convnext": lambda: ConvNeXt(**ODD), "convnextv2": lambda: ConvNeXtV2(
        **{key: value for key, value in ODD.items() if key != "layer_scale_init"}),
}
IMAGES = draw_images(2, (64, 64)).double()


def pair(name: str) -> tuple[ConvNeXtFrame, ConvNeXtFrame]:
    plain, padded = [fill_by_name(MAKERS[name]()).double() for _ in range(2)]
    padded.width_multiple = 8
    return plain, padded


def widths_inside(model: ConvNeXtFrame, images: Tensor) -> list[int]:
    """Of every block's result, after checking that what lies behind its own channels is zero."""
    widths = []

    def check(block: ConvNeXtBlock, inputs: tuple, output: Tensor) -> None:
        widths.append(output.shape[1])
        own = block.norm.normalized_shape[0]
        assert not output[:, own:].any() and output[:, :own].any()

    hooks = [module.register_forward_hook(check) for module in model.modules()
             if isinstance(module, ConvNeXtBlock)]
    run(model, images)
    for hook in hooks:
        hook.remove()
    return widths


@pytest.mark.parametrize("name", MAKERS)
def test_outputs_gradients_and_statistics_of_training_are_equal(name):
    results = []
    for model in pair(name):
        model.train()
        leaf = IMAGES.clone().requires_grad_()
        for _ in range(2):  # running statistics of running statistics
            output = model.forward_with_features(leaf)
        score = output.logits.square().sum()
        for feature in output.features:
            score = score + feature.pow(3).mean()
        score.backward()
        results.append([output.logits, *output.features, leaf.grad,
                        *[parameter.grad for parameter in model.parameters()], *model.buffers()])
    for found, expected in zip(*reversed(results), strict=True):
        assert found.shape == expected.shape
        # The response normalisation computes in float32, whatever its input.
        rtol, atol = (1e-4, 1e-6) if name == "convnextv2" else (1e-9, 1e-11)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_outputs_in_evaluation_are_equal(name, fold):
    plain, padded = [model.eval() for model in pair(name)]
    expected = run(plain, IMAGES)
    stored = copy.deepcopy(padded)
    stored.width_multiple = None
    if fold:
        padded.fold(), stored.fold()
    for model in (padded, stored.pad_widths(8), stored):
        assert error_of(run(model, IMAGES), expected) < (1e-6 if name == "convnextv2" else 1e-12)
    widths = widths_inside(padded, IMAGES)
    assert widths == widths_inside(stored, IMAGES) and not any(width % 8 for width in widths)
    if fold:  # every weight has its final shape
        assert all(len(parameter) % 8 == 0 for key, parameter in stored.named_parameters()
                   if key.startswith("stages") and ".grn." not in key and ".norm." not in key)


@pytest.mark.parametrize("name", ["decomposed", "convnext"])
def test_in_float32_and_half_precision(name):
    expected = run(pair(name)[0].eval(), IMAGES)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        for fold in (False, True):
            model = pair(name)[1].float().eval()
            model = model.fold() if fold else model
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                assert error_of(run(model, IMAGES.float()), expected) < tolerance


def test_the_switch_may_be_turned_between_calls():
    model = fill_by_name(micro_slak()).double().eval().fold()
    expected = run(model, IMAGES)
    for multiple in (8, None, 4, 8):
        model.width_multiple = multiple
        assert error_of(run(model, IMAGES), expected) < 1e-12


def test_widths_on_a_cpu_stay_as_they_are():
    model = fill_by_name(micro_slak()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        widths = widths_inside(model, IMAGES.float())
    assert widths == [model.feature_info[stage].channels for stage in (0, 1, 2, 2, 3)]


def test_layer_norm_of_maps_far_from_zero():
    x = 100 + torch.randn(3, 5, 13)
    weight, bias = torch.randn(13), torch.randn(13)
    y = layer_norm(pad_to(x, 3, 5, 16), weight, bias, 1e-6, 13)
    expected = nn.functional.layer_norm(x.double(), (13,), weight.double(), bias.double(), 1e-6)
    assert relative_error(y[..., :13], expected) < 1e-4 and not y[..., 13:].any()


def test_pad_to_is_the_tensor_itself_where_nothing_is_missing():
    x = torch.randn(3, 4, 5)
    assert pad_to(x, 3) is x and pad_to(x, 3, 4, 5) is x
    y = pad_to(x, 4, 6)
    assert y.shape == (4, 6, 5) and y[:3, :4].equal(x) and y.count_nonzero() == x.count_nonzero()


# A teacher in half precision throughout

FAMILIES = ("slak_nano", "convnext_bn_nano", "convnext_nano", "convnextv2_nano", "resnet_nano",
            "resnet_d_nano", "efficientnet_nano", "mobilenetv3_nano", "swin_nano", "vit_nano",
            "cswin_nano")


def frozen(name: str, dtype: torch.dtype | None, **options) -> FrozenTeacher:
    model = fill_by_name(create_model(name, 10, **options))
    return FrozenTeacher(model, (0.4, 0.5, 0.6), (0.3, 0.2, 0.3), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_in_half_precision_throughout(name, dtype):
    torch.manual_seed(0)
    size = 224 if name in ("vit_nano", "cswin_nano") else 64
    images = torch.randn(3, 3, size, size)
    expected, halved = frozen(name, None).forward_with_features(images), frozen(name, dtype)
    with torch.autocast("cpu", torch.bfloat16):  # which it leaves
        output = halved.forward_with_features(images)
    assert [feature.dtype for feature in output.features] == [dtype] * len(expected.features)
    assert output.logits.isfinite().all()
    assert error_of(output, expected) < (8e-2 if dtype == torch.bfloat16 else 1e-2)
    assert torch.equal(halved(images), output.logits)


@pytest.mark.parametrize("name", ["slak_nano", "convnext_nano", "convnextv2_nano"])
def test_half_precision_loses_nothing_but_rounding(name):
    """Scales absorbed and widths padded, in float64."""
    expected, same = frozen(name, None), frozen(name, torch.float64)
    assert {p.dtype for p in same.model.stages.parameters()} == {torch.float64}
    images = IMAGES.float()
    assert error_of(run(same, images), run(expected.double(), images.double())) < 1e-6


def test_statistics_stay_in_float32():
    teacher = frozen("resnet_nano", torch.bfloat16)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var.dtype == module.weight.dtype == torch.float32
    assert frozen("slak_nano", torch.bfloat16)(IMAGES.float()).dtype == torch.float32


# Compilation

COMPILED = {"slak_nano": {"depths": (1, 1, 1, 1)}, "convnext_nano": {"depths": (1, 1, 1, 1)},
            "resnet_nano": {}}


@pytest.fixture
def compile_whole(monkeypatch):
    """torch.compile captures whole networks or fails; generates no code; counts its captures."""
    captured = []

    def backend(graph, inputs):
        captured.append(graph)
        return graph

    real = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(
        function, fullgraph=True, backend=backend, **options))
    return captured


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COMPILED)
def test_teacher_is_captured_whole_and_once(name, dtype, compile_whole):
    teacher = frozen(name, dtype, **COMPILED[name])
    images = draw_images(4, (64, 64))
    expected = run(teacher, images)
    teacher.compile()
    for _ in range(3):
        assert error_of(teacher.forward_with_features(images), expected) < 1e-5
    assert len(compile_whole) == 1
    teacher(images[:3])  # the last batch of an evaluation
    assert len(compile_whole) == 1


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("name", COMPILED)
def test_student_is_captured_whole(name, multiple, compile_whole):
    results = []
    for is_compiled in (False, True):
        student = fill_by_name(create_model(name, 10, **COMPILED[name])).train()
        if multiple and isinstance(student, ConvNeXtFrame):
            student.width_multiple = multiple
        forward = student.forward_with_features
        forward = torch.compile(forward) if is_compiled else forward
        for _ in range(2):
            output = forward(draw_images(2, (64, 64)))
        output.logits.square().sum().backward()
        results.append([output.logits, *output.features, *student.buffers(),
                        *[parameter.grad for parameter in student.parameters()]])
    assert len(compile_whole) == 1
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_macs_of_a_frozen_network_are_those_of_its_plain_widths():
    stats = IMAGENET_MEAN, IMAGENET_STD
    plain = FrozenTeacher(create_model("slak_nano", 10), *stats)
    padded = FrozenTeacher(create_model("slak_nano", 10), *stats, dtype=torch.bfloat16)
    assert padded.count_macs(64) == plain.count_macs(64) == plain.model.count_macs(64)
    assert padded.model.head.weight.shape == plain.model.head.weight.shape
    assert sum(p.numel() for p in padded.model.parameters()) > sum(
        p.numel() for p in plain.model.parameters())
    assert not any(name.startswith("plain") for name, _ in padded.named_modules())
