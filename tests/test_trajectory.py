"""Eight steps of the engine against the published code's, loss by loss."""
import numpy as np
import pytest
import torch

import engine
from data.batch import Batch
from data.mixup import Mixup
from models.base import IMAGENET_MEAN, IMAGENET_STD
from models.distiller import FrozenTeacher
from tests.helpers import (
    fill_by_name,
    make_batch,
    make_options,
    make_state,
    micro_convnext_bn,
    micro_slak,
    read_json,
)
from utils.rng import Position

LOSSES = {"nkd": {}, "kd": {"temperature": 1.0, "alpha": 0.1}, "ce": {}}


def reference_batches(num_steps: int = 8) -> list[Batch]:
    """Images and labels drawn as the reference run drew them."""
    rng = np.random.RandomState(20230535)
    batches = []
    for _ in range(num_steps):
        images = torch.tensor(rng.standard_normal((8, 3, 64, 64)), dtype=torch.float32)
        batches.append(make_batch(images, torch.tensor(rng.randint(0, 10, 8))))
    return batches


def mix_targets(images: torch.Tensor, labels: torch.Tensor, position: Position) -> tuple:
    """0.7 / 0.3 mix of the labels and the flipped labels, smoothed by 0.1; images as they are."""
    smooth = Mixup(10, mixup_alpha=0, cutmix_alpha=0, smoothing=0.1)
    _, targets = smooth(images, labels, seed=0)
    return images, 0.7 * targets + 0.3 * targets.flip(0)


@pytest.mark.parametrize("name", LOSSES)
def test_eight_steps_equal_the_published_code(name):
    expected = read_json("trajectory")[name]
    teacher = None
    if name != "ce":
        teacher = FrozenTeacher(fill_by_name(micro_slak()), IMAGENET_MEAN, IMAGENET_STD)
    student = fill_by_name(micro_convnext_bn(), salt=20230531)
    state = make_state(student, {name: LOSSES[name]}, teacher)
    batches = reference_batches()
    options = make_options()
    state.wrapped.train()
    seen = []
    for batch in batches:
        before = state.meter.means().get("loss", 0) * len(seen)
        engine.accumulate_gradients(state, iter([batch]), teacher, mix_targets, options)
        engine.optimizer_update(state, None)
        seen.append(state.meter.means()["loss"] * (len(seen) + 1) - before)
    np.testing.assert_allclose(seen, expected["losses"], rtol=1e-4)
    student.eval()
    with torch.no_grad():
        logits = student(batches[-1].images).flatten()[:16]
    np.testing.assert_allclose(logits, expected["final_eval_logits_first16"], atol=1e-4)
