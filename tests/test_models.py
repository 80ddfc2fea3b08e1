"""Networks: the published numbers, the contract of every registered one, and wrong options."""
import inspect
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import train_kd
from models import create_model, list_models
from models.convnext import ConvNeXt
from models.layers import DropPath, drop_path_rates
from tests.helpers import MICRO, fill_by_name, micro_convnext_bn, micro_slak, read_json
from utils.registry import UnknownName, UserError

# In the order in which the reference inputs were drawn.
MICRO_MODELS = {
    "slak_micro": micro_slak,
    "slak_micro_nodecom": lambda: micro_slak(decomposed=False, width_factor=1.0),
    "convnext_bn_micro": micro_convnext_bn,
    "convnext_nobn_micro": lambda: micro_convnext_bn(bn=False),
    "convnext_micro": lambda: ConvNeXt(**MICRO),
}
TRAINED = [name for name in MICRO_MODELS if name != "convnext_micro"]  # those with gradients
KERNELS_31, KERNELS_61 = (31, 29, 27, 13, 5), (61, 59, 57, 13, 5)
FULL_MODELS = {
    "slak_t": ("slak_t", {}),
    "slak_t_31": ("slak_t", {"kernel_size": KERNELS_31}),
    "slak_t_61": ("slak_t", {"kernel_size": KERNELS_61}),
    **{name: (name, {}) for name in ("slak_s", "slak_b", "convnext_t_bn", "convnext_s_bn",
                                     "convnext_t", "convnext_s", "resnet50", "swin_t", "vit_b")},
}
FULL_REFERENCE = read_json("full_models")
NANO = [name for name in list_models() if name.endswith("_nano")]
WITH_DROP_PATH = [name for name in NANO if not name.startswith(("vit", "mobilenet"))]


def micro_input(name: str) -> torch.Tensor:
    rng = np.random.RandomState(20230530)
    for _ in range(list(MICRO_MODELS).index(name) + 1):
        images = rng.standard_normal((2, 3, 64, 64))
    return torch.tensor(images, dtype=torch.float32)


def relative_error(actual: torch.Tensor, expected) -> float:
    """Largest difference over the largest expected magnitude."""
    actual, expected = actual.detach().double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


def make_images(model: nn.Module, size: int = 64) -> torch.Tensor:
    if model.fixed_size:
        size = model.input_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def meta_model(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


# The published numbers


@pytest.mark.parametrize("name", MICRO_MODELS)
def test_micro_logits_and_maps_equal_the_published_code(name, fixture_npz):
    expected = fixture_npz(name)
    model = fill_by_name(MICRO_MODELS[name]()).eval()
    with torch.no_grad():
        output = model.forward_with_features(micro_input(name))
    assert relative_error(output.logits, expected["logits"]) < 1e-5
    assert len(output.features) == 4
    for i, feature in enumerate(output.features):
        assert relative_error(feature, expected[f"stage{i}"]) < 1e-5


@pytest.mark.parametrize("name", TRAINED)
def test_micro_gradients_equal_the_published_code(name, fixture_npz):
    expected = fixture_npz(name)
    model = fill_by_name(MICRO_MODELS[name]()).train()
    images = micro_input(name).requires_grad_()
    logits = model(images)
    loss = F.cross_entropy(logits, torch.tensor([0, 1]))
    loss.backward()
    assert relative_error(logits, expected["train_logits"]) < 1e-5
    assert relative_error(loss, expected["train_loss"]) < 1e-5
    assert relative_error(images.grad, expected["input_grad"]) < 1e-4
    gradients = {f"grad/{key}": value.grad for key, value in model.named_parameters()}
    assert gradients.keys() == {key for key in expected if key.startswith("grad/")}
    for key, gradient in gradients.items():
        assert relative_error(gradient, expected[key]) < 1e-4, key


@pytest.mark.parametrize("key", FULL_MODELS)
def test_full_size_names_and_shapes_are_the_published_ones(key):
    name, options = FULL_MODELS[key]
    model, expected = meta_model(name, **options), FULL_REFERENCE[key]
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected["keys"]
    assert model.num_parameters == expected["params"]


@pytest.mark.parametrize("names", [
    ("slak_t", "slak_t_31", "slak_t_61", "slak_s"), ("slak_b",),
    ("convnext_t", "convnext_t_bn", "convnext_s", "convnext_s_bn"),
    ("resnet50",), ("swin_t",), ("vit_b",)], ids="-".join)
def test_full_size_logits_equal_the_published_code(names):
    """A family at a time, since its members share most of their tensors and drawing is slow."""
    images = np.random.RandomState(20230530).standard_normal((1, 3, 224, 224))
    images = torch.tensor(images, dtype=torch.float32)
    drawn = {}
    for key in names:
        name, options = FULL_MODELS[key]
        if name == "swin_t":  # computes buffers when it is built
            model = create_model(name, **options).eval()
        else:  # without the initialisation, which takes longer than all the rest
            model = meta_model(name, **options).to_empty(device="cpu").eval()
        drawn = fill_from(drawn, model)
        with torch.no_grad():
            logits = model(images)[0]
        expected = FULL_REFERENCE[key]
        assert relative_error(logits[:8], expected["logits_first8"]) < 1e-5, key
        assert logits.norm().item() == pytest.approx(expected["logits_norm"], rel=1e-5), key
        assert logits.argmax().item() == expected["argmax"], key


def fill_from(drawn: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """fill_by_name(model), taking what `drawn` has already; the state dict. Two threads draw."""
    state = model.state_dict()
    new = []
    for key, value in state.items():
        if key in drawn and drawn[key].shape == value.shape:
            value.copy_(drawn[key])
        else:
            new.append(key)
    new.sort(key=lambda key: state[key].numel())
    parts = [SimpleNamespace(state_dict=lambda part=part: {key: state[key] for key in part})
             for part in (new[::2], new[1::2])]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill_by_name, parts))
    return state


@pytest.mark.parametrize("name, theirs", [
    ("resnet18", "resnet18"), ("resnet34", "resnet34"), ("resnet50", "resnet50"),
    ("resnet101", "resnet101"), ("swin_t", "swin_t"), ("vit_b", "vit_b_16")])
def test_names_and_shapes_are_torchvisions(name, theirs):
    with torch.device("meta"):
        expected = torchvision.models.get_model(theirs).state_dict()
    state = meta_model(name).state_dict()
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in expected.items()}


def test_resnet18_equals_torchvisions():
    theirs = fill_by_name(torchvision.models.resnet18(num_classes=10)).eval()
    ours = create_model("resnet18", 10).eval()
    ours.load_state_dict(theirs.state_dict())
    images = make_images(ours, 70)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) < 1e-6


# Table of the published parameter counts: SLaK paper, table 1, and the code's own numbers.
@pytest.mark.parametrize("name, options, num_parameters", [
    ("slak_t", {}, 50_703_838),
    ("slak_t", {"kernel_size": KERNELS_31}, 49_581_838),
    ("slak_t", {"kernel_size": KERNELS_61}, 51_264_838),
    ("slak_t", {"kernel_size": (51, 49, 47, 13, 3)}, 49_343_878),
    ("slak_t", {"kernel_size": (51, 49, 47, 13, 7)}, 52_132_630),
    ("slak_t", {"width_factor": 1.0}, 30_816_232),
    ("slak_t", {"width_factor": 1.0, "decomposed": False}, 38_605_768),
    ("slak_t", {"width_factor": 1.0, "decomposed": False, "kernel_size": KERNELS_31}, 32_120_008),
    ("slak_s", {}, 91_131_820),
    ("slak_b", {}, 157_950_792),
    ("slak_l", {}, 346_624_518),
    ("convnext_t_bn", {}, 28_595_752),
    ("convnext_t_bn", {"bn": False}, 28_582_504),
    ("convnext_s_bn", {}, 50_237_224),
    ("convnext_s_bn", {"bn": False}, 50_210_152),
    ("convnext_b", {}, 88_591_464),
])
def test_parameter_counts(name, options, num_parameters):
    assert meta_model(name, **options).num_parameters == num_parameters


@pytest.mark.parametrize("width_factor, channels", [
    (1.1, (105, 211, 422, 844)), (1.2, (115, 230, 460, 921)), (1.3, (124, 249, 499, 998)),
    (1.4, (134, 268, 537, 1075)), (1.5, (144, 288, 576, 1152)), (2.0, (192, 384, 768, 1536))])
def test_widths_are_truncated(width_factor, channels):
    info = meta_model("slak_t", width_factor=width_factor).feature_info
    assert tuple(stage.channels for stage in info) == channels


def test_the_small_kernel_exists_where_it_is_smaller():
    model = micro_slak(kernel_size=(9, 5, 3, 7, 5))
    branches = [list(dict(stage[0].large_kernel.named_children())) for stage in model.stages]
    pair = ["LoRA1", "LoRA2"]
    assert branches == [[*pair, "small_conv"], pair, pair, [*pair, "small_conv"]]


# Folding


@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize("kernel_size, decomposed", [
    ((13, 11, 9, 7, 5), True), ((13, 11, 9, 7, 5), False), ((7, 7, 7, 7, 100), False),
    ((9, 5, 3, 3, 5), True)])
def test_fold_keeps_the_function(kernel_size, decomposed, bn):
    model = fill_by_name(
        micro_slak(kernel_size=kernel_size, decomposed=decomposed, bn=bn)).eval()
    batches = [make_images(model, size)[:1] for size in (224, 100)]  # 100: odd maps
    with torch.no_grad():
        before = [model.forward_with_features(images) for images in batches]
        folded = model.fold()
        after = [folded.forward_with_features(images) for images in batches]
    assert folded is model
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == sum(model.depths) * (2 if decomposed else 1)
    for expected, output in zip(before, after):
        assert relative_error(output.logits, expected.logits) < 1e-5
        for feature, expected_feature in zip(output.features, expected.features):
            assert relative_error(feature, expected_feature) < 1e-5


@pytest.mark.parametrize("name", NANO)
def test_fold_of_every_model_keeps_the_function_and_twice_is_once(name):
    model = fill_by_name(create_model(name, 10)).eval()
    images = make_images(model)
    with torch.no_grad():
        expected = model(images)
        assert relative_error(model.fold()(images), expected) < 1e-5
        assert relative_error(model.fold()(images), expected) < 1e-5


# The contract, for everything that is registered


@pytest.mark.parametrize("name", list_models())
def test_feature_info_is_what_forward_gives(name):
    model = meta_model(name).eval()
    images = torch.empty(2, 3, 224, 224, device="meta")
    output = model.forward_with_features(images)
    assert output.logits.shape == (2, 1000)
    assert len(output.features) == len(model.feature_info)
    for feature, info in zip(output.features, model.feature_info):
        side = 224 // info.stride
        assert feature.shape == (2, info.channels, side, side)


@pytest.mark.parametrize("name", NANO)
def test_forward_is_the_logits_of_forward_with_features(name):
    model = fill_by_name(create_model(name, 7)).eval()
    images = make_images(model)
    with torch.no_grad():
        output = model.forward_with_features(images)
        assert torch.equal(model(images), output.logits)
    assert output.logits.shape == (2, 7) and model.num_classes == 7
    for feature, info in zip(output.features, model.feature_info):
        assert feature.shape[1:] == (info.channels, images.shape[2] // info.stride,
                                     images.shape[3] // info.stride)
        assert feature.isfinite().all() and feature.std() > 0


@pytest.mark.parametrize("name", NANO)
def test_every_parameter_gets_a_gradient(name):
    model = fill_by_name(create_model(name, 10)).train()
    F.cross_entropy(model(make_images(model)), torch.tensor([3, 5])).backward()
    idle = [key for key, value in model.named_parameters()
            if value.grad is None or not value.grad.isfinite().all() or not value.grad.any()]
    assert idle == []


@pytest.mark.parametrize("name", NANO)
def test_a_fresh_model_takes_its_size_or_any(name):
    model = create_model(name, 1).eval()
    with torch.no_grad():
        logits = model(make_images(model, size=70))
    assert logits.shape == (2, 1) and logits.isfinite().all()


# Drop path


def test_drop_path_drops_whole_samples_at_its_rate_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 1, 3)
    y = DropPath(0.3).train()(x)
    per_sample = y.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    kept = per_sample[:, 0] > 0
    torch.testing.assert_close(per_sample[kept, 0], torch.full((int(kept.sum()),), 1 / 0.7))
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.015)  # 4.6 standard errors


def test_drop_path_is_the_identity_in_evaluation_and_at_rate_zero():
    x = torch.randn(8, 3, 2, 2)
    assert torch.equal(DropPath(0.9).eval()(x), x)
    assert torch.equal(DropPath(0.0).train()(x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_drop_path_keeps_the_dtype(dtype):
    assert DropPath(0.5).train()(torch.ones(4, 1, dtype=dtype)).dtype == dtype


def test_drop_path_rates_grow_linearly():
    assert drop_path_rates(0.4, 5) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert drop_path_rates(0.4, 1) == [0]
    model = micro_slak(drop_path=0.4)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("name", WITH_DROP_PATH)
def test_drop_path_option_acts_in_training_only(name):
    plain, dropped = [fill_by_name(create_model(name, 10, drop_path=rate)) for rate in (0.0, 0.5)]
    images = make_images(plain).repeat(4, 1, 1, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), dropped.eval()(images))
        assert not torch.allclose(plain.train()(images), dropped.train()(images), rtol=1e-3)


# Options that only shape the start


def test_initialisation_options():
    torch.manual_seed(0)
    model = create_model("slak_nano", layer_scale_init=0.25, head_init_scale=0.5)
    assert (model.stages[0][0].gamma == 0.25).all()
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert model.stages[3][0].pwconv1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert create_model("slak_nano", layer_scale_init=0.0).stages[0][0].gamma is None


def test_zero_init_residual():
    for value in (True, False):
        model = create_model("resnet50", 10, depths=(1, 1, 1, 1), zero_init_residual=value)
        assert (model.layer4[0].bn3.weight == float(not value)).all()
        assert (model.layer4[0].bn2.weight == 1).all()


def test_vit_map_holds_the_patch_tokens():
    model = fill_by_name(create_model("vit_nano", 10, image_size=64)).eval()
    tokens = []
    model.encoder.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    with torch.no_grad():
        feature = model.forward_with_features(make_images(model)).features[0]
    assert torch.equal(feature[:, :, 2, 1], tokens[0][:, 1 + 2 * 4 + 1])  # row 2, column 1 of 4
    assert torch.equal(feature.flatten(2).transpose(1, 2), tokens[0][:, 1:])  # without the class


def test_vit_image_size():
    model = create_model("vit_nano", 10, image_size=64).eval()
    with torch.no_grad():
        output = model.forward_with_features(make_images(model))
    assert model.fixed_size and model.input_size == 64
    assert output.features[0].shape == (2, 96, 4, 4)
    with pytest.raises(UserError, match="multiple of 16, got 70"):
        create_model("vit_nano", image_size=70)


def test_vit_positions_of_another_image_size_are_resized_as_in_deit():
    """The class token's position stays; of those of the patches each channel is a small image."""
    small, large = [create_model("vit_nano", 10, image_size=size) for size in (64, 96)]
    fill_by_name(small)
    state = large.convert_state_dict(small.state_dict())
    large.load_state_dict(state)
    table, own = small.encoder.pos_embedding[0], large.encoder.pos_embedding[0]
    assert torch.equal(own[0], table[0])
    for channel in (0, 95):
        grid = table[1:, channel].view(1, 1, 4, 4)
        torch.testing.assert_close(own[1:, channel].view(1, 1, 6, 6), F.interpolate(
            grid, (6, 6), mode="bicubic", align_corners=False))
    timms = {"pos_embed": small.state_dict()["encoder.pos_embedding"]}
    assert large.convert_state_dict(timms)["encoder.pos_embedding"].shape == (1, 37, 96)
    assert torch.equal(small.convert_state_dict(small.state_dict())["encoder.pos_embedding"],
                       small.encoder.pos_embedding)
    other = {"encoder.pos_embedding": torch.zeros(1, 30, 96)}  # no square: left to be refused
    assert large.convert_state_dict(other)["encoder.pos_embedding"].shape == (1, 30, 96)


def test_swin_tables_of_another_window_are_resized_as_by_its_authors(capsys):
    small, large = [create_model("swin_nano", 10, window=window) for window in (4, 6)]
    fill_by_name(small)
    large.load_state_dict(large.convert_state_dict({
        name: value for name, value in small.state_dict().items()
        if not name.endswith("relative_position_index")}), strict=False)
    name = "features.5.1.attn.relative_position_bias_table"
    table, own = small.state_dict()[name], large.state_dict()[name]
    assert table.shape == (49, 4) and own.shape == (121, 4)
    torch.testing.assert_close(own[:, 2].view(1, 1, 11, 11), F.interpolate(
        table[:, 2].view(1, 1, 7, 7), (11, 11), mode="bicubic", align_corners=False))
    assert "5 tables of relative positions resized to windows of 6 x 6" in capsys.readouterr().out
    with torch.no_grad():  # 96 px: a first map of 24, four windows of 6
        assert large.eval()(torch.zeros(1, 3, 96, 96)).isfinite().all()


# Networks for 32 px


@pytest.mark.parametrize("name", ["resnet_nano", "resnet50", "convnext_nano", "convnextv2_nano",
                                  "convnext_bn_nano", "slak_nano"])
def test_the_small_stem_sees_every_pixel(name):
    model = meta_model(name, stem="small").eval()
    output = model.forward_with_features(torch.empty(2, 3, 32, 32, device="meta"))
    assert [info.stride for info in model.feature_info] == [1, 2, 4, 8]
    for feature, info in zip(output.features, model.feature_info):
        assert feature.shape == (2, info.channels, 32 // info.stride, 32 // info.stride)
    ids, plain = model.layer_ids(), meta_model(name).layer_ids()
    assert ids == plain  # the same names
    assert type(model).options_of(model.state_dict())["stem"] == "small"
    assert "stem" not in type(model).options_of(meta_model(name).state_dict())


def test_the_small_stem_folds():
    model = fill_by_name(create_model("slak_pico", 10, stem="small")).eval()
    images = make_images(model, 32)
    with torch.no_grad():
        expected = model(images)
        assert relative_error(model.fold()(images), expected) < 1e-5


# Wrong names and options


def test_unknown_model_names_the_nearest():
    with pytest.raises(UnknownName) as caught:
        create_model("resnet5")
    assert isinstance(caught.value, UserError) and isinstance(caught.value, KeyError)
    message = str(caught.value)
    assert message.startswith("unknown model 'resnet5'. Known: convnext_b, ")
    assert "Did you mean 'resnet50' or 'resnet50d'?" in message and "models/__init__.py" in message


@pytest.mark.parametrize("name, option, nearest", [
    ("slak_nano", "kernel_sizes", "kernel_size"), ("convnext_nano", "droppath", "drop_path"),
    ("resnet_nano", "zero_init", "zero_init_residual"), ("swin_nano", "depth", "depths")])
def test_unknown_option_names_the_nearest(name, option, nearest):
    with pytest.raises(UserError, match=f"'{option}'.*Known: .*Did you mean '{nearest}'") as caught:
        create_model(name, **{option: 1})
    assert f"model '{name}'" in str(caught.value)


@pytest.mark.parametrize("option", [{"name": "x"}, {"num_classes": 10}])
def test_what_the_program_passes_is_no_option(option):
    (key,) = option
    with pytest.raises(UserError) as caught:
        create_model("resnet_nano", 10, **option)
    assert str(caught.value) == (f"{key} is set by the program and cannot be an option of model "
                                 "'resnet_nano'. Leave it out.")


@pytest.mark.parametrize("word", ["name=x", "num_classes=10"])
def test_what_the_program_passes_is_refused_on_the_command_line(word, capsys):
    assert train_kd.main(["--student", "resnet_nano", word, "--data-set", "outlines", "--dry-run",
                          "--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        f"train_kd.py: error: {word.partition('=')[0]} is set by the program and cannot be an "
        "option of model 'resnet_nano'. Leave it out.\n")


@pytest.mark.parametrize("name, options, sentence", [
    ("slak_nano", {"drop_path": "much"}, "'drop_path'.* must be int or float, got 'much'"),
    ("slak_nano", {"drop_path": True}, "'drop_path'.* must be int or float, got True"),
    ("slak_nano", {"bn": 1}, "'bn'.* must be bool, got 1"),
    ("slak_nano", {"depths": "3"}, "'depths'.* must be tuple or list, got '3'"),
    ("resnet_nano", {"block": 3}, "'block'.* must be str, got 3"),
    ("resnet_nano", {"block": "wide"}, "one of basic, bottleneck; got 'wide'"),
    ("resnet_nano", {"stem": "tiny"}, "stem must be large, .* or small.*got 'tiny'"),
    ("resnet_d_nano", {"stem": "small"}, "without deep_stem"),
    ("slak_nano", {"stem": "large"}, "stem must be patch, .* or small.*got 'large'"),
    ("swin_nano", {"window": 0}, "window must be 1 to 64"),
    ("vit_nano", {"image_size": 64.0}, "'image_size'.* must be int, got 64.0"),
    ("slak_nano", {"kernel_size": (51, 49, 47, 13)}, r"kernel_size takes .*\[51, 49, 47, 13\]"),
    ("slak_nano", {"kernel_size": 51}, "'kernel_size' .* must be tuple or list, got 51"),
    ("slak_nano", {"kernel_size": (51, 49, 47, 13, -5)}, "kernel_size takes .* positive"),
    ("slak_nano", {"kernel_size": (51, 49, 47, 13, "x")}, "kernel_size takes .* positive"),
    ("slak_nano", {"kernel_size": (51, 48, 47, 13, 5)}, "odd.*48"),
    ("slak_nano", {"kernel_size": (51, 49, 47, 13, 4)}, "odd.*4"),
    ("slak_nano", {"kernel_size": (51, 49, 47, 13, 4), "decomposed": False}, "odd.*4"),
])
def test_wrong_options_are_refused_in_words(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model(name, **options)


@pytest.mark.parametrize("name, options", [
    ("slak_nano", {"drop_path": 1.0}),  # nothing is kept: 0 / 0
    ("resnet_nano", {"drop_path": -0.1}),
    ("swin_nano", {"drop_path": 1.5}),
    ("slak_nano", {"width_factor": 0.0}),
    ("slak_nano", {"depths": 3}),
    ("convnext_nano", {"dims": 24}),
    ("convnext_nano", {"depths": (1, 1, 3)}),
    ("resnet_nano", {"depths": (1, 1, 1)}),
])
def test_impossible_values_are_refused_in_words(name, options):
    with pytest.raises(UserError, match=next(iter(options))):
        create_model(name, **options)


@pytest.mark.parametrize("num_classes", [0, -3, 10.0, "10"])
def test_wrong_number_of_classes(num_classes):
    with pytest.raises(UserError, match="num_classes must be a positive int"):
        create_model("resnet_nano", num_classes)


@pytest.mark.parametrize("name", NANO)
def test_every_option_has_a_type_that_is_checked(name):
    """So that `--student name option=nonsense` is refused whatever the option."""
    for key, parameter in inspect.signature(type(meta_model(name))).parameters.items():
        if key != "num_classes":
            value = 5 if parameter.annotation in (str, bool) else "nonsense"
            with pytest.raises(UserError, match=key):
                create_model(name, **{key: value})
