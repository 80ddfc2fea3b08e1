"""What the device does with the loader's bytes: normalising, and erasing what was drawn before."""
import numpy as np
import pytest
import torch
from torchvision import transforms as T

import data
import engine
from data import loader as loading
from data.batch import (
    RATIO,
    SCALE,
    BatchTransform,
    ImageBatch,
    collate,
    draw_erasure,
    erase_,
    normal_noise,
)
from models.base import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers import make_options
from utils.registry import UserError

TRANSFORM = BatchTransform(IMAGENET_MEAN, IMAGENET_STD)


def every_level() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)


def image_batch(pixels: torch.Tensor, *erased: tuple) -> ImageBatch:
    num_pixels = sum(height * width for _, _, _, height, width, _ in erased)
    return ImageBatch(pixels, torch.tensor(erased, dtype=torch.int64).view(-1, 6), num_pixels)


# Normalising


def test_every_level_equals_to_tensor_and_normalize():
    image = every_level()[0].permute(1, 2, 0).numpy()
    former = T.Compose([T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])(image)
    now = TRANSFORM(image_batch(every_level()))
    assert now.dtype == torch.float32
    torch.testing.assert_close(now[0], former, rtol=0, atol=1e-6)
    exact = (every_level()[0].double() / 255 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1).double()
             ) / torch.tensor(IMAGENET_STD).view(3, 1, 1).double()
    assert (now[0] - exact).abs().max() < 1e-6


@pytest.mark.parametrize("mean, std", [((0.5,), (0.2, 0.2, 0.2)), ((0, 0, 0), (1, 0, 1)),
                                       ((0, 0, 0), (1, 1))])
def test_bad_statistics_get_a_sentence(mean, std):
    with pytest.raises(UserError, match="both need three numbers"):
        BatchTransform(mean, std)


def test_the_engine_transforms_once_and_leaves_ready_images_alone():
    options = make_options(batch_transform=TRANSFORM)
    labels = torch.zeros(1, dtype=torch.long)
    images, _ = options.to_device(image_batch(every_level()), labels)
    assert torch.equal(images, TRANSFORM(image_batch(every_level())))
    assert images.is_contiguous(memory_format=torch.channels_last)
    ready = torch.randn(1, 3, 8, 8)
    assert torch.equal(make_options().to_device(ready, labels)[0], ready)
    assert engine.StepOptions._field_defaults["batch_transform"] is None


def test_a_batch_of_the_loader_is_channels_last_and_keeps_its_order():
    source = data.create_dataset("outlines", "val", None, val_size=6, image_size=40)
    transform = data.eval_transform(40, crop_pct=1.0)
    batch, = data.eval_loader(source, transform, batch_size=6, num_workers=0)
    images, labels, indices, readable = batch
    assert len(images) == 6 and images.pixels.dtype == torch.uint8 and images.num_erased == 0
    assert images.pixels.is_contiguous(memory_format=torch.channels_last)
    assert images.erased.shape == (0, 6) and labels.tolist() == indices.tolist()
    assert readable.dtype == torch.bool and readable.all()
    for image, index in zip(images.pixels, indices.tolist()):
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(source.load(index)[0]))


# Drawing rectangles


def draws(number: int, prob: float, size: int = 224) -> list:
    pixels = torch.zeros(3, size, size)
    torch.manual_seed(0)
    return [draw_erasure(pixels, prob) for _ in range(number)]


def test_the_share_of_erased_images():
    drawn = draws(4000, 0.25)
    assert 0.22 < sum(erasure is not None for erasure in drawn) / 4000 < 0.28
    assert not any(draws(50, 0.0)) and all(draws(50, 1.0))


def test_a_rectangle_is_the_one_torchvision_draws_from_the_same_state():
    image = torch.zeros(3, 224, 224)
    for seed in range(50):
        torch.manual_seed(seed)
        erasure = draw_erasure(image, 1.0)
        torch.manual_seed(seed)
        erased = T.RandomErasing(1.0, scale=SCALE, ratio=RATIO, value=1)(image)
        assert erased[0].nonzero().min(0).values.tolist() == [erasure.top, erasure.left]
        assert erased[0].nonzero().max(0).values.tolist() == [
            erasure.top + erasure.height - 1, erasure.left + erasure.width - 1]


def test_rectangles_are_distributed_as_torchvisions_with_noise():
    """With value="random" torchvision draws its noise between size and place: other places from
    the same state, the same distribution."""
    drawn = draws(3000, 1.0)
    ours = np.array([erasure[:4] for erasure in drawn], dtype=float)
    image = torch.zeros(3, 224, 224)
    torch.manual_seed(1)
    theirs = np.array([T.RandomErasing.get_params(image, SCALE, RATIO, None)[:4]
                       for _ in range(3000)], dtype=float)
    for values in (ours, theirs):
        area = values[:, 2] * values[:, 3] / 224 ** 2
        assert 0.018 < area.min() and area.max() < 0.335
    for left, right in ((ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]),
                        (np.log(ours[:, 2] / ours[:, 3]), np.log(theirs[:, 2] / theirs[:, 3])),
                        (ours[:, 0], theirs[:, 0]), (ours[:, 1], theirs[:, 1])):
        assert largest_gap(left, right) < 1.63 * (2 / 3000) ** 0.5  # Kolmogorov-Smirnov, 1 %
    assert len({erasure.key for erasure in drawn}) == 3000


def largest_gap(left: np.ndarray, right: np.ndarray) -> float:
    at = np.sort(np.concatenate([left, right]))
    shares = [np.searchsorted(np.sort(values), at, side="right") / len(values)
              for values in (left, right)]
    return np.abs(shares[0] - shares[1]).max()


def test_an_image_too_flat_for_any_rectangle_stays():
    assert draw_erasure(torch.zeros(3, 1, 1000), 1.0) is None


# Filling them


def test_only_the_rectangles_change_and_each_as_if_alone():
    pixels = torch.randint(0, 256, (5, 3, 20, 30), dtype=torch.uint8)
    erased = [(1, 2, 3, 4, 5, 77), (3, 0, 0, 19, 29, 2 ** 62 + 5), (4, 19, 29, 1, 1, 0)]
    plain = TRANSFORM(image_batch(pixels))
    together = TRANSFORM(image_batch(pixels, *erased))
    for place in (0, 2):
        assert torch.equal(together[place], plain[place])
    for place, *rectangle in erased:
        alone = TRANSFORM(image_batch(pixels[place:place + 1], (0, *rectangle)))[0]
        assert torch.equal(alone, together[place])
        top, left, height, width, _ = rectangle
        changed = (together[place] != plain[place]).all(0)
        expected = torch.zeros(20, 30, dtype=torch.bool)
        expected[top:top + height, left:left + width] = True
        assert torch.equal(changed, expected)
    other_key = TRANSFORM(image_batch(pixels, (1, 2, 3, 4, 5, 78)))[1]
    assert not torch.isclose(other_key, together[1])[:, 2:6, 3:8].any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_in_memory_does_not_matter(layout):
    images = torch.zeros(2, 3, 8, 8).to(memory_format=layout)
    erase_(images, torch.tensor([[1, 2, 1, 3, 4, 9]]), 12)
    expected = torch.zeros(2, 3, 8, 8)
    counter = torch.arange(36).view(3, 4, 3)  # row, column, channel
    expected[1, :, 2:5, 1:5] = normal_noise(torch.tensor(9), counter).permute(2, 0, 1)
    assert torch.equal(images, expected)


def test_the_noise_is_split_mix_64():
    """Its first outputs from the seed 1234567 (Vigna's splitmix64.c)."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    uniform = np.array([((output >> 41) + 0.5) / 2 ** 23 for output in outputs])
    noise = normal_noise(torch.tensor(1234567), torch.arange(4)).double()
    quantiles = (1 + torch.erf(noise / 2 ** 0.5)) / 2
    np.testing.assert_allclose(quantiles, uniform, atol=1e-6)


def test_the_noise_is_standard_normal_and_independent():
    keys = torch.tensor([0, 1, 2 ** 62, 5])
    noise = normal_noise(keys[:, None], torch.arange(200_000)).double()
    assert noise.isfinite().all() and noise.abs().max() < 6
    for row in noise:
        assert row.mean().abs() < 0.01 and (row.var() - 1).abs() < 0.015
        assert (row ** 3).mean().abs() < 0.03 and ((row ** 4).mean() - 3).abs() < 0.08
        for lag in (1, 2, 3, 672):  # neighbouring channels, pixels, rows
            assert (row[lag:] * row[:-lag]).mean().abs() < 0.012
    assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 0.012


# From the loader on


def transformed(batch_size: int, keys: list[tuple[int, int]], **options) -> torch.Tensor:
    source = data.create_dataset("outlines", "train", None, train_size=24, image_size=40)
    transform = data.train_transform(40, **{"random_erasing_prob": 0.7, **options})
    samples = loading.Samples(source, transform, seed=0)
    batches = [collate([samples[key] for key in keys[first:first + batch_size]])
               for first in range(0, len(keys), batch_size)]
    return torch.cat([TRANSFORM(batch.images) for batch in batches])


def test_erasing_depends_on_the_sample_alone():
    keys = [(epoch, index) for epoch in (0, 1) for index in range(6)]
    whole = transformed(12, keys)
    assert torch.equal(transformed(4, keys), whole)
    assert torch.equal(transformed(5, keys[::-1]), whole.flip(0))
    unerased = transformed(12, keys, random_erasing_prob=0)
    num_erased = (whole != unerased).flatten(1).any(1).sum().item()
    assert 4 <= num_erased <= 12
    unchanged = (whole == unerased).all(1)
    assert unchanged.flatten(1).any(1).all()  # and the rest of each image is as without


def test_a_pinned_batch_keeps_everything():
    batch = image_batch(every_level(), (0, 1, 2, 3, 4, 5))
    for copy in (batch.to(torch.device("cpu"), non_blocking=True),
                 batch.pin_memory() if torch.cuda.is_available() else batch.to("cpu")):
        assert torch.equal(copy.pixels, batch.pixels) and torch.equal(copy.erased, batch.erased)
        assert copy.num_erased == 12
