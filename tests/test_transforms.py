"""Training and evaluation transforms: sizes, order, ranges, and whose randomness they use."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from data.randaugment import RandAugment
from data.transforms import eval_transform, train_transform
from utils.errors import UserError

NORM = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def noise_image(width, height):
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ramp_image(width, height):
    """Red says the column, green the row, so a crop tells where it came from."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)[None, :]
    pixels[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


def to_uint8(tensor):
    return (tensor * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def steps(transform):
    return [type(step).__name__ for step in transform.transforms]


@pytest.mark.parametrize("size", [28, 32, 33, 64, 224])
@pytest.mark.parametrize("shape", [(50, 40), (300, 90), (90, 300)])
def test_train_gives_float32_of_the_asked_size(size, shape):
    torch.manual_seed(0)
    out = train_transform(size, **NORM)(noise_image(*shape))
    assert out.shape == (3, size, size) and out.dtype == torch.float32
    assert torch.isfinite(out).all()


def test_train_order_and_settings():
    large, small = train_transform(224, **NORM), train_transform(32, **NORM)
    tail = ["RandomHorizontalFlip", "RandAugment", "ToTensor", "Normalize", "RandomErasing"]
    assert steps(large) == ["RandomResizedCrop", *tail]
    assert steps(small) == ["RandomCrop", *tail]
    crop, erase = large.transforms[0], large.transforms[-1]
    assert crop.scale == (0.08, 1.0) and crop.ratio == (3 / 4, 4 / 3)
    assert crop.interpolation is T.InterpolationMode.BICUBIC
    assert erase.p == 0.25 and erase.scale == (0.02, 1 / 3) and erase.ratio == (0.3, 1 / 0.3)
    assert isinstance(large.transforms[2], RandAugment) and large.transforms[2].magnitude == 9


def test_train_options_change_what_they_say():
    bare = train_transform(64, **NORM, auto_augment="none", random_erasing_prob=0)
    assert steps(bare) == ["RandomResizedCrop", "RandomHorizontalFlip", "ToTensor", "Normalize"]
    assert train_transform(64, **NORM, auto_augment="rand-m3-inc1").transforms[2].magnitude == 3
    whole = train_transform(
        64, **PLAIN, auto_augment="none", random_erasing_prob=0, scale=(1.0, 1.0), ratio=(1.0, 1.0),
        hflip_prob=1.0)
    assert whole.transforms[0].ratio == (1.0, 1.0)
    image = ramp_image(64, 64)
    np.testing.assert_array_equal(to_uint8(whole(image)), np.asarray(image)[:, ::-1])


def test_small_inputs_are_padded_by_four_never_resized():
    image = ramp_image(32, 32)
    transform = train_transform(
        32, **PLAIN, auto_augment="none", random_erasing_prob=0, hflip_prob=0)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
    windows = {padded[i:i + 32, j:j + 32].tobytes(): (i, j) for i in range(9) for j in range(9)}
    torch.manual_seed(0)
    found = {windows[to_uint8(transform(image)).tobytes()] for _ in range(200)}  # KeyError if not
    assert {i for i, _ in found} == set(range(9)) and {j for _, j in found} == set(range(9))


def test_erasing_fills_normal_noise_after_normalisation():
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    transform = train_transform(64, **NORM, auto_augment="none", random_erasing_prob=1.0)
    background = (128 / 255 - torch.tensor(NORM["mean"])) / torch.tensor(NORM["std"])
    torch.manual_seed(0)
    values, shares = [], []
    for _ in range(60):
        out = transform(grey)
        erased = (out - background[:, None, None]).abs() > 1e-5
        values.append(out[erased])
        shares.append(erased[0].float().mean().item())
    values = torch.cat(values)
    assert values.mean().abs() < 0.02 and (values.std() - 1).abs() < 0.02
    assert min(shares) >= 0.015 and max(shares) <= 0.35 and max(shares) - min(shares) > 0.2


@pytest.mark.parametrize("size", [32, 64])
def test_only_torch_randomness_is_used(size):
    transform, image = train_transform(size, **NORM), noise_image(70, 60)

    def run(seed, other):
        random.seed(other)
        np.random.seed(other)
        torch.manual_seed(seed)
        return torch.stack([transform(image) for _ in range(10)])

    first = run(1, other=1)
    assert torch.equal(first, run(1, other=2))
    assert not torch.equal(first, run(2, other=1))


def test_eval_resizes_the_short_side_to_256_then_crops():
    image = noise_image(500, 375)
    short = image.resize((341, 256), Image.Resampling.BICUBIC)  # int(256 * 500 / 375)
    left, top = round((341 - 224) / 2), (256 - 224) // 2
    expected = np.asarray(short.crop((left, top, left + 224, top + 224)))
    np.testing.assert_array_equal(to_uint8(eval_transform(224, **PLAIN)(image)), expected)


def test_eval_normalises():
    out = eval_transform(32, **NORM)(Image.new("RGB", (32, 32), (255, 0, 51)))
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(NORM["mean"])) / torch.tensor(
        NORM["std"])
    assert torch.allclose(out, expected[:, None, None].expand(3, 32, 32), atol=1e-6)


def test_eval_warps_from_384_unless_crop_pct_is_given():
    image = noise_image(120, 60)
    warped = np.asarray(image.resize((384, 384), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(to_uint8(eval_transform(384, **PLAIN)(image)), warped)
    wide = np.asarray(image.resize((768, 384), Image.Resampling.BICUBIC))[:, 192:576]
    np.testing.assert_array_equal(
        to_uint8(eval_transform(384, **PLAIN, crop_pct=1.0)(image)), wide)
    assert steps(eval_transform(383, **PLAIN))[:2] == ["Resize", "CenterCrop"]


def test_eval_does_not_resize_32_px():
    image = noise_image(32, 32)
    np.testing.assert_array_equal(to_uint8(eval_transform(32, **PLAIN)(image)), np.asarray(image))
    assert "Resize" not in steps(eval_transform(32, **PLAIN))


@pytest.mark.parametrize("size", [16, 32, 33, 64, 224, 384])
@pytest.mark.parametrize("crop_pct", [None, 1.0, 0.9])
def test_eval_size_and_repeatability(size, crop_pct):
    transform = eval_transform(size, **NORM, crop_pct=crop_pct)
    for shape in [(100, 70), (70, 100)]:
        out = transform(noise_image(*shape))
        assert out.shape == (3, size, size) and out.dtype == torch.float32
        assert torch.equal(out, transform(noise_image(*shape)))


def test_eval_crop_pct_one_is_the_whole_short_side():
    square = noise_image(64, 64)
    for size in [32, 64]:
        expected = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
        out = eval_transform(size, **PLAIN, crop_pct=1.0)(square)
        np.testing.assert_array_equal(to_uint8(out), expected)


@pytest.mark.parametrize("build, options, named", [
    (train_transform, {"random_erasing_prob": 1.5}, "random_erasing_prob"),
    (train_transform, {"hflip_prob": -0.1}, "hflip_prob"),
    (train_transform, {"scale": (0.5, 0.2)}, "scale"),
    (train_transform, {"scale": (0.5, 1.2)}, "scale"),
    (train_transform, {"ratio": (0, 1)}, "ratio"),
    (train_transform, {"auto_augment": "rand-m9"}, "inc1"),
    (train_transform, {"input_size": 0}, "input size"),
    (train_transform, {"input_size": 32, "scale": (0.5, 1.0)}, "no effect"),
    (train_transform, {"std": (1.0, 0.0, 1.0)}, "std"),
    (eval_transform, {"mean": (0.5,)}, "mean"),
    (eval_transform, {"crop_pct": 0}, "crop_pct"),
    (eval_transform, {"crop_pct": 1.1}, "crop_pct"),
    (eval_transform, {"input_size": 22.5}, "22.5"),
])
def test_bad_settings_get_a_sentence(build, options, named):
    with pytest.raises(UserError, match=named):
        build(**{"input_size": 64, **NORM, **options})
