"""RandAugment: operations pixel for pixel, the drawing of them, and the policy strings."""

import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data import randaugment
from data.randaugment import (
    OPERATION_NAMES,
    OPERATIONS,
    RandAugment,
    ThreeAugment,
    apply_operation,
    parse_policy,
)
from utils.registry import UnknownName, UserError

# From the published code (timm 0.6.13): one image and what every operation makes of it.
# Keys are "name/mag<magnitude>/arg<argument>".
GOLDENS = np.load(Path(__file__).parent / "fixtures" / "randaugment.npz")
KEYS = [key for key in GOLDENS.files if key != "image"]


def read_key(key):
    name, magnitude, argument = re.fullmatch(r"(\w+)/mag([\d.]+)/arg(.+)", key).groups()
    if argument == "none":
        return name, float(magnitude), None
    number = int(argument) if argument.lstrip("-").isdigit() else float(argument)
    return name, float(magnitude), number


@pytest.fixture
def image():
    return Image.fromarray(GOLDENS["image"])


@pytest.mark.parametrize("key", KEYS)
def test_operation_equals_published_pixels(key, image):
    name, _, argument = read_key(key)
    before = np.asarray(image).copy()
    result = apply_operation(image, name, argument)
    assert result.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(result), GOLDENS[key])
    np.testing.assert_array_equal(np.asarray(image), before)


@pytest.mark.parametrize("key", KEYS)
def test_magnitude_gives_published_argument(key):
    name, magnitude, argument = read_key(key)
    operation = OPERATIONS[name]
    ours = [operation.argument(m) for m in ([magnitude, -magnitude] if operation.signed
                                            else [magnitude])]
    if argument is None:
        assert ours == [None]
    else:
        assert min(abs(value - argument) for value in ours) < 1e-12
        assert type(ours[0]) is type(argument)


def test_goldens_cover_every_operation():
    assert {read_key(key)[0] for key in KEYS} == set(OPERATION_NAMES)
    assert len(OPERATION_NAMES) == 15
    # two arguments per magnitude in the goldens, one per sign, tell which operations have a sign
    counts = Counter(read_key(key)[0] for key in KEYS)
    assert {n for n in counts if counts[n] == 4} == {n for n in counts if OPERATIONS[n].signed}


def test_level_10_reaches_the_published_ends(image):
    assert OPERATIONS["PosterizeIncreasing"].argument(10) == 0
    assert OPERATIONS["PosterizeIncreasing"].argument(0) == 4
    assert OPERATIONS["SolarizeIncreasing"].argument(10) == 0
    assert OPERATIONS["SolarizeIncreasing"].argument(0) == 256
    black = apply_operation(image, "PosterizeIncreasing", 0)
    assert black.mode == "RGB" and black.size == image.size
    assert not np.asarray(black).any()
    for name, operation in OPERATIONS.items():
        for magnitude in [-10, 0, 10] if operation.signed else [0, 10]:
            assert apply_operation(image, name, operation.argument(magnitude)).size == image.size


def test_translation_is_relative_to_its_own_side():
    wide = Image.fromarray(np.full((20, 60, 3), 200, np.uint8))
    moved_x = np.asarray(apply_operation(wide, "TranslateXRel", 0.5))
    moved_y = np.asarray(apply_operation(wide, "TranslateYRel", 0.5))
    fill = np.array(randaugment.FILL)
    assert (moved_x[:, :29] == 200).all() and (moved_x[:, 31:] == fill).all()
    assert (moved_y[:9] == 200).all() and (moved_y[11:] == fill).all()


def test_solarize_add_brightens_below_128_and_saturates():
    values = np.arange(256)
    grey = Image.fromarray(np.repeat(values[None, :, None].astype(np.uint8), 3, 2))
    for amount in [110, 200]:
        expected = np.where(values < 128, np.minimum(values + amount, 255), values)
        result = np.asarray(apply_operation(grey, "SolarizeAdd", amount))
        np.testing.assert_array_equal(result, np.repeat(expected[None, :, None], 3, 2))


def test_unknown_operation_names_the_known_ones(image):
    with pytest.raises(UnknownName, match="'Rotat'.*Rotate"):
        apply_operation(image, "Rotat", 3)


def record_draws(monkeypatch, augment, num_images, seed=0):
    draws = []
    monkeypatch.setattr(
        randaugment, "apply_operation", lambda im, name, arg: draws.append((name, arg)) or im)
    torch.manual_seed(seed)
    for _ in range(num_images):
        augment(None)
    return draws


def test_operations_are_drawn_uniformly_half_the_time(monkeypatch):
    draws = record_draws(monkeypatch, RandAugment(), 6000)
    assert len(draws) == pytest.approx(6000, abs=4 * 55)  # 12000 coins, deviation 55
    counts = Counter(name for name, _ in draws)
    for name in OPERATION_NAMES:
        assert counts[name] == pytest.approx(400, abs=4 * 20)  # deviation about 20


def test_same_operation_may_come_twice(monkeypatch):
    draws = record_draws(monkeypatch, RandAugment(op_prob=1.0), 600)
    pairs = list(zip(draws[::2], draws[1::2], strict=True))
    same = sum(first[0] == second[0] for first, second in pairs)
    assert same == pytest.approx(40, abs=25)  # 600 / 15 with replacement, 0 without


def test_magnitudes_are_normal_around_9_with_both_signs(monkeypatch):
    draws = record_draws(monkeypatch, RandAugment(op_prob=1.0), 8000)
    angles = np.array([argument for name, argument in draws if name == "Rotate"])
    assert abs(angles).max() <= 30 and (abs(angles) == 30).any()  # 2.3% are clipped at level 10
    assert abs(angles).mean() == pytest.approx(27, abs=0.3)
    assert abs(angles).std() == pytest.approx(1.5, abs=0.2)
    assert (angles < 0).mean() == pytest.approx(0.5, abs=0.07)
    added = np.array([argument for name, argument in draws if name == "SolarizeAdd"])
    assert (added > 60).all() and added.max() == 110  # no sign here
    colours = np.array([argument for name, argument in draws if name == "ColorIncreasing"])
    assert colours.min() >= 0.1 - 1e-9 and colours.max() <= 1.9 + 1e-9


def test_settings_reach_the_draws(monkeypatch):
    assert record_draws(monkeypatch, RandAugment(op_prob=0.0), 50) == []
    draws = record_draws(monkeypatch, RandAugment(4.5, 0, num_ops=3, op_prob=1.0), 200)
    assert len(draws) == 600
    assert {argument for name, argument in draws if name == "Rotate"} == {-13.5, 13.5}
    low = record_draws(monkeypatch, RandAugment(0, 5, op_prob=1.0), 300)
    assert min(argument for name, argument in low if name == "SolarizeAdd") == 0  # clipped at 0


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "ta", "3a"])
def test_torch_seed_alone_decides(image, policy):
    augment = pickle.loads(pickle.dumps(parse_policy(policy)))  # as workers get it

    def run(seed):
        torch.manual_seed(seed)
        return [np.asarray(augment(image)).tobytes() for _ in range(8)]

    first = run(3)
    np.random.seed(1)
    assert run(3) == first
    assert run(4) != first


def test_the_three_of_deit_iii(image):
    """Each about as often; without the jitter they are what Pillow makes of these words."""
    augment = ThreeAugment()
    augment.jitter = lambda image: image
    grey, solarised = ImageOps.grayscale(image).convert("RGB"), ImageOps.solarize(image, 128)
    torch.manual_seed(0)
    results = [augment(image) for _ in range(300)]
    counts = [sum(result == wanted for result in results) for wanted in (grey, solarised)]
    blurred = [np.asarray(result) for result in results if result not in (grey, solarised)]
    assert all(70 < count < 130 for count in (*counts, len(blurred)))
    roughness = [np.abs(np.diff(pixels.astype(float), axis=0)).mean() for pixels in blurred]
    assert min(roughness) < np.abs(np.diff(np.asarray(image).astype(float), axis=0)).mean()
    assert max(roughness) > 1.05 * min(roughness)  # by different radii
    assert len({np.asarray(ThreeAugment()(image)).tobytes() for _ in range(9)}) == 9


def test_policy_string():
    def settings(policy):
        r = parse_policy(policy)
        return r.magnitude, r.magnitude_std, r.num_ops, r.op_prob

    assert settings("rand-m9-mstd0.5-inc1") == (9, 0.5, 2, 0.5)
    assert settings("rand-inc1-n3-p0.25-m7.5") == (7.5, 0, 3, 0.25)
    assert settings("rand-inc1") == (10, 0, 2, 0.5)  # timm's meaning of parts left out


@pytest.mark.parametrize("policy, named", [
    ("rand-m9-mstd0.5", "inc1"),
    ("rand-m9-inc0", "'inc0'"),
    ("rand-m9-w0-inc1", "'w0'"),
    ("rand-m9-mstd0.5-inc1-", "''"),
    ("rand-m-inc1", "'m'"),
    ("rand-m9-m8-inc1", "twice"),
    ("augmix-m3-inc1", "does not begin"),
    ("", "rand"),
    ("rand-m11-inc1", "0..10"),
    ("rand-n0-inc1", "num_ops"),
    ("rand-n1.5-inc1", "1.5"),
    ("rand-p1.5-inc1", "op_prob"),
])
def test_bad_policy_gets_a_sentence(policy, named):
    with pytest.raises(UserError) as error:
        parse_policy(policy)
    assert named in str(error.value)


@pytest.mark.parametrize("options", [
    {"magnitude": -1}, {"magnitude_std": -0.5}, {"magnitude_std": float("inf")},
    {"magnitude": float("nan")}, {"num_ops": 0}, {"op_prob": 1.1}])
def test_bad_settings_get_a_sentence(options):
    with pytest.raises(UserError, match=next(iter(options))):
        RandAugment(**options)
