"""The outlines data set: a pure function of its counter; no class in dot or pixel counts."""
import numpy as np
import pytest

from data.outlines import GROUND, Outlines
from utils.registry import UserError


def images_of(split: str, count: int, **options) -> tuple[np.ndarray, np.ndarray]:
    samples = [Outlines(split, count, **options).load(i) for i in range(count)]
    return np.stack([np.asarray(image) for image, _ in samples]), np.array([y for _, y in samples])


def test_sample_depends_on_seed_split_and_index_only():
    first, second = Outlines("train", 50, seed=3), Outlines("train", 80, seed=3)
    second.load(7)  # an earlier load leaves no trace
    assert first.load(20)[0].tobytes() == second.load(20)[0].tobytes()
    images = {Outlines(split, 50, seed=seed).load(index)[0].tobytes()
              for split in ("train", "val") for seed in (0, 1) for index in range(50)}
    assert len(images) == 200


def test_labels_are_balanced():
    data = Outlines("val", 100)
    labels = [data.load(i)[1] for i in range(len(data))]
    assert len(data.classes) == len(set(data.classes)) == 10
    assert np.bincount(labels).tolist() == [10] * 10


@pytest.mark.parametrize("image_size", [32, 64, 96])
def test_image_is_rgb_of_the_asked_size(image_size):
    image, label = Outlines("train", 12, image_size=image_size).load(11)
    assert image.mode == "RGB" and image.size == (image_size, image_size) and label == 1


def test_every_dot_is_inside_the_image():
    data = Outlines("train", 500)
    for index in range(500):
        dots = data._place_dots(np.random.default_rng(index), data.curves[index % 10])
        assert dots.min() >= 2.9 and dots.max() <= 61.1


def test_name_says_which_sample():
    assert Outlines("train", 20).name_of(17) == "outlines train sample 17 (seed 0)"


def test_number_of_dots_does_not_tell_the_class():
    data = Outlines("train", 4000)
    counts = np.array([len(data._place_dots(np.random.default_rng(i), data.curves[i % 10]))
                       for i in range(4000)]).reshape(-1, 10)
    standard_error = counts.std() / len(counts) ** 0.5
    assert np.abs(counts.mean(0) - counts.mean()).max() < 4 * standard_error


def test_colour_histogram_is_at_chance():
    """Nearest class mean over per-channel histograms: chance is 10 %, and 4 standard deviations of
    1000 guesses are 3.8 points."""
    images, labels = images_of("train", 2000)
    bins = np.stack([np.stack([np.histogram(image[..., c], 16, (0, 256))[0] for c in range(3)])
                     for image in images]).reshape(len(images), -1).astype(float)
    bins = (bins - bins.mean(0)) / (bins.std(0) + 1e-6)
    means = np.stack([bins[:1000][labels[:1000] == k].mean(0) for k in range(10)])
    distance = ((bins[1000:, None] - means) ** 2).sum(2)
    assert (distance.argmin(1) == labels[1000:]).mean() < 0.138


def test_number_of_bright_pixels_does_not_tell_the_class():
    images, labels = images_of("val", 2000)
    bright = (images.mean(3) > GROUND[1] + 30).sum((1, 2))
    means = np.array([bright[labels == k].mean() for k in range(10)])
    standard_error = bright.std() / 200 ** 0.5
    assert np.abs(means - bright.mean()).max() < 4 * standard_error


@pytest.mark.parametrize("arguments, said", [
    (("test", 10), "splits train and val"),
    (("train", 0), "as size"),
    (("train", 2.5), "as size"),
    (("train", 10, -1), "as seed"),
    (("train", 10, 0, 8), "as image_size"),
])
def test_bad_argument_is_named(arguments, said):
    with pytest.raises(UserError, match=said):
        Outlines(*arguments)


@pytest.mark.parametrize("index", [-1, 10])
def test_index_outside_is_an_error(index):
    with pytest.raises(IndexError, match="0 to 9"):
        Outlines("train", 10).load(index)
