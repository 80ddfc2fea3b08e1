"""How images are resized before an evaluation belongs to the weights, unless a flag says other."""
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models as theirs

import data
import eval as evaluation
from models import create_model
from models.distiller import FrozenTeacher
from models.published import PUBLISHED
from models.weights import Trained, load_student
from utils.registry import UserError

# Torchvision's files by our names: what is known of them stands in its own package.
TORCHVISION = {weights.url: weights for kind in (
    theirs.ResNet18_Weights, theirs.ResNet34_Weights, theirs.ResNet50_Weights,
    theirs.ResNet101_Weights, theirs.Swin_T_Weights, theirs.MobileNet_V3_Large_Weights,
    theirs.EfficientNet_B3_Weights) for weights in kind}


def photo() -> Image.Image:
    """Noise under a gradient, no multiple of any size."""
    rng = np.random.default_rng(0)
    values = np.linspace(0, 200, 351)[None, :, None] + rng.integers(0, 55, (289, 351, 3))
    return Image.fromarray(values.astype(np.uint8))


def published(name: str):
    """The network as it is when its published weights were asked for, which are not fetched."""
    with torch.device("meta"):
        return load_student([name], "published", None, [str(i) for i in range(1000)], dry_run=True)


@pytest.mark.parametrize("name", [name for name, known in PUBLISHED.items()
                                  if known.url in TORCHVISION])
def test_torchvisions_weights_see_what_torchvision_shows_them(name):
    transforms = TORCHVISION[PUBLISHED[name].url].transforms()
    expected = transforms(photo())  # normalised
    how = Trained(published(name), {}, None).preprocessing()
    pixels = data.eval_transform(**how)(photo()).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (transforms.mean, transforms.std))
    torch.testing.assert_close((pixels - mean) / std, expected, rtol=1e-5, atol=1e-5)
    assert PUBLISHED[name].top1 == TORCHVISION[PUBLISHED[name].url].meta["_metrics"][
        "ImageNet-1K"]["acc@1"]


def test_timms_weights_are_evaluated_as_timm_does():
    timm = pytest.importorskip("timm")
    for name, theirs_ in (("resnet50d", "resnet50d.ra2_in1k"),
                          ("vit_b", "vit_base_patch16_224.orig_in21k_ft_in1k")):
        known, cfg = PUBLISHED[name], timm.get_pretrained_cfg(theirs_)
        assert cfg.url == known.url and cfg.interpolation == known.interpolation
        assert cfg.input_size[-1] == known.size
        assert known.resize == int(known.size / cfg.crop_pct)


def test_the_same_file_by_hand_is_the_same():
    known = PUBLISHED["resnet50"]
    assert known.is_named("published") and known.is_named(known.url)
    assert known.is_named("somewhere/resnet50-11ad3fa6.pth")
    assert not known.is_named("resnet50.pth") and not known.is_named("random")


def test_at_another_size_only_the_filter_stays():
    trained = Trained(published("resnet50"), {}, None)
    assert trained.preprocessing(288) == {"input_size": 288, "resize": None,
                                          "interpolation": "bilinear"}
    random = Trained(create_model("resnet50"), {}, None)
    assert random.preprocessing() == {"input_size": 224, "resize": None, "interpolation": "bicubic"}


def test_a_run_is_evaluated_as_it_was():
    model, settings = published("resnet50"), {"input_size": 160, "crop_pct": 0.9}
    assert Trained(model, settings, None).preprocessing() == {
        "input_size": 160, "crop_pct": 0.9, "interpolation": "bicubic"}
    assert Trained(model, settings | {"interpolation": "bilinear"}, None).preprocessing(192) == {
        "input_size": 192, "crop_pct": 0.9, "interpolation": "bilinear"}


@pytest.mark.parametrize("how, words", [
    ({}, "short side to 256 px (bicubic), then the centre"),
    ({"resize": 232, "interpolation": "bilinear"}, "short side to 232 px (bilinear)"),
    ({"crop_pct": 1.0}, "short side to 224 px"), ({"input_size": 384}, "warped to the square"),
    ({"input_size": 32}, "their centre"), ({"input_size": 32, "resize": 40}, "short side to 40")])
def test_what_is_done_is_said(how, words):
    assert words in data.describe_eval(data.eval_transform(**{"input_size": 224, **how}))


@pytest.mark.parametrize("how, telling", [
    ({"resize": 223}, "it must be 224 to 3584"), ({"resize": 10 ** 6}, "it must be 224 to 3584"),
    ({"crop_pct": 1e-9}, "crop_pct is 1e-09"), ({"crop_pct": float("nan")}, "crop_pct is nan"),
    ({"crop_pct": 0.9, "resize": 256}, "give one"), ({"interpolation": "nearest"}, "or bilinear"),
    ({"input_size": 10 ** 9}, "input size is 1000000000")])
def test_what_cannot_be_done_is_refused(how, telling):
    with pytest.raises(UserError, match=telling):
        data.eval_transform(**{"input_size": 224, **how})


def test_flags_of_eval_win(tmp_path, capsys):
    torch.save(create_model("resnet_nano", 10).state_dict(), tmp_path / "w.pth")
    words = ["--model", "resnet_nano", "--weights", str(tmp_path / "w.pth"), "--num-classes", "10",
             "--data-set", "outlines", "val_size=4", "--input-size", "48", "--num-workers", "0"]
    for flags, telling in (([], "short side to 54 px (bicubic)"),
                           (["--resize", "60"], "short side to 60 px (bicubic)"),
                           (["--crop-pct", "1", "--interpolation", "bilinear"],
                            "short side to 48 px (bilinear)")):
        assert evaluation.main([*words, *flags]) == 0
        assert f"images: {telling}" in capsys.readouterr().out
    assert evaluation.main([*words, "--resize", "60", "--crop-pct", "1"]) == 2
    assert "give one" in capsys.readouterr().err


def test_a_teacher_resizes_by_its_publishers_filter():
    images, outputs = torch.randn(2, 3, 32, 32), []
    for interpolation in ("bicubic", "bilinear"):
        torch.manual_seed(0)
        model = create_model("efficientnet_nano", 10, input_size=64)
        model.input_filter = interpolation
        outputs.append(FrozenTeacher(model, model.input_mean, model.input_std)(images))
    assert not torch.equal(*outputs)
