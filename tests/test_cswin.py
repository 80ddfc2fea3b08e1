"""CSWin and ResNet-D: the published numbers, stripes and shortcuts by hand, sizes, options."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import create_model
from models.base import IMAGENET_MEAN, IMAGENET_STD
from models.cswin import CSWinBlock, StripeAttention
from models.distiller import FrozenTeacher
from models.layers import DropPath
from tests.helpers import fill_by_name, read_json
from utils.registry import UserError

REFERENCE = {name: read_json("full_models")[name] for name in ("cswin_t", "resnet50d")}
NANO = ["cswin_nano", "resnet_d_nano"]
AT_64 = dict(image_size=64, splits=(1, 2, 2, 2))  # maps of 16, 8, 4 and 2


def make_images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def nano(name: str, num_classes: int = 10, **options) -> nn.Module:
    """For 64 px, filled."""
    sizes = AT_64 if name.startswith("cswin") else {}
    return fill_by_name(create_model(name, num_classes, **{**sizes, **options})).eval()


def meta_model(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


# The published numbers


@pytest.mark.parametrize("name", REFERENCE)
def test_names_shapes_and_counts_are_the_published_ones(name):
    model, expected = meta_model(name), REFERENCE[name]
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected["keys"]
    assert model.num_parameters == expected["params"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", REFERENCE)
def test_logits_equal_the_published_code(name, memory_format):
    images = np.random.RandomState(20230530).standard_normal((1, 3, 224, 224))
    images = torch.tensor(images, dtype=torch.float32).to(memory_format=memory_format)
    model = fill_by_name(meta_model(name).to_empty(device="cpu")).eval()
    with torch.no_grad():
        logits = model.to(memory_format=memory_format)(images)[0]
    expected = torch.tensor(REFERENCE[name]["logits_first8"])
    assert (logits[:8] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert logits.norm().item() == pytest.approx(REFERENCE[name]["logits_norm"], rel=1e-5)
    assert logits.argmax().item() == REFERENCE[name]["argmax"]


def test_nano_is_small():
    assert meta_model("cswin_nano").num_parameters < 1_200_000
    assert meta_model("resnet_d_nano").num_parameters < 500_000


# The contract


@pytest.mark.parametrize("name", NANO)
def test_feature_info_is_what_forward_gives(name):
    model = nano(name)
    with torch.no_grad():
        logits, features = model.forward_with_features(make_images(2, 3, 64, 64))
    assert logits.shape == (2, 10)
    for feature, info in zip(features, model.feature_info, strict=True):
        assert feature.shape == (2, info.channels, 64 // info.stride, 64 // info.stride)
    head = model.head if name.startswith("cswin") else model.fc
    torch.testing.assert_close(head(features[-1].mean((2, 3))), logits)


@pytest.mark.parametrize("name, channels", [("cswin_t", (64, 128, 256, 512)),
                                            ("resnet50d", (256, 512, 1024, 2048))])
def test_published_feature_info(name, channels):
    info = meta_model(name).feature_info
    assert [tuple(stage) for stage in info] == list(zip(channels, (4, 8, 16, 32)))


def test_cswin_maps_are_what_the_merges_read_and_the_head_pools():
    model = nano("cswin_nano")
    read = []
    for name in ("merge1", "merge2", "merge3"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs: read.append(inputs[0]))
    model.norm.register_forward_hook(
        lambda module, inputs, output: read.append(output.permute(0, 3, 1, 2)))
    with torch.no_grad():
        features = model.forward_with_features(make_images(1, 3, 64, 64)).features
    for feature, expected in zip(features, read, strict=True):
        assert torch.equal(feature, expected)
        assert feature.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NANO)
def test_every_parameter_gets_a_gradient(name):
    model = nano(name).train()
    F.cross_entropy(model(make_images(2, 3, 64, 64)), torch.tensor([3, 5])).backward()
    assert [key for key, value in model.named_parameters()
            if value.grad is None or not value.grad.isfinite().all() or not value.grad.any()] == []


@pytest.mark.parametrize("name", NANO)
def test_drop_path_acts_in_training_only(name):
    plain, dropped = nano(name), nano(name, drop_path=0.5)
    images = make_images(8, 3, 64, 64)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(plain(images), dropped(images))
        assert not torch.allclose(plain.train()(images), dropped.train()(images), rtol=1e-3)


def test_drop_path_rates_grow_from_block_to_block():
    model = nano("cswin_nano", drop_path=0.4)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_cswin_starts_as_its_authors_start_it():
    torch.manual_seed(0)
    model = create_model("cswin_nano", 1000)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 4 * 5 + 1 and not any(module.bias.any() for module in linear)
    for module in (model.head, model.stage4[0].qkv, model.stage3[1].mlp.fc2):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.no_weight_decay() == set()  # the authors exempt names that do not exist


# Stripes


def attention_by_window(attn: StripeAttention, qkv: torch.Tensor) -> torch.Tensor:
    """One window and one head at a time, as the paper writes it."""
    result = torch.empty_like(qkv[..., 0, :])
    height, width = attn.window
    head_dim = qkv.shape[-1] // attn.num_heads
    for top in range(0, qkv.shape[1], height):
        for left in range(0, qkv.shape[2], width):
            rows, columns = slice(top, top + height), slice(left, left + width)
            for n in range(len(qkv)):
                q, k, v = qkv[n, rows, columns].flatten(0, 1).unbind(1)  # (tokens, C)
                heads = [slice(i, i + head_dim) for i in range(0, q.shape[1], head_dim)]
                mixed = [(q[:, h] @ k[:, h].T / head_dim ** 0.5).softmax(1) @ v[:, h]
                         for h in heads]
                values = v.T.unflatten(1, (height, width))
                result[n, rows, columns] = attn.get_v(values).permute(1, 2, 0) + (
                    torch.cat(mixed, 1).unflatten(0, (height, width)))
    return result


@pytest.mark.parametrize("window", [(8, 1), (8, 2), (2, 8), (8, 8), (4, 2)], ids=str)
def test_stripe_attention_by_hand(window):
    attn = fill_by_name(StripeAttention(12, 3, window)).double()
    qkv = make_images(2, 8, 8, 3, 24)[..., 12:].double()  # half of the channels, as a block has it
    with torch.no_grad():
        torch.testing.assert_close(attn(qkv), attention_by_window(attn, qkv))


def test_a_block_sees_its_cross():
    block = fill_by_name(CSWinBlock(12, 2, ((8, 2), (2, 8)), drop_path=0.0)).eval()
    x = make_images(1, 8, 8, 12)
    changed = x.clone()
    changed[0, 3, 5, 0] += 1
    with torch.no_grad():
        differs = (block(changed) != block(x)).any(dim=3)[0]
    cross = torch.zeros(8, 8, dtype=torch.bool)
    cross[2:4] = cross[:, 4:6] = True
    assert torch.equal(differs, cross)


def test_two_groups_that_see_the_whole_map_are_one():
    """So the published checkpoint of a stage whose stripe is its map differs in names alone."""
    two = fill_by_name(CSWinBlock(12, 4, ((4, 4), (4, 4)), drop_path=0.0))
    one = CSWinBlock(12, 4, ((4, 4),), drop_path=0.0)
    state = two.state_dict()
    halves = [{key: state.pop(f"attns.{i}.get_v.{key}") for key in ("weight", "bias")}
              for i in (0, 1)]
    state |= {f"attns.0.get_v.{key}": torch.cat([half[key] for half in halves])
              for key in ("weight", "bias")}
    one.load_state_dict(state)
    x = make_images(2, 4, 4, 12)
    with torch.no_grad():
        torch.testing.assert_close(one(x), two(x))


# Sizes


@pytest.mark.parametrize("options", [
    dict(image_size=448, splits=(1, 2, 7, 14)), dict(image_size=384, splits=(1, 2, 12, 12)), AT_64])
def test_parameters_do_not_depend_on_the_size(options):
    model = meta_model("cswin_t", **options)
    assert model.fixed_size and model.input_size == options["image_size"]
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == (
        REFERENCE["cswin_t"]["keys"])
    size = options["image_size"]
    with torch.no_grad():
        output = model.forward_with_features(torch.empty(2, 3, size, size, device="meta"))
    assert [feature.shape[-1] for feature in output.features] == [
        size // stride for stride in (4, 8, 16, 32)]


@pytest.mark.parametrize("shape, got", [((96, 96), "96x96"), ((64, 96), "64x96")])
def test_images_of_another_size_are_refused(shape, got):
    with pytest.raises(UserError, match=f"64x64 px, got {got}.*image_size"):
        nano("cswin_nano")(make_images(1, 3, *shape))


def test_as_a_teacher_it_gets_its_size():
    model = nano("cswin_nano")
    teacher = FrozenTeacher(model, IMAGENET_MEAN, IMAGENET_STD)
    output = teacher.forward_with_features(make_images(2, 3, 32, 32))
    assert output.logits.shape == (2, 10) and output.features[-1].shape[2:] == (2, 2)


def test_fewer_stages():
    model = fill_by_name(create_model("cswin_nano", 10, depths=(1, 1), splits=(4, 8), heads=(2, 4),
                                      image_size=64)).eval()
    with torch.no_grad():
        features = model.forward_with_features(make_images(1, 3, 64, 64)).features
    assert [feature.shape[1:] for feature in features] == [(24, 16, 16), (48, 8, 8)]


# Options


@pytest.mark.parametrize("options, sentence", [
    (dict(image_size=230), "image_size must be a positive multiple of 32.*got 230"),
    (dict(image_size=0), "image_size must be a positive multiple of 32.*got 0"),
    (dict(image_size=-224), "image_size must be a positive multiple of 32.*got -224"),
    (dict(image_size=256), r"stage 3 is 16 wide, which stripes of 7 .*splits\[2\].*16"),
    (dict(splits=(3, 2, 7, 7)), r"stage 1 is 56 wide, which stripes of 3 .*splits\[0\]"),
    (dict(image_size=448), r"whole map, 14 wide .* must be 14, got \(1, 2, 7, 7\)"),
    (dict(splits=(1, 2, 7)), r"splits needs one .* 4 stages .*got \(1, 2, 7\)"),
    (dict(splits=(1, 2, 7, 0)), "splits needs one positive"),
    (dict(splits=(1, 2, 7, "x")), "splits needs one positive"),
    (dict(splits=7), "'splits' .* must be tuple or list, got 7"),
    (dict(heads=(2, 4, 8)), r"heads needs one .* 4 stages .*got \(2, 4, 8\)"),
    (dict(heads=(2, 4, 8.0, 16)), "heads needs one positive"),
    (dict(heads=(1, 4, 8, 16)), "be even; stage 1 of width 24 got 1"),
    (dict(heads=(2, 10, 8, 16)), "divide .* stage 2 of width 48 got 10"),
    (dict(dim=25), "stage 1 of width 25 got 2.*dim"),
    (dict(dim=0), "widths of at least 1"),
    (dict(depths=(1, 0, 2, 1)), "depths of at least 1"),
    (dict(depths=(1, 1, 1, 1, 1)), "four stages"),
    (dict(depths=()), "one to four stages"),
    (dict(drop_path=1.0), "drop_path"),
    (dict(drop_rate=0.1), "unknown option 'drop_rate'"),
], ids=str)
def test_impossible_options_of_cswin_are_refused_in_words(options, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("cswin_nano", 10, **options)


# ResNet-D


def test_resnet_d_is_two_options_of_the_resnet():
    built = meta_model("resnet50", deep_stem=True, avg_down=True).state_dict()
    shapes = {key: list(value.shape) for key, value in built.items()}
    assert shapes == REFERENCE["resnet50d"]["keys"]
    stem = meta_model("resnet_nano", deep_stem=True).state_dict()
    assert "conv1.6.weight" in stem and "layer2.0.downsample.0.weight" in stem
    down = meta_model("resnet_nano", avg_down=True).state_dict()
    assert "conv1.weight" in down and "layer2.0.downsample.1.weight" in down


def test_shortcut_averages_before_its_convolution():
    shortcut = nano("resnet_d_nano").layer2[0].downsample
    x = make_images(2, 16, 5, 5)  # odd: the last row and column are averaged by themselves
    means = torch.stack([x[..., i:i + 2, j:j + 2].mean((2, 3)) for i in (0, 2, 4)
                         for j in (0, 2, 4)], dim=2).unflatten(2, (3, 3))
    with torch.no_grad():
        torch.testing.assert_close(shortcut(x), shortcut[2](shortcut[1](means)))


def test_layer_ids_of_resnet_d():
    ids = meta_model("resnet50d").layer_ids()
    stem = {ids[key] for key in ids if key.startswith(("conv1.", "bn1."))}
    assert stem == {0} and ids["layer1.0.downsample.1.weight"] == 1
    assert ids["layer4.2.conv3.weight"] == 16 and ids["fc.bias"] == 17


def test_deep_stem_needs_two_channels():
    with pytest.raises(UserError, match="deep_stem halves the first of dims.*got 1"):
        create_model("resnet_d_nano", 10, dims=(1, 8, 8, 8))
