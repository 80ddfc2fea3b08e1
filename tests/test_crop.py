"""The random crop: torchvision's pixels without --fast-decode, its rectangles always."""
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

import data
from data.randaugment import parse_policy
from data.transforms import RandomResizedCrop, decoding_factor, resize_by_integers, to_rgb
from tests.test_data import big_jpeg
from utils.rng import seeded

PHOTOGRAPHS = Path(os.environ.get("L2S_PHOTOGRAPHS", Path(__file__).parents[2]
                                  / "shared" / "data" / "imagenet-mini64" / "val"))
POLICY = "rand-m9-mstd0.5-inc1"


def jpeg(size: tuple[int, int], mode: str = "RGB", **options) -> bytes:
    """A photograph-like image."""
    rng = np.random.default_rng(size[0])
    coarse = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(
        buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def crops(**options) -> RandomResizedCrop:
    return RandomResizedCrop(**{"size": 64, "scale": (0.08, 1), "ratio": (3 / 4, 4 / 3), **options})


def drawn(seed: int, function, *values):
    with seeded(seed, "augment"):
        return function(*values)


def difference(left: Image.Image, right: Image.Image) -> float:
    return np.abs(np.asarray(left).astype(int) - np.asarray(right)).mean()


def test_the_pixels_are_torchvisions(tmp_path):
    """Crop, flip and RandAugment of the two pipelines, from the same seeds."""
    for number, size in enumerate(((300, 200), (199, 333), (640, 480))):
        big_jpeg(tmp_path / "train" / "ant" / f"{number}.jpg", size)
    assert_same_pixels(tmp_path / "train", epochs=8)


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"no photographs in {PHOTOGRAPHS}: set "
                    "L2S_PHOTOGRAPHS to a folder with one folder per class")
def test_the_pixels_of_photographs_are_torchvisions():
    assert_same_pixels(PHOTOGRAPHS, epochs=1, size=224)


def assert_same_pixels(root: Path, epochs: int, size: int = 64) -> None:
    theirs = T.Compose([
        T.RandomResizedCrop(size, interpolation=T.InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(), parse_policy(POLICY), T.PILToTensor()])
    folder = ImageFolder(str(root))
    source = data.create_dataset("imagefolder", root.name, str(root.parent))
    ours = data.train_transform(size)
    for index in range(len(source)):
        for seed in range(epochs):
            expected = drawn(seed, theirs, folder.loader(folder.samples[index][0]))
            assert torch.equal(drawn(seed, ours, source.load(index)[0]), expected)


@pytest.mark.parametrize("width, height, size, factor", [
    (447, 900, 224, 1), (448, 448, 224, 2), (900, 895, 224, 2), (900, 896, 224, 4),
    (1792, 1792, 224, 8), (10 ** 4, 10 ** 4, 224, 8), (10 ** 4, 300, 224, 1), (223, 100, 224, 1)])
def test_the_factor_leaves_enough_pixels(width, height, size, factor):
    assert decoding_factor(width, height, size) == factor
    if factor > 1:
        assert min(width, height) / factor >= size


def test_the_rectangles_are_the_same_and_never_too_small():
    content = jpeg((803, 601))
    seen = set()
    for seed in range(60):
        slow, box, factor = drawn(seed, crops().decode, opened(content))
        assert slow.size == (803, 601) and factor == 1
        fast, same_box, factor = drawn(seed, crops(fast=True).decode, opened(content))
        assert same_box == box
        assert fast.size == (-(-803 // factor), -(-601 // factor)) and fast.mode == "RGB"
        width, height = box[2] - box[0], box[3] - box[1]
        assert factor == 1 or min(width, height) / factor >= 64
        assert factor == 8 or min(width, height) / (2 * factor) < 64
        seen.add(factor)
    assert seen == {2, 4, 8}


@pytest.mark.parametrize("size", [(803, 601), (641, 480), (150, 130)])
def test_fast_pixels_are_near_and_others(size):
    """Whole crops of smooth images, so that a shift by half a pixel would show."""
    content = jpeg(size)
    for seed in range(10):
        slow, fast = (drawn(seed, crops(fast=fast), opened(content)) for fast in (False, True))
        assert slow.size == fast.size == (64, 64)
        assert 0 < difference(slow, fast) < 1.0


def test_a_scaled_box_lies_where_it_should():
    """A ramp read through the scaled decoding, its edges included."""
    dither = np.random.default_rng(0).random((512, 1024))  # else rounding goes one way everywhere
    levels = np.floor(np.linspace(0, 254, 1024) + dither).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).convert("RGB").save(buffer, "JPEG", quality=100, subsampling=0)
    for seed in range(10):
        slow, fast = (drawn(seed, crops(fast=fast), opened(buffer.getvalue()))
                      for fast in (False, True))
        gap = np.asarray(slow).astype(int) - np.asarray(fast)
        assert abs(gap.mean()) < 0.25 and np.abs(gap).max() <= 3  # 1 px = 0.25


@pytest.mark.parametrize("mode, options", [("L", {}), ("CMYK", {}), ("RGB", {"progressive": True}),
                                           ("RGB", {"subsampling": 0})])
def test_every_kind_of_jpeg(mode, options):
    content = jpeg((640, 512), mode, **options)
    for seed in range(5):
        slow, fast = (drawn(seed, crops(fast=fast), opened(content)) for fast in (False, True))
        assert fast.mode == "RGB" and difference(slow, fast) < 1.5


def test_what_is_no_jpeg_or_is_decoded_already_is_read_whole():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 640, 3), np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    decoded = opened(jpeg((640, 512)))
    decoded.load()
    for content in (image, opened(buffer.getvalue()), decoded):
        image, _, factor = drawn(0, crops(fast=True).decode, content)
        assert image.size == (640, 512) and factor == 1


@pytest.mark.parametrize("is_fast", [False, True])
def test_exif_does_not_turn_an_image(is_fast):
    """As before, and as in the published runs."""
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = jpeg((640, 512)), jpeg((640, 512), exif=exif)
    assert opened(turned).getexif()[0x0112] == 6
    for seed in range(3):
        left, right = (drawn(seed, crops(fast=is_fast), opened(content))
                       for content in (plain, turned))
        assert difference(left, right) == 0


def test_integer_resize_is_pillows_to_a_level():
    image = to_rgb(opened(jpeg((300, 260))))
    for size in (64, 224, 400):
        gap = np.abs(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
                     - np.asarray(resize_by_integers(image, size)))
        assert gap.mean() < 0.1 and gap.max() <= 3


@pytest.mark.parametrize("is_fast", [False, True])
def test_a_source_without_decoding_leaves_errors_to_the_crop(is_fast):
    whole = jpeg((640, 512))
    with pytest.raises(OSError, match="truncated"):
        drawn(0, crops(fast=is_fast), opened(whole[:len(whole) // 2]))
