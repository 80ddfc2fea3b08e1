"""The batched augmentation against torchvision: the same distributions, the same pixels for given
parameters, and nothing that waits for a device."""
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from data import batched
from data.batch import RATIO, SCALE, BatchTransform, ImageBatch, draw_erasure
from data.batched import BatchedTransform, Colours, Drawn
from data.transforms import CROP_RATIO, CROP_SCALE, train_transform
from models.base import IMAGENET_MEAN, IMAGENET_STD
from utils.registry import UserError

NUMBER = 3000  # draws of each side
# Three images' of 96 x 128 px.
GOLDEN = {
    "boxes": [[58, 18, 50, 52], [48, 7, 75, 65], [33, 16, 72, 54]],
    "erased": [[0, 22, 4, 10, 27, -3012402443010733873],
               [1, 33, 8, 10, 31, -1197716345728446848],
               [2, 27, 11, 13, 26, 5977136610301210025]],
    "flipped": [True, False, False],
    "order": [[0, 2, 1], [2, 0, 1], [2, 1, 0]],
    "factors": [[1.142668, 1.105499, 1.07237], [0.973289, 1.180234, 1.165775],
                [1.292476, 1.065798, 1.103957]],
}


def transform(size: int = 48, policy: str = "3a", **options) -> BatchedTransform:
    return BatchedTransform(train_transform(size, auto_augment=policy, **options))


def drawn(number: int, height: int, width: int, **options) -> Drawn:
    return transform(**options).draw(3, 1, torch.arange(number),
                                     torch.tensor([[height, width]]).expand(number, 2))


def photographs(number: int, height: int = 60, width: int = 50, seed: int = 0) -> torch.Tensor:
    """Smooth images (N, H, W, 3) with edges, uint8."""
    rng = np.random.default_rng(seed)
    return torch.stack([torch.from_numpy(np.array(Image.fromarray(
        rng.integers(0, 256, (7, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)))
        for _ in range(number)])


def lines(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 1, 3, 2).float().contiguous()


def planes(images: torch.Tensor) -> torch.Tensor:
    """Lines (N, S, 3, S) -> (N, 3, S, S)."""
    return images.permute(0, 2, 1, 3)


def largest_gap(left, right) -> float:
    """Between two samples' distribution functions: Kolmogorov's and Smirnov's."""
    left, right = np.sort(np.asarray(left, float)), np.sort(np.asarray(right, float))
    at = np.concatenate([left, right])
    return np.abs(np.searchsorted(left, at, "right") / len(left)
                  - np.searchsorted(right, at, "right") / len(right)).max()


def assert_alike(left, right) -> None:
    """Two samples of one distribution differ by more in one case of 10,000."""
    assert largest_gap(left, right) < 2.2 * math.sqrt((len(left) + len(right))
                                                      / (len(left) * len(right)))


def assert_share(hits: torch.Tensor, prob: float) -> None:
    """Within four standard deviations."""
    assert abs(float(hits.double().mean()) - prob) < 4 * math.sqrt(prob * (1 - prob) / len(hits))


# Distributions


@pytest.mark.parametrize("height, width", [(100, 130), (40, 300)])  # the second mostly falls back
def test_crops_are_drawn_as_torchvision_draws_them(height, width):
    torch.manual_seed(0)
    image = Image.new("RGB", (width, height))
    theirs = torch.tensor([T.RandomResizedCrop.get_params(image, CROP_SCALE, CROP_RATIO)
                           for _ in range(NUMBER)]).numpy()
    ours = drawn(NUMBER, height, width).boxes.numpy()
    for of_box in (lambda y, x, h, w: h * w, lambda y, x, h, w: w / h,
                   lambda y, x, h, w: y / np.maximum(height - h, 1),
                   lambda y, x, h, w: x / np.maximum(width - w, 1), lambda y, x, h, w: h):
        assert_alike(of_box(*ours.T), of_box(*theirs.T))
    top, left, box_height, box_width = ours.T
    assert (top >= 0).all() and (top + box_height <= height).all() and (box_height > 0).all()
    assert (left >= 0).all() and (left + box_width <= width).all() and (box_width > 0).all()


def test_the_crop_of_an_image_that_no_try_fits_is_torchvisions():
    for height, width in ((10, 400), (400, 10), (11, 10)):
        ours = drawn(5, height, width, scale=(1.0, 1.0), ratio=(0.9, 1.0)).boxes
        theirs = T.RandomResizedCrop.get_params(
            Image.new("RGB", (width, height)), (1.0, 1.0), (0.9, 1.0))
        assert (ours == torch.tensor(theirs)).all()


def test_erasures_are_drawn_as_from_disk():
    torch.manual_seed(0)
    pixels = torch.zeros(3, 48, 48, dtype=torch.uint8)
    theirs = [draw_erasure(pixels, 0.6) for _ in range(NUMBER)]
    theirs = np.array([erasure[:4] for erasure in theirs if erasure is not None])
    ours = drawn(NUMBER, 100, 100, random_erasing_prob=0.6)
    place, top, left, height, width, key = ours.erased.unbind(1)
    assert ours.num_erased == int((height * width).sum())
    assert_share(torch.isin(torch.arange(NUMBER), place), 0.6)
    for of_box in (lambda y, x, h, w: h * w, lambda y, x, h, w: h / np.maximum(w, 1),
                   lambda y, x, h, w: y / (48 - h), lambda y, x, h, w: x / (48 - w)):
        assert_alike(of_box(*ours.erased[:, 1:5].numpy().T), of_box(*theirs.T))
    assert len(set(key.tolist())) == len(key) and (key < 0).any()  # all 64 bits
    assert abs(math.log(RATIO[0]) + math.log(RATIO[1])) < 1e-9  # height and width may be exchanged
    assert height.max() < 48 and width.max() < 48
    assert SCALE[0] * 0.5 < ((height * width) / 48 ** 2).min()


def test_flips_and_colours_have_their_shares():
    found = drawn(NUMBER, 50, 50, hflip_prob=0.3)
    assert_share(found.is_flipped, 0.3)
    colours = found.colours
    places = torch.cat([colours.grey, colours.solarised, colours.blurred])
    assert places.sort().values.equal(torch.arange(NUMBER))  # each image is one of the three
    for kind in (colours.grey, colours.solarised, colours.blurred):
        assert_share(torch.isin(torch.arange(NUMBER), kind), 1 / 3)
    assert_alike(colours.sigma, np.linspace(0.1, 2, NUMBER))
    for factor in colours.factors.T:
        assert_alike(factor, np.linspace(0.7, 1.3, NUMBER))
    orders, counts = colours.order.unique(dim=0, return_counts=True)
    assert orders.sort(1).values.equal(torch.arange(3).expand(6, 3))
    assert (counts - NUMBER / 6).abs().max() < 4 * math.sqrt(NUMBER * 5 / 36)
    assert drawn(9, 50, 50, policy="none").colours is None
    for prob, is_any in ((0.0, False), (1.0, True)):
        assert drawn(50, 50, 50, hflip_prob=prob).is_flipped.unique().tolist() == [is_any]
    assert len(drawn(50, 50, 50, random_erasing_prob=0).erased) == 0


# A draw is a function of seed, epoch and index


def test_a_draw_depends_on_nothing_but_its_key():
    indices = torch.tensor([7, 3, 12345678901, 3, 0])
    sizes = torch.tensor([[90, 80], [64, 48], [50, 500], [64, 48], [200, 31]])
    augment = transform(random_erasing_prob=0.8)
    whole = augment.draw(5, 2, indices, sizes)
    for row, index in enumerate(indices):
        alone = augment.draw(5, 2, index[None], sizes[row, None])
        assert alone.boxes.equal(whole.boxes[row, None])
        assert alone.is_flipped.equal(whole.is_flipped[row, None])
        assert alone.colours.factors.equal(whole.colours.factors[row, None])
        assert alone.colours.order.equal(whole.colours.order[row, None])
        assert alone.erased[:, 1:].equal(whole.erased[whole.erased[:, 0] == row][:, 1:])
    assert whole.boxes[1].equal(whole.boxes[3])
    for seed, epoch in ((4, 2), (5, 1)):
        assert not augment.draw(seed, epoch, indices, sizes).boxes.equal(whole.boxes)


def test_the_draws_of_a_run_stay_what_they_are():
    """A run that continues under a later version goes on as it would have."""
    found = transform(random_erasing_prob=1).draw(0, 0, torch.arange(3),
                                                  torch.tensor([[128, 96]]).expand(3, 2))
    assert found.boxes.tolist() == GOLDEN["boxes"]
    assert found.erased.tolist() == GOLDEN["erased"]
    assert found.is_flipped.tolist() == GOLDEN["flipped"]
    assert found.colours.order.tolist() == GOLDEN["order"]
    torch.testing.assert_close(found.colours.factors, torch.tensor(GOLDEN["factors"]))


# Pixels for given parameters


@pytest.mark.parametrize("size", [20, 40, 64])
def test_crops_have_torchvisions_pixels(size):
    """To a grey level of resized_crop of tensors, from which one in 100 values differs at all."""
    images = photographs(6)
    boxes = torch.tensor([[0, 0, 60, 50], [3, 5, 20, 40], [30, 10, 30, 7], [7, 2, size // 2, 33],
                          [1, 1, 58, 9], [10, 0, 40, 40]])
    is_flipped = torch.tensor([False, True] * 3)
    ours = planes(batched.resize(images, boxes, is_flipped, size,
                                 batched.count_taps(boxes, size)))
    for row, (image, box) in enumerate(zip(images.permute(0, 3, 1, 2), boxes.tolist())):
        args = (*box, [size, size], InterpolationMode.BICUBIC)
        expected = TF.resized_crop(image, *args, antialias=True)
        of_pillow = TF.pil_to_tensor(TF.resized_crop(TF.to_pil_image(image), *args))
        alone = batched.cut(images[row], *box, size).permute(2, 0, 1)
        found = ours[row].flip(2) if is_flipped[row] else ours[row]
        away = (found - expected).abs()
        assert away.max() <= 1 and (away > 0).float().mean() < 0.01
        for others in (of_pillow, alone):  # rounded and limited in between, too
            away = (found - others).abs()
            assert away.mean() < 0.3 and (away > 1).float().mean() < 0.01
        assert ((alone.int() - of_pillow).abs() > 1).float().mean() < 1e-3


def colours_of(**changes) -> Colours:
    """Those of two images that change nothing."""
    none = torch.zeros(0, dtype=torch.int64)
    return Colours(**{"grey": none, "solarised": none, "blurred": none, "sigma": torch.zeros(0),
                      "factors": torch.ones(2, 3), "order": torch.tensor([[0, 1, 2]] * 2),
                      **changes})


BOTH, LONE = torch.tensor([0, 1]), torch.tensor([1])


@pytest.mark.parametrize("changes, expected", [
    ({}, lambda x: x),
    ({"grey": BOTH}, lambda x: TF.rgb_to_grayscale(x, 3)),
    ({"solarised": BOTH}, lambda x: TF.solarize(x, 128)),
    *(({"blurred": BOTH, "sigma": torch.tensor([sigma] * 2)},
       lambda x, sigma=sigma: TF.gaussian_blur(x, 17, sigma)) for sigma in (0.1, 0.8, 2.0)),
    *(({"factors": torch.ones(2, 3).index_fill(1, torch.tensor(kind), factor)},
       lambda x, adjust=adjust, factor=factor: adjust(x, factor))
      for kind, adjust in enumerate((TF.adjust_brightness, TF.adjust_contrast,
                                     TF.adjust_saturation)) for factor in (0.7, 1.23)),
])
def test_colours_have_torchvisions_pixels(changes, expected):
    images = photographs(2, 40, 40)
    ours = planes(batched.change_colours_(lines(images), colours_of(**changes)))
    away = (ours - expected(images.permute(0, 3, 1, 2)).float()).abs()
    assert away.max() <= 1
    assert (ours.round() == ours).all() and ours.min() >= 0 and ours.max() <= 255


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_blurring_small_images(size):
    """The kernel, of 17 pixels at most, is no longer than what there is to mirror."""
    images = photographs(2, size, size)
    weights = batched.blurring_weights(torch.tensor([0.7, 2.0]), size)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, size))
    ours = planes(batched.separable(lines(images), weights, weights))
    if size > 1:
        kernel = min(17, 2 * size - 1)
        expected = torch.stack([TF.gaussian_blur(image.float(), kernel, sigma) for image, sigma in
                                zip(images.permute(0, 3, 1, 2), (0.7, 2.0))])
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)


def test_every_order_of_the_jitter_and_one_kind_for_each_image():
    image = photographs(1, 30, 30)
    factors = torch.tensor([[0.75, 1.3, 0.8]])
    steps = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    images = lines(image).expand(6, -1, -1, -1).contiguous()
    colours = colours_of(factors=factors.expand(6, 3), order=batched.ORDERS, solarised=LONE)
    ours = planes(batched.change_colours_(images, colours))
    for row, order in enumerate(batched.ORDERS.tolist()):
        expected = image.permute(0, 3, 1, 2)
        if row == 1:
            expected = TF.solarize(expected, 128)
        for kind in order:
            expected = steps[kind](expected, float(factors[0, kind]))
        assert (ours[row] - expected[0].float()).abs().max() <= 3  # a level for each step


@pytest.mark.parametrize("height, width", [(32, 32), (40, 36), (20, 9), (1, 1)])
def test_small_inputs_are_padded_and_cut_as_torchvision_does(height, width):
    """Every offset occurs as often, and the pixels are those of torchvision's crop to the bit."""
    images = photographs(1, height, width).expand(400, -1, -1, -1)
    augment = transform(32, "none", hflip_prob=0, random_erasing_prob=0)
    found = augment.draw(0, 0, torch.arange(400), torch.tensor([[height, width]]).expand(400, 2))
    sides = torch.tensor([height, width])
    padding = 4 + (32 - sides - 8).clamp_min(0)  # T.RandomCrop(32, padding=4, pad_if_needed=True)
    padded = TF.pad(images[0].permute(2, 0, 1), padding.flip(0).tolist())
    expected = torch.stack([TF.crop(padded, *(corner + padding).tolist(), 32, 32)
                            for corner in found.boxes[:, :2]])
    assert augment.one_by_one(list(images), found).equal(expected)
    assert augment.at_once(images, found.boxes, found).equal(expected)
    for corner, room in zip((found.boxes[:, :2] + padding).T, padded.shape[1:]):
        assert_alike(corner, np.arange(400) % (room - 32 + 1))


# Ways to the same batch


def test_images_one_by_one_and_all_at_once_are_the_same(monkeypatch):
    images = photographs(8, 70, 66)
    augment = transform(40, hflip_prob=0.5)
    found = augment.draw(0, 0, torch.arange(8), torch.tensor([[70, 66]]).expand(8, 2))
    alone = augment.one_by_one(list(images), found)
    together = augment.at_once(images, found.boxes, found)
    away = (alone.int() - together).abs().float()
    assert away.mean() < 0.3 and away.max() <= 6
    for batch in (alone, together):
        assert batch.dtype == torch.uint8 and batch.shape == (8, 3, 40, 40)
        assert batch.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(batched, "PIXELS_AT_ONCE", 3 * 70 * 66)
    in_parts = augment.at_once(images, found.boxes, found)
    assert (in_parts.int() - together).abs().max() <= 1


@pytest.mark.parametrize("policy, number", [("none", 5), ("3a", 5), ("3a", 1)])
def test_nothing_waits_for_the_device(policy, number):
    """On torch's meta device, which has no values, asking for one is an error."""
    meta = torch.device("meta")
    found = drawn(number, 50, 60, policy=policy, random_erasing_prob=1).to(meta)
    pixels = torch.zeros(number, 50, 60, 3, dtype=torch.uint8, device=meta)
    images = transform(policy=policy).at_once(pixels, found.boxes, found)
    batch = ImageBatch(images, found.erased, found.num_erased)
    floats = BatchTransform(IMAGENET_MEAN, IMAGENET_STD, meta)(batch)
    assert floats.shape == (number, 3, 48, 48) and floats.is_meta


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "ta"])
def test_what_is_done_to_single_images_only_is_refused(policy):
    with pytest.raises(UserError, match="--aa 3a or none"):
        transform(policy=policy)
    with pytest.raises(UserError, match=f"not by {policy}"):
        batched.check_policy(policy)


def test_fast_decoding_is_refused():
    with pytest.raises(UserError, match="--fast-decode does nothing"):
        transform(fast_decode=True)
