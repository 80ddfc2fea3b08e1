"""Mixup and CutMix: targets, boxes, shares of the draws; nothing waits, no input is changed."""

import numpy as np
import pytest
import torch

from data.mixup import MIXUP_MODES, Mixup, PairMixup, draw_box
from utils.registry import UserError
from utils.rng import Position

CLASSES = 5


def batch(n=6, height=16, width=24):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, height, width, generator=generator)
    return images, torch.arange(n) % CLASSES


def smooth(labels, smoothing=0.1):
    one_hot = torch.nn.functional.one_hot(labels, CLASSES).float()
    return one_hot * (1 - smoothing) + smoothing / CLASSES


@pytest.mark.parametrize("seed", range(5))
def test_mixup_is_the_convex_sum_with_the_mirrored_batch(seed):
    images, labels = batch()
    mixed, targets = Mixup(CLASSES, cutmix_alpha=0)(images, labels, seed)
    # lambda read off the pixels: mixed = partner + lam * (image - partner)
    lam = ((mixed - images.flip(0)) / (images - images.flip(0))).median()
    assert 0 <= lam <= 1
    torch.testing.assert_close(mixed, lam * images + (1 - lam) * images.flip(0))
    expected = lam * smooth(labels) + (1 - lam) * smooth(labels.flip(0))
    torch.testing.assert_close(targets, expected)


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_pastes_a_box_and_lambda_is_its_real_area(seed):
    images, labels = batch()
    mixed, targets = Mixup(CLASSES, mixup_alpha=0)(images, labels, seed)
    pasted = (mixed != images).any(1)[0]  # (H, W), the same for every image
    rows, columns = pasted.any(1), pasted.any(0)
    assert torch.equal(pasted, rows[:, None] & columns[None, :])
    assert torch.equal(mixed, torch.where(pasted, images.flip(0), images))
    lam = 1 - pasted.float().mean()
    expected = lam * smooth(labels) + (1 - lam) * smooth(labels.flip(0))
    torch.testing.assert_close(targets, expected)


def test_cutmix_box_has_sides_sqrt_of_one_minus_lambda_and_is_clipped():
    rng = np.random.Generator(np.random.PCG64(0))
    boxes = np.array([draw_box(rng, 0.75, 40, 80) for _ in range(3000)])
    tops, bottoms, lefts, rights = boxes.T
    assert tops.min() == 0 and bottoms.max() == 40 and lefts.min() == 0 and rights.max() == 80
    heights, widths = bottoms - tops, rights - lefts
    assert heights.max() == 20 and widths.max() == 40  # sqrt(0.25) of the sides
    inside = (tops > 0) & (bottoms < 40) & (lefts > 0) & (rights < 80)
    assert (heights[inside] == 20).all() and (widths[inside] == 40).all()
    # a centre uniform over the image has its whole height inside in half of the draws
    assert ((tops > 0) & (bottoms < 40)).mean() == pytest.approx(0.5, abs=0.05)
    assert heights.min() == 10  # centre on the border leaves half


def test_smoothed_targets_have_the_stated_values():
    images, labels = batch(4)
    same, targets = Mixup(CLASSES, mixup_alpha=0, cutmix_alpha=0)(images, labels, 0)
    assert same is images and targets.dtype == torch.float32
    assert targets[0, 0].item() == pytest.approx(0.9 + 0.1 / CLASSES)
    assert targets[0, 1].item() == pytest.approx(0.1 / CLASSES)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    _, unsmoothed = Mixup(CLASSES, smoothing=0)(images, torch.zeros_like(labels), 0)
    assert torch.equal(unsmoothed, torch.eye(CLASSES)[[0, 0, 0, 0]])  # mixing a class with itself


@pytest.mark.parametrize("kind", MIXUP_MODES.values())
@pytest.mark.parametrize("off", [{"mixup_alpha": 0, "cutmix_alpha": 0}, {"prob": 0}])
def test_nothing_to_do_returns_the_labels_even_of_an_odd_batch(off, kind):
    images, labels = batch(5)
    same, targets = kind(CLASSES, **off, smoothing=0)(images, labels, 0)
    assert same is images and targets is labels and targets.dtype == torch.int64


def test_draws_follow_prob_and_switch_prob():
    images, labels = batch(2)
    mixup = Mixup(CLASSES, prob=0.6, switch_prob=0.25)
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    for seed in range(2000):
        lam, box = mixup.draw(np.random.Generator(np.random.PCG64(seed)), 224, 224)
        kinds["cutmix" if box else "none" if lam == 1 else "mixup"] += 1
    assert kinds["none"] == pytest.approx(800, abs=90)
    assert kinds["cutmix"] == pytest.approx(300, abs=70)
    untouched = [s for s in range(50) if mixup(images, labels, s)[0] is images]
    assert 8 < len(untouched) < 32
    torch.testing.assert_close(mixup(images, labels, untouched[0])[1], smooth(labels))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 5.0])
def test_lambda_is_beta_distributed(alpha):
    mixup = Mixup(CLASSES, mixup_alpha=alpha, cutmix_alpha=0)
    rng = np.random.Generator(np.random.PCG64(0))
    lams = np.array([mixup.draw(rng, 8, 8)[0] for _ in range(4000)])
    assert lams.mean() == pytest.approx(0.5, abs=0.03)
    assert lams.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)  # Beta(a, a)


def test_cutmix_lambda_uses_its_own_alpha():
    def spread(alpha):
        mixup = Mixup(CLASSES, mixup_alpha=0, cutmix_alpha=alpha)
        rng = np.random.Generator(np.random.PCG64(0))
        return np.std([mixup.draw(rng, 64, 64)[0] for _ in range(1000)])

    assert spread(0.2) > 1.3 * spread(5.0)


@pytest.mark.parametrize("kind", MIXUP_MODES.values())
def test_seed_alone_decides_and_inputs_are_not_written_to(kind):
    images, labels = batch()
    images_before, labels_before = images.clone(), labels.clone()
    mixup = kind(CLASSES)
    first = [mixup(images, labels, seed) for seed in range(20)]
    torch.manual_seed(99)
    np.random.seed(99)
    for seed in reversed(range(20)):
        again = mixup(images, labels, seed)
        assert torch.equal(again[0], first[seed][0]) and torch.equal(again[1], first[seed][1])
    assert torch.equal(images, images_before) and torch.equal(labels, labels_before)
    assert len({result[1].numpy().tobytes() for result in first}) > 15


def test_a_seed_of_64_bits_is_accepted():
    images, labels = batch(2)
    assert Mixup(CLASSES)(images, labels, 2**64 - 1)[1].shape == (2, CLASSES)


@pytest.mark.parametrize("kind", MIXUP_MODES.values())
def test_nothing_is_read_back_from_the_device(kind):
    # Meta tensors have no values: anything that would wait for a GPU to answer raises here.
    images = torch.empty(4, 3, 8, 8, device="meta")
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    for seed in range(6):
        for mixup in [kind(CLASSES, mixup_alpha=0), kind(CLASSES, cutmix_alpha=0)]:
            mixed, targets = mixup(images, labels, seed)
            assert mixed.is_meta and targets.is_meta and targets.dtype == torch.float32


@pytest.mark.parametrize("kind", MIXUP_MODES.values())
def test_dtype_and_memory_format_of_the_images_are_kept(kind):
    images, labels = batch(4)
    images = images.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    for mixup in [kind(CLASSES, mixup_alpha=0), kind(CLASSES, cutmix_alpha=0)]:
        mixed, targets = mixup(images, labels, 1)
        assert mixed.dtype == torch.bfloat16 and targets.dtype == torch.float32
        assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", MIXUP_MODES.values())
def test_odd_batch_is_refused_before_any_draw(kind):
    images, labels = batch(5)
    for seed in range(4):
        with pytest.raises(UserError, match="must be even; got 5"):
            kind(CLASSES, prob=0.01)(images, labels, seed)


@pytest.mark.parametrize("options, named", [
    ({"num_classes": 0}, "num_classes"),
    ({"mixup_alpha": -0.1}, "mixup_alpha"),
    ({"cutmix_alpha": float("inf")}, "cutmix_alpha"),
    ({"cutmix_alpha": float("nan")}, "cutmix_alpha"),
    ({"prob": 1.1}, "mixup prob"),
    ({"switch_prob": -0.1}, "switch_prob"),
    ({"smoothing": 1.0}, "smoothing"),
    ({"smoothing": -0.1}, "smoothing"),
])
def test_bad_settings_get_a_sentence(options, named):
    with pytest.raises(UserError, match=named):
        Mixup(**{"num_classes": CLASSES, **options})


# Pairs


def order_of_an_epoch(n=16, height=10, width=12):
    """As the batches of one epoch, in its order."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, height, width, generator=generator), torch.arange(n) % CLASSES


def cut(monkeypatch, mixup, size, world_size=1, epoch=2):
    """The mixed epoch in its order, where each process has micro-batches of `size`."""
    images, labels = order_of_an_epoch()
    monkeypatch.setattr("data.mixup.world_size", lambda: world_size)
    mixed = []
    for part, first in enumerate(range(0, len(images), size)):
        batch, rank = divmod(part, world_size)
        position = Position(epoch, batch, step=7, micro=batch % 2, rank=rank)
        mixed.append(mixup.at(images[first:first + size], labels[first:first + size], position))
    return [torch.cat(parts) for parts in zip(*mixed)]


@pytest.mark.parametrize("size, world_size", [(4, 2), (4, 1), (2, 4), (16, 1)])
def test_pairs_do_not_depend_on_batches_and_processes(size, world_size, monkeypatch):
    mixup = PairMixup(CLASSES, seed=3)
    images, targets = cut(monkeypatch, mixup, 8)
    again = cut(monkeypatch, mixup, size, world_size)
    assert torch.equal(images, again[0]) and torch.equal(targets, again[1])
    for other in (cut(monkeypatch, mixup, 8, epoch=3),
                  cut(monkeypatch, PairMixup(CLASSES, seed=4), 8)):
        assert not torch.equal(targets, other[1])


def test_each_pair_is_mixed_by_its_own_draw(monkeypatch):
    images, labels = order_of_an_epoch()
    kinds = set()
    for seed in range(4):
        mixed, targets = cut(monkeypatch, PairMixup(CLASSES, prob=0.7, seed=seed), 8)
        one_hot = smooth(labels)
        for a in range(0, 16, 2):
            b = a + 1
            pasted = (mixed[a] == images[b]).all(0)
            if pasted.any():
                lam = 1 - pasted.float().mean()
                rows, columns = pasted.any(1), pasted.any(0)
                assert torch.equal(pasted, rows[:, None] & columns)
                for one, other in ((a, b), (b, a)):
                    assert torch.equal(mixed[one], torch.where(pasted, images[other], images[one]))
            else:
                lam = ((mixed[a] - images[b]) / (images[a] - images[b])).median()
                for one, other in ((a, b), (b, a)):
                    torch.testing.assert_close(
                        mixed[one], lam * images[one] + (1 - lam) * images[other])
            torch.testing.assert_close(targets[a], lam * one_hot[a] + (1 - lam) * one_hot[b])
            torch.testing.assert_close(targets[b], lam * one_hot[b] + (1 - lam) * one_hot[a])
            kinds.add("cutmix" if pasted.any() else "none" if lam == 1 else "mixup")
    assert kinds == {"none", "mixup", "cutmix"}


def test_pairs_draw_as_batches_do(monkeypatch):
    """The same kinds and lambdas, one for each pair: with mean and variance of Beta."""
    mixup, drawn = PairMixup(CLASSES, prob=0.6, switch_prob=0.25), []
    draw = mixup.draw
    monkeypatch.setattr(mixup, "draw", lambda *words: drawn.append(draw(*words)) or drawn[-1])
    images = torch.zeros(1000, 3, 4, 4)
    for batch_number in range(4):
        mixup.at(images, torch.zeros(1000).long(), Position(0, batch_number, 0, 0, 0))
    assert len({*drawn}) > 900
    plain = [lam for lam, box in drawn if box is None and lam < 1]
    assert sum(lam == 1 and box is None for lam, box in drawn) == pytest.approx(800, abs=90)
    assert sum(box is not None for _, box in drawn) == pytest.approx(300, abs=70)
    assert np.mean(plain) == pytest.approx(0.5, abs=0.03)
    assert np.var(plain) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.12)
