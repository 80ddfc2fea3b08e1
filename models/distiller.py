"""Everything with a gradient in one module, to be wrapped once by DDP and optimised as one."""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import ModelOutput, VisionModel
from utils.registry import UserError, one_line

# Images that a CPU takes through the network at a time, so that maps stay in its caches. Nothing
# that a frozen network does depends on the other images of a batch.
IMAGES_AT_A_TIME = 4


class FrozenTeacher(nn.Module):
    """`model` for inference only: evaluation mode for ever, no gradient, folded, channels-last.

    It takes the batches of the student, normalised with `data_mean` and `data_std`, and gives
    `model` what its weights expect: its own normalisation and, where they have one, their size.
    """

    def __init__(self, model: VisionModel, data_mean: tuple[float, ...],
                 data_std: tuple[float, ...]) -> None:
        super().__init__()
        self.num_parameters = sum(p.numel() for p in model.parameters())  # before folding
        self.model = model.eval().fold().requires_grad_(False)
        self.model.to(memory_format=torch.channels_last)
        self.feature_info, self.num_classes = model.feature_info, model.num_classes
        self.input_size = model.input_size or model.native_size
        # (p - m) / s from x = (p - dm) / ds is x * (ds / s) + (dm - m) / s.
        stats = [torch.tensor(values).view(1, 3, 1, 1)
                 for values in (data_mean, data_std, model.input_mean, model.input_std)]
        self.register_buffer("scale", stats[1] / stats[3])
        self.register_buffer("shift", (stats[0] - stats[2]) / stats[3])
        self.renormalises = (tuple(data_mean), tuple(data_std)) != (model.input_mean,
                                                                    model.input_std)
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenTeacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> ModelOutput:
        """(N, 3, H, W) -> logits and stage maps without gradient history."""
        if self.renormalises:
            images = images * self.scale + self.shift
        if self.input_size not in (None, images.shape[-1]):
            images = F.interpolate(images, (self.input_size, self.input_size), mode="bicubic",
                                   antialias=True)
        if images.device.type != "cpu" or len(images) <= IMAGES_AT_A_TIME:
            return self.model.forward_with_features(images)
        parts = [self.model.forward_with_features(part) for part in images.split(IMAGES_AT_A_TIME)]
        maps = zip(*[part.features for part in parts])
        return ModelOutput(torch.cat([part.logits for part in parts]), [*map(torch.cat, maps)])


class PendingOutput(NamedTuple):
    """What a stream of the GPU is still computing."""

    output: ModelOutput
    stream: torch.cuda.Stream

    @torch.compiler.disable
    def wait(self) -> ModelOutput:
        """The output, safe to use on the current stream. The host does not wait."""
        current = torch.cuda.current_stream()
        current.wait_stream(self.stream)
        for tensor in (self.output.logits, *self.output.features):
            tensor.record_stream(current)  # its memory is the other stream's
        return self.output


class OnOwnStream:
    """The teacher on a CUDA stream of its own, beside the forward pass of the student, which asks
    for the output when its losses need it."""

    def __init__(self, teacher: FrozenTeacher, device: torch.device) -> None:
        self.teacher, self.stream = teacher, torch.cuda.Stream(device)

    def __call__(self, images: Tensor) -> PendingOutput:
        self.stream.wait_stream(torch.cuda.current_stream())  # for the images
        with torch.cuda.stream(self.stream):
            output = self.teacher(images)
        images.record_stream(self.stream)
        return PendingOutput(output, self.stream)


class Distiller(nn.Module):
    """The student and the losses, whose projections train with it but are never part of it.

    `losses` maps a name to a module called `(student, teacher, targets)`; `weights` has its factor.
    """

    def __init__(self, student: VisionModel, losses: dict[str, nn.Module],
                 weights: dict[str, float]) -> None:
        super().__init__()
        self.student = student
        self.losses = nn.ModuleDict(losses)
        self.weights = weights

    def forward(self, images: Tensor, targets: Tensor,
                teacher: ModelOutput | PendingOutput | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, and each raw term under its name."""
        student = self.student.forward_with_features(images)
        if isinstance(teacher, PendingOutput):
            teacher = teacher.wait()
        terms = self.terms(student, teacher, targets)
        return sum(self.weights[name] * term for name, term in terms.items()), terms

    def terms(self, student: ModelOutput, teacher: ModelOutput | None,
              targets: Tensor) -> dict[str, Tensor]:
        """Each raw loss under its name, in float32 whatever the caller's autocast."""
        with torch.autocast(student.logits.device.type, enabled=False):
            return {name: loss(student, teacher, targets) for name, loss in self.losses.items()}

    @torch.no_grad()
    def check(self, images: Tensor, targets: Tensor, teacher: nn.Module | None) -> None:
        """Raises UserError when teacher, student and losses do not go together on such a batch.
        Leaves no trace."""
        was_training = self.training
        self.eval()
        try:
            # forward itself: a compiled module would be compiled for this odd batch, too.
            self.forward(images, targets, teacher and teacher.forward(images))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"teacher, student and losses do not go together at --input-size "
                            f"{images.shape[-1]}: {one_line(error)}.") from error
        finally:
            self.train(was_training)

    def no_weight_decay(self) -> set[str]:
        return {f"student.{name}" for name in self.student.no_weight_decay()}

    def layer_ids(self) -> dict[str, int]:
        """The student's; the losses' own parameters train at the full rate, as its head does."""
        ids = {f"student.{name}": i for name, i in self.student.layer_ids().items()}
        last = max(ids.values())
        return {name: ids.get(name, last) for name, _ in self.named_parameters()}
