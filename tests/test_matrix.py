"""Every kind of teacher teaches every kind of student with every kind of loss."""
import pytest
import torch

from analysis.matrix import LOSSES, STUDENTS, TEACHERS, main, run_cell
from models import create_model, list_models
from models.base import IMAGENET_MEAN, IMAGENET_STD
from models.distiller import FrozenTeacher
from tests.helpers import make_options

# A small network of every architecture in the full matrix.
SMALL_TEACHERS = ("slak_nano", "convnext_nano", "swin_nano", "vit_nano", "cswin_nano",
                  "resnet_d_nano", "efficientnet_nano")
SMALL_STUDENTS = ("resnet_nano", "convnext_nano", "convnext_bn_nano", "convnextv2_nano",
                  "mobilenetv3_nano")


@pytest.fixture(scope="module")
def teachers() -> dict[str, FrozenTeacher]:
    return {name: FrozenTeacher(create_model(name, 7), IMAGENET_MEAN, IMAGENET_STD)
            for name in SMALL_TEACHERS}


@pytest.mark.parametrize("student", SMALL_STUDENTS)
@pytest.mark.parametrize("teacher", SMALL_TEACHERS)
def test_one_step_and_one_evaluation(teacher, student, teachers):
    for losses in LOSSES:
        cell = run_cell(teacher, student, losses, teacher=teachers[teacher], num_classes=7,
                        batch_size=2, input_size=64, options=make_options())
        channels = create_model(student, 7).feature_info[-1].channels
        assert cell.student_map == f"{channels}x2x2" and cell.loss > 0


def test_the_full_matrix_names_registered_models():
    assert set(TEACHERS) | set(STUDENTS) <= set(list_models())


def test_the_command_prints_a_row_per_cell(capsys):
    words = ["--teachers", "slak_pico", "--students", "resnet_nano", "convnext_bn_pico",
             "--input-size", "64", "--num-classes", "5"]
    assert main(words) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 2 * len(LOSSES) and "| 96x8x8 | 128x2x2 |" in rows[2]
    assert main(["--teachers", "slak_picco"]) == 2
    assert "Did you mean 'slak_pico'" in capsys.readouterr().err
    assert torch.is_grad_enabled()
