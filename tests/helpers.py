"""What several test files build."""
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

import engine
import losses
from data.batch import Batch
from models.base import IMAGENET_MEAN, IMAGENET_STD
from models.distiller import Distiller, FrozenTeacher
from models.slak import SLaK
from utils import optim
from utils.optim import ModelEma
from utils.rng import Position

FIXTURES = Path(__file__).parent / "fixtures"
MICRO = dict(num_classes=10, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), layer_scale_init=0.5)


def read_json(name: str) -> dict:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def micro_slak(**options) -> SLaK:
    """The published class at the size of the reference numbers."""
    return SLaK(**{**MICRO, "kernel_size": (13, 11, 9, 7, 5), **options})


def micro_convnext_bn(**options) -> SLaK:
    return SLaK(**{**MICRO, "kernel_size": (7, 7, 7, 7, 100), "width_factor": 1.0,
                   "decomposed": False, **options})


@torch.no_grad()
def fill_by_name(model: nn.Module, salt: int = 20230530) -> nn.Module:
    """The weights of the reference numbers: every tensor drawn from its published name."""
    for name, tensor in model.state_dict().items():
        rng = np.random.RandomState((zlib.crc32(name.encode()) + salt) % 2 ** 32)
        shape = tuple(tensor.shape)
        if name.endswith(("relative_position_index", "attn_mask")):
            continue
        if name.endswith("num_batches_tracked"):
            value = np.array(7)
        elif name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("running_mean"):
            value = 0.1 * rng.standard_normal(shape)
        elif name.endswith("gamma") and len(shape) == 1:
            value = 0.3 + 0.1 * rng.standard_normal(shape)
        elif len(shape) <= 1:
            value = float(name.endswith("weight")) + 0.1 * rng.standard_normal(shape)
        else:
            value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        tensor.copy_(torch.as_tensor(value))
    return model


def make_options(**changes) -> engine.StepOptions:
    return engine.StepOptions(**{
        "device": torch.device("cpu"), "amp_dtype": None, "memory_format": torch.channels_last,
        "accum_steps": 1, "clip_grad": None, "seed": 0, **changes})


def make_state(student: nn.Module, loss_specs: dict[str, dict], teacher: FrozenTeacher | None,
               *, lr: float = 1e-3, ema: bool = False, fp16_scaler: bool = False
               ) -> engine.TrainState:
    """A TrainState as train_kd builds it; `loss_specs`: name -> options."""
    teacher_info = None if teacher is None else teacher.feature_info
    modules = {name: losses.create_loss(name, student.feature_info, teacher_info, **options)
               for name, options in loss_specs.items()}
    distiller = Distiller(student, modules, dict.fromkeys(modules, 1.0))
    distiller.to(memory_format=torch.channels_last)
    optimizer = optim.build_optimizer("adamw", optim.parameter_groups(distiller, 0.05), lr=lr)
    options = make_options(amp_dtype=torch.float16 if fp16_scaler else None)
    return engine.build_state(distiller, optimizer, options,
                              ema=ModelEma(student, 0.9) if ema else None)


def no_mix(images: torch.Tensor, labels: torch.Tensor, position: Position) -> tuple:
    return images, labels


def make_batches(number: int, size: int = 4, pixels: int = 64) -> list[Batch]:
    """What a loader gives, seeded."""
    rng = torch.Generator().manual_seed(1)
    return [make_batch(torch.randn(size, 3, pixels, pixels, generator=rng),
                       torch.randint(0, 10, (size,), generator=rng)) for _ in range(number)]


def make_batch(images: torch.Tensor, labels: torch.Tensor) -> Batch:
    return Batch(images, labels, torch.arange(len(labels)),
                 torch.ones(len(labels), dtype=torch.bool))


def make_teacher() -> FrozenTeacher:
    return FrozenTeacher(fill_by_name(micro_slak()), IMAGENET_MEAN, IMAGENET_STD)
