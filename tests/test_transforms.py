"""Training and evaluation transforms: sizes, order, ranges, and whose randomness they use."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from data.randaugment import RandAugment
from data.transforms import RandomResizedCrop, eval_transform, to_rgb, train_transform
from utils.registry import UserError


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
    assert tensor.dtype == torch.uint8
    return tensor.permute(1, 2, 0).numpy()


def steps(transform):
    return [type(step).__name__ for step in transform.steps]


@pytest.mark.parametrize("size", [28, 32, 33, 64, 224])
@pytest.mark.parametrize("shape", [(50, 40), (300, 90), (90, 300)])
def test_train_gives_bytes_of_the_asked_size(size, shape):
    torch.manual_seed(0)
    out = train_transform(size)(noise_image(*shape))
    assert out.shape == (3, size, size) and out.dtype == torch.uint8
    assert out.permute(1, 2, 0).is_contiguous()  # as it is stacked


def test_train_order_and_settings():
    large, small = train_transform(224), train_transform(32)
    tail = ["RandomHorizontalFlip", "RandAugment"]
    assert isinstance(large.read, RandomResizedCrop) and steps(large) == tail
    assert small.read is to_rgb and steps(small) == ["RandomCrop", *tail]
    assert large.read.scale == (0.08, 1.0) and large.read.ratio == (3 / 4, 4 / 3)
    assert not large.read.fast
    assert large.random_erasing_prob == small.random_erasing_prob == 0.25
    assert isinstance(large.steps[1], RandAugment) and large.steps[1].magnitude == 9


def test_train_options_change_what_they_say():
    bare = train_transform(64, auto_augment="none", random_erasing_prob=0)
    assert steps(bare) == ["RandomHorizontalFlip"] and bare.random_erasing_prob == 0
    assert bare.finish(noise_image(64, 64))[1] is None
    assert train_transform(64, auto_augment="rand-m3-inc1").steps[1].magnitude == 3
    whole = train_transform(
        64, auto_augment="none", random_erasing_prob=0, scale=(1.0, 1.0), ratio=(1.0, 1.0),
        hflip_prob=1.0)
    assert whole.read.ratio == (1.0, 1.0)
    image = ramp_image(64, 64)
    np.testing.assert_array_equal(to_uint8(whole(image)), np.asarray(image)[:, ::-1])


def test_small_inputs_are_padded_by_four_never_resized():
    image = ramp_image(32, 32)
    transform = train_transform(
        32, auto_augment="none", random_erasing_prob=0, hflip_prob=0)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
    windows = {padded[i:i + 32, j:j + 32].tobytes(): (i, j) for i in range(9) for j in range(9)}
    torch.manual_seed(0)
    found = {windows[to_uint8(transform(image)).tobytes()] for _ in range(200)}  # KeyError if not
    assert {i for i, _ in found} == set(range(9)) and {j for _, j in found} == set(range(9))


@pytest.mark.parametrize("size", [32, 64])
def test_only_torch_randomness_is_used(size):
    transform, image = train_transform(size), noise_image(70, 60)

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
    np.testing.assert_array_equal(to_uint8(eval_transform(224)(image)), expected)


def test_eval_warps_from_384_unless_crop_pct_is_given():
    image = noise_image(120, 60)
    warped = np.asarray(image.resize((384, 384), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(to_uint8(eval_transform(384)(image)), warped)
    wide = np.asarray(image.resize((768, 384), Image.Resampling.BICUBIC))[:, 192:576]
    np.testing.assert_array_equal(
        to_uint8(eval_transform(384, crop_pct=1.0)(image)), wide)
    assert steps(eval_transform(383)) == ["Resize", "CenterCrop"]


def test_eval_does_not_resize_32_px():
    image = noise_image(32, 32)
    np.testing.assert_array_equal(to_uint8(eval_transform(32)(image)), np.asarray(image))
    assert "Resize" not in steps(eval_transform(32))


@pytest.mark.parametrize("size", [16, 32, 33, 64, 224, 384])
@pytest.mark.parametrize("crop_pct", [None, 1.0, 0.9])
def test_eval_size_and_repeatability(size, crop_pct):
    transform = eval_transform(size, crop_pct=crop_pct)
    for shape in [(100, 70), (70, 100)]:
        out = transform(noise_image(*shape))
        assert out.shape == (3, size, size) and out.dtype == torch.uint8
        assert torch.equal(out, transform(noise_image(*shape)))


def test_eval_crop_pct_one_is_the_whole_short_side():
    square = noise_image(64, 64)
    for size in [32, 64]:
        expected = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
        out = eval_transform(size, crop_pct=1.0)(square)
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
    (train_transform, {"input_size": 32, "fast_decode": True}, "--fast-decode has no effect"),
    (eval_transform, {"crop_pct": 0}, "crop_pct"),
    (eval_transform, {"crop_pct": 1.1}, "crop_pct"),
    (eval_transform, {"input_size": 22.5}, "22.5"),
])
def test_bad_settings_get_a_sentence(build, options, named):
    with pytest.raises(UserError, match=named):
        build(**{"input_size": 64, **options})
