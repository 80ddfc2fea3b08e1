"""Published files of every naming scheme give the logits that their own code gives."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from models import create_model
from models.base import IMAGENET_MEAN, IMAGENET_STD
from models.distiller import FrozenTeacher
from models.published import PUBLISHED
from models.state_dicts import describe_origin, without_computed
from models.weights import load_weights
from tests.helpers import fill_by_name, read_json
from utils.registry import UserError

REFERENCE = read_json("full_models")
# key of the reference -> registered name and options; the others are in test_models.py
OTHER_NAMES = {
    "swin_t_official": ("swin_t", {}), "deit_s": ("deit_s", {}), "vit_b_timm": ("vit_b", {}),
    "convnext_t_torchvision": ("convnext_t", {}), "convnextv2_t": ("convnextv2_t", {}),
    "mobilenetv3_l": ("mobilenetv3_l", {}), "mobilenetv3_l_timm": ("mobilenetv3_l",
                                                                   {"bn_eps": 1e-5}),
    "resnet50_timm": ("resnet50", {}),
}


def published_state(key: str, fill: bool = True) -> dict[str, Tensor]:
    """The state dict as published: names, shapes, and values drawn from the names."""
    state = {}
    for name, shape in REFERENCE[key]["keys"].items():
        is_count = name.endswith(("num_batches_tracked", "relative_position_index"))
        state[name] = torch.zeros(shape, dtype=torch.long if is_count else torch.float32,
                                  device="cpu" if fill else "meta")
    return fill_by_name(SimpleNamespace(state_dict=lambda: state)).state_dict() if fill else state


@pytest.mark.parametrize("key", OTHER_NAMES)
def test_published_names_give_the_published_logits(key, tmp_path):
    name, options = OTHER_NAMES[key]
    model = create_model(name, 1000, **options).eval()
    assert model.num_parameters == REFERENCE[key]["params"]
    torch.save({"model": published_state(key)}, tmp_path / "published.pth")
    load_weights(model, tmp_path / "published.pth")
    images = np.random.RandomState(20230530).standard_normal((1, 3, 224, 224))
    with torch.no_grad():
        logits = model(torch.tensor(images, dtype=torch.float32))[0]
    expected = torch.tensor(REFERENCE[key]["logits_first8"])
    assert (logits[:8] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert logits.norm().item() == pytest.approx(REFERENCE[key]["logits_norm"], rel=1e-5)
    assert logits.argmax().item() == REFERENCE[key]["argmax"]


SAME_NAMES = {"slak_t_31": ("slak_t", {"kernel_size": (31, 29, 27, 13, 5)}),
              "slak_t_61": ("slak_t", {"kernel_size": (61, 59, 57, 13, 5)})}


@pytest.mark.parametrize("key", REFERENCE)
def test_the_published_key_set_is_the_networks_own_after_import(key):
    name, options = {**OTHER_NAMES, **SAME_NAMES}.get(key, (key, {}))
    with torch.device("meta"):
        model = create_model(name, 1000, **options)
    imported = without_computed(model.convert_state_dict(published_state(key, fill=False)))
    assert {key: value.shape for key, value in imported.items()} == {
        key: value.shape for key, value in without_computed(model.state_dict()).items()}


def timm_convnextv2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> timm's, written the other way round."""
    result = {}
    for name, value in state.items():
        parts = name.split(".")
        if name.startswith("downsample_layers.0"):
            name = f"stem.{parts[2]}.{parts[3]}"
        elif name.startswith("downsample_layers"):
            name = f"stages.{parts[1]}.downsample.{parts[2]}.{parts[3]}"
        elif parts[0] == "stages":
            layer = {"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1",
                     "pwconv2": "mlp.fc2", "grn": "mlp.grn"}[parts[3]]
            last = {"gamma": "weight", "beta": "bias"}.get(parts[4], parts[4])
            value = value.flatten() if parts[3] == "grn" else value
            name = f"stages.{parts[1]}.blocks.{parts[2]}.{layer}.{last}"
        else:
            name = {"norm": "head.norm.", "head": "head.fc."}[parts[0]] + parts[1]
        result[name] = value
    return result


def test_timms_names_of_convnext_v2(tmp_path):
    model = fill_by_name(create_model("convnextv2_nano", 10))
    torch.save({"state_dict": timm_convnextv2(model.state_dict())}, tmp_path / "timm.pth")
    other = create_model("convnextv2_nano", 10)
    load_weights(other, tmp_path / "timm.pth")
    assert all(torch.equal(value, other.state_dict()[name])
               for name, value in model.state_dict().items())


def test_convnext_v2_equals_the_published_code(fixture_npz):
    arrays = fixture_npz("convnextv2_micro")
    model = create_model("convnextv2_nano", 10, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
    model.load_state_dict({name.removeprefix("sd/"): torch.as_tensor(value)
                           for name, value in arrays.items() if name.startswith("sd/")})
    with torch.no_grad():
        logits = model.eval()(torch.as_tensor(arrays["input"]))
    torch.testing.assert_close(logits, torch.as_tensor(arrays["logits"]), rtol=1e-5, atol=1e-5)
    exempt = model.no_weight_decay()
    assert len(exempt) == 10 and all(".grn." in name for name in exempt)


def test_newer_timm_moved_the_down_sampling_of_swin():
    model = create_model("swin_nano", 10)
    official = {}
    for name, value in without_computed(published_state("swin_t_official", fill=False)).items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) + 1)
        official[".".join(parts).replace("head.", "head.fc.")] = value
    assert model.convert_state_dict(official).keys() == model.convert_state_dict(
        without_computed(published_state("swin_t_official", fill=False))).keys()


def test_the_first_vit_s_of_timm():
    """No bias of queries, keys and values, and scores scaled by the whole width: attention by hand
    equals attention after the import."""
    dim, heads = 64, 4
    model = create_model("vit_s", 10, dim=dim, depth=1, num_heads=heads, image_size=32,
                         published_scale=dim ** -0.5)
    state = {}
    for name, value in create_model("deit_s", 10, dim=dim, depth=1, num_heads=heads, mlp_ratio=3,
                                    image_size=32).state_dict().items():
        state[name] = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
    weight = state["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"]
    theirs = {"pos_embed": state["encoder.pos_embedding"], "blocks.0.attn.qkv.weight": weight}
    imported = model.convert_state_dict(theirs)
    prefix = "encoder.layers.encoder_layer_0.self_attention.in_proj"
    assert (imported[f"{prefix}_bias"] == 0).all() and len(imported[f"{prefix}_bias"]) == 3 * dim
    x = torch.randn(5, dim, generator=torch.Generator().manual_seed(0))
    queries, keys, _ = (x @ weight.T).chunk(3, dim=1)
    expected = queries @ keys.T * dim ** -0.5
    queries, keys, _ = (x @ imported[f"{prefix}_weight"].T).chunk(3, dim=1)
    torch.testing.assert_close(queries @ keys.T * (dim // heads) ** -0.5, expected)
    own = model.state_dict()
    # Its own checkpoints are not rescaled.
    assert model.convert_state_dict(own).keys() == own.keys()
    assert torch.equal(model.convert_state_dict(own)[f"{prefix}_weight"], own[f"{prefix}_weight"])


def test_timms_mobilenet_asks_for_its_eps(tmp_path):
    names = ("conv_stem.weight", "conv_head.weight", "conv_head.bias")
    torch.save(dict.fromkeys(names, torch.zeros(1)), tmp_path / "timm.pth")
    with pytest.raises(UserError, match="BatchNorm eps of 1e-5.*bn_eps=1e-5"):
        load_weights(create_model("mobilenetv3_nano", 10), tmp_path / "timm.pth")


@pytest.mark.parametrize("options", [{"num_heads": 0}, {"num_heads": 5}, {"mlp_ratio": 0},
                                     {"norm_eps": 0.0}, {"published_scale": -1.0}])
def test_a_vit_that_cannot_be_built_is_refused_in_words(options):
    with pytest.raises(UserError, match="^ViT "):
        create_model("vit_nano", 10, **options)


# Which network a file is of


@pytest.mark.parametrize("key, words", [
    ("slak_t_31", "slak_t kernel_size=31,29,27,13,5"), ("slak_b", "slak_b"),
    ("convnext_s_bn", "convnext_s_bn"), ("swin_t_official", "swin_t"), ("vit_b_timm", "vit_b"),
    ("mobilenetv3_l_timm", "mobilenetv3_l bn_eps=1e-05"), ("cswin_t", "cswin_t")])
def test_a_file_is_recognised_by_its_names_and_shapes(key, words):
    assert describe_origin(published_state(key, fill=False)) == f"These are weights of {words}. "


def test_the_nearest_network_is_named_or_none():
    state = published_state("slak_t_31", fill=False)
    del state["head.weight"]
    assert describe_origin(state).startswith(
        "The nearest network is slak_t kernel_size=31,29,27,13,5, 100% of")
    assert describe_origin({"a": torch.zeros(3), "b": torch.zeros(2, 2)}) == ""


def test_wrong_kernels_are_named(tmp_path):
    model = create_model("slak_nano", 10, kernel_size=(13, 11, 9, 7, 3))
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="weights of slak_nano kernel_size=13,11,9,7,3"):
        load_weights(create_model("slak_nano", 10), tmp_path / "a.pth")


def test_safetensors(tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    model = fill_by_name(create_model("resnet_nano", 10))
    save(model.state_dict(), tmp_path / "a.safetensors")
    other = create_model("resnet_nano", 10)
    load_weights(other, tmp_path / "a.safetensors")
    assert torch.equal(other.fc.weight, model.fc.weight)
    (tmp_path / "a.safetensors").write_bytes(b"<html>not here</html>")
    with pytest.raises(UserError, match="not a readable .safetensors file"):
        load_weights(other, tmp_path / "a.safetensors")


def test_every_teacher_of_the_paper_has_an_address_but_cswin():
    teachers = {"slak_t", "slak_s", "slak_b", "convnext_t", "convnext_s", "swin_t", "deit_s",
                "vit_s", "vit_b", "resnet50d", "efficientnet_b3"}
    assert teachers <= set(PUBLISHED) and "cswin_t" not in PUBLISHED


def test_what_old_files_leave_out(tmp_path):
    """torch before 0.4.1 did not count the batches of a BatchNorm."""
    model = fill_by_name(create_model("resnet_nano", 10))
    state = {name: value for name, value in model.state_dict().items()
             if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    other = create_model("resnet_nano", 10)
    load_weights(other, tmp_path / "old.pth")
    assert torch.equal(other.bn1.running_mean, model.bn1.running_mean)
    assert other.bn1.num_batches_tracked == 0
    torch.save(model.state_dict(), tmp_path / "new.pth")
    load_weights(other, tmp_path / "new.pth")
    assert other.bn1.num_batches_tracked == 7


def test_the_linear_patches_of_timms_first_vits(tmp_path):
    state = {name: torch.nn.Parameter(value) for name, value in
             create_model("vit_nano", 10, image_size=32).state_dict().items()}
    names = {"conv_proj.weight": "patch_embed.proj.weight", "encoder.pos_embedding": "pos_embed"}
    timm = {names.get(name, name): value for name, value in state.items()}
    timm["patch_embed.proj.weight"] = timm["patch_embed.proj.weight"].flatten(1)
    torch.save(timm, tmp_path / "timm.pth")
    model = create_model("vit_nano", 10, image_size=32)
    load_weights(model, tmp_path / "timm.pth")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_file_that_names_a_tensor_twice_is_refused(tmp_path):
    state = create_model("convnext_nano", 10).state_dict()
    torch.save({**state, "head.fc.weight": torch.zeros(10, 192)}, tmp_path / "two.pth")
    with pytest.raises(UserError, match="names head.weight twice"):
        load_weights(create_model("convnext_nano", 10), tmp_path / "two.pth")


def test_a_teacher_sees_the_size_and_the_normalisation_of_its_weights():
    teacher = FrozenTeacher(create_model("efficientnet_nano", 10, input_size=96), IMAGENET_MEAN,
                            IMAGENET_STD)
    images = torch.zeros(2, 3, 64, 64)
    assert teacher.forward_with_features(images).features[0].shape[2:] == (24, 24)
    own = FrozenTeacher(create_model("efficientnet_nano", 10), IMAGENET_MEAN, IMAGENET_STD)
    assert own.forward_with_features(images).features[0].shape[2:] == (16, 16)
    assert create_model("vit_nano", 10, input_norm="half").input_mean == (0.5, 0.5, 0.5)
    with torch.device("meta"):
        assert create_model("vit_b").input_std == (0.5, 0.5, 0.5)
        assert create_model("deit_s").input_mean == IMAGENET_MEAN
        assert create_model("efficientnet_b3").input_size == 300
    with pytest.raises(UserError, match="input_norm must be one of imagenet, half"):
        create_model("vit_nano", 10, input_norm="inception")
