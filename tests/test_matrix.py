"""Every kind of teacher teaches every kind of student with every kind of loss: one training step
and one evaluation each. Here with small networks; `pytest tests/test_matrix.py --slow` takes every
network at full size."""
import functools
import math

import pytest
import torch

import engine
from models import create_model
from models.base import IMAGENET_MEAN, IMAGENET_STD
from models.distiller import FrozenTeacher
from tests.helpers import make_batches, make_options, make_state, no_mix

TEACHERS = ("slak_t", "slak_s", "slak_b", "convnext_t", "convnext_s", "swin_t", "deit_s", "vit_s",
            "vit_b", "cswin_t", "resnet50d", "efficientnet_b3")
STUDENTS = ("resnet18", "resnet34", "resnet50", "convnext_t", "convnext_s", "convnext_t_bn",
            "convnext_s_bn", "convnextv2_t", "convnextv2_s", "mobilenetv3_l")
# A small network of every architecture among them.
SMALL_TEACHERS = ("slak_nano", "convnext_nano", "swin_nano", "vit_nano", "cswin_nano",
                  "resnet_d_nano", "efficientnet_nano")
SMALL_STUDENTS = ("resnet_nano", "convnext_nano", "convnext_bn_nano", "convnextv2_nano",
                  "mobilenetv3_nano")
LOSSES = (("kd",), ("nkd",), ("ce", "fd"), ("nkd", "fd"))


@functools.lru_cache(maxsize=1)  # the tests go through the students of one teacher first
def random_teacher(name: str, num_classes: int) -> FrozenTeacher:
    return FrozenTeacher(create_model(name, num_classes), IMAGENET_MEAN, IMAGENET_STD)


class OneBatch(list):
    """What engine.evaluate asks of a loader."""

    num_samples = 2


def step_and_evaluate(teacher_name: str, student_name: str, num_classes: int, pixels: int) -> None:
    """With random weights and images, at batch 2, for each kind of loss."""
    teacher, options = random_teacher(teacher_name, num_classes), make_options()
    for losses in LOSSES:
        student = create_model(student_name, num_classes)
        state = make_state(student, {name: {} for name in losses}, teacher, lr=1e-4)
        state.wrapped.train()
        batches = make_batches(2, size=2, pixels=pixels)
        engine.accumulate_gradients(state, iter(batches), teacher, no_mix, options)
        engine.optimizer_update(state, options.clip_grad)
        loss = engine.checked_means(state)["loss"]
        assert 0 < loss < math.inf
        evaluation = engine.evaluate(student, OneBatch(batches[1:]), options=options)
        assert evaluation.num_samples == 2 and math.isfinite(evaluation.loss)
    with torch.no_grad():
        feature = student.eval().forward_with_features(batches[0].images).features[-1]
    channels, stride = student.feature_info[-1]
    assert feature.shape == (2, channels, pixels // stride, pixels // stride)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("student", SMALL_STUDENTS)
@pytest.mark.parametrize("teacher", SMALL_TEACHERS)
def test_small_networks(teacher, student):
    step_and_evaluate(teacher, student, num_classes=10, pixels=64)


@pytest.mark.slow
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_full_size(teacher, student):
    step_and_evaluate(teacher, student, num_classes=1000, pixels=224)
