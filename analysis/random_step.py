"""The real step on random pictures, for programs that look at the step itself."""
from collections.abc import Iterator

import torch
from torch import Tensor

import engine
import models
from data.erasing import draw_erasure
from data.preparation import Pictures, collate
from losses import create_losses
from models.distiller import Distiller
from models.teacher import FrozenTeacher
from utils import optim
from utils.ema import ModelEma


def random_batches(options: engine.StepOptions, batch_size: int, input_size: int,
                   num_classes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same random images (N, 3, H, W), labels and indices for ever, on the device."""
    images = torch.randn(batch_size, 3, input_size, input_size)
    batch = options.to_device(images, torch.randint(num_classes, (batch_size,)))
    while True:
        yield *batch, torch.arange(batch_size)


def random_pictures(batch_size: int, input_size: int, num_classes: int, *, pin_memory: bool,
                    erasing_prob: float = 0.25) -> Iterator[tuple[Pictures, Tensor, Tensor]]:
    """The same random pictures as the loader hands them over for ever: bytes on the host and what
    is to be erased, labels, indices. For options with `prepare`."""
    samples = []
    for index in range(batch_size):
        pixels = torch.randint(256, (input_size, input_size, 3), dtype=torch.uint8)
        image = pixels.permute(2, 0, 1)
        samples.append((image, draw_erasure(image, erasing_prob),
                        int(torch.randint(num_classes, ())), index))
    pictures, labels, indices = collate(samples)
    if pin_memory:
        pictures, labels = pictures.pin_memory(), labels.pin_memory()
    while True:
        yield pictures, labels, indices


def no_mix(images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    return images, labels


def random_state(student: models.VisionModel, teacher: FrozenTeacher | None,
                 loss_specs: list[list[str]], options: engine.StepOptions, *,
                 keeps_average: bool) -> engine.TrainState:
    """As train_kd.py builds it, with AdamW at a small rate. `loss_specs`: NAME key=value ..."""
    distiller = Distiller(student, *create_losses(loss_specs, student.feature_info,
                                                  teacher and teacher.feature_info))
    distiller.to(options.device, memory_format=options.memory_format).train()
    optimizer = optim.build_adamw(optim.parameter_groups(distiller, 0.05), lr=1e-4,
                                  betas=(0.9, 0.999), eps=1e-8)
    return engine.TrainState(
        distiller=distiller, wrapped=distiller, optimizer=optimizer,
        ema=ModelEma(student) if keeps_average else None,
        scaler=torch.amp.GradScaler(options.device.type,
                                    enabled=options.amp_dtype is torch.float16))
