"""The teacher, frozen; and everything with a gradient in one module, which DDP wraps once and the
optimizer sees as one."""
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import ModelOutput, VisionModel
from utils.registry import UserError, one_line

# Images that a CPU takes through the network at a time, so that maps stay in its caches. Nothing
# that a frozen network does depends on the other images of a batch.
IMAGES_AT_A_TIME = 4
# Channels whose 16-bit values fill 16 bytes: products on matrix units load no less at once.
WIDTH_MULTIPLE = 8


def frozen_dtype(amp_dtype: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """What a FrozenTeacher holds its weights in: the half precision of the run on a GPU; None on
    other devices, where autocast is no slower."""
    return amp_dtype if device.type == "cuda" else None


class FrozenTeacher(nn.Module):
    """`model` for inference only: evaluation mode for ever, no gradient, folded, channels-last.

    It takes the batches of the student, normalised with `data_mean` and `data_std`, and gives
    `model` what its weights expect: its own normalisation and, where it is not the usual 224 px or
    the network accepts no other, their size.

    `dtype`: a half precision that weights and maps are held in throughout, the caller's autocast
    being left; widths are then filled up to what matrix units take. None: the weights stay as they
    are, and autocast is the caller's.
    """

    def __init__(self, model: VisionModel, data_mean: tuple[float, ...],
                 data_std: tuple[float, ...], *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_parameters = model.num_parameters  # before folding
        self.dtype = dtype
        self.model = model.eval().fold().requires_grad_(False)
        # In a list, so that it is no part of this module: what is counted has the plain widths.
        self.plain = [copy.deepcopy(self.model).to("meta")]
        if dtype is not None:
            self.model.pad_widths(WIDTH_MULTIPLE).to_half(dtype)
        self.model.to(memory_format=torch.channels_last)
        self.feature_info, self.num_classes = model.feature_info, model.num_classes
        self.input_size = model.input_size
        # Whether it resizes all images to that.
        self.fixed_size = model.fixed_size or model.input_size != VisionModel.input_size
        # (p - m) / s from x = (p - dm) / ds is x * (ds / s) + (dm - m) / s.
        data_mean, data_std, mean, std = [
            torch.tensor(values).view(1, 3, 1, 1)
            for values in (data_mean, data_std, model.input_mean, model.input_std)]
        self.renormalises = not (data_mean.equal(mean) and data_std.equal(std))
        self.register_buffer("scale", data_std / std)
        self.register_buffer("shift", (data_mean - mean) / std)
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenTeacher":
        return super().train(False)

    def count_macs(self, input_size: int) -> int:
        """MACs of one image of this side, folded, without what widths are filled up with."""
        return self.plain[0].count_macs(input_size)

    def compile(self) -> None:
        """Compile `forward_with_features` after its next call, in which the network prepares what
        depends on the size of its maps: that is neither captured nor a reason to compile again.
        `forward` stays as it is, for the batches of an evaluation have other sizes."""
        self.forward_with_features = self._call_and_compile

    def _call_and_compile(self, images: Tensor) -> ModelOutput:
        output = self._run(images)
        self.forward_with_features = torch.compile(self._run)
        return output

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, num_classes)."""
        return self._run(images).logits

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        """(N, 3, H, W) -> logits and stage maps without gradient history."""
        return self._run(images)

    @torch.no_grad()
    def _run(self, images: Tensor) -> ModelOutput:
        if self.renormalises:
            images = images * self.scale + self.shift
        if self.fixed_size and images.shape[-1] != self.input_size:
            images = F.interpolate(images, (self.input_size, self.input_size), mode="bicubic",
                                   antialias=True)
        if self.dtype is None:
            return self._in_parts(images)
        with torch.autocast(images.device.type, enabled=False):
            return self._in_parts(images.to(self.dtype))

    def _in_parts(self, images: Tensor) -> ModelOutput:
        if images.device.type != "cpu" or len(images) <= IMAGES_AT_A_TIME:
            return self.model.forward_with_features(images)
        parts = [self.model.forward_with_features(part) for part in images.split(IMAGES_AT_A_TIME)]
        stages = zip(*[part.features for part in parts])
        return ModelOutput(torch.cat([part.logits for part in parts]),
                           [torch.cat(maps) for maps in stages])


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

    def forward(self, images: Tensor, targets: Tensor, teacher: ModelOutput | None
                ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The weighted sum of the losses, each raw term under its name, and the student's logits
        (N, num_classes) in float32, detached, for what is only logged.

        The losses are computed in float32, whatever the caller's autocast.
        """
        student = self.student.forward_with_features(images)
        with torch.autocast(images.device.type, enabled=False):
            terms = {name: loss(student, teacher, targets) for name, loss in self.losses.items()}
        total = sum(self.weights[name] * term for name, term in terms.items())
        return total, terms, student.logits.detach().float()

    @torch.no_grad()
    def check(self, images: Tensor, targets: Tensor, teacher: FrozenTeacher | None,
              batch_size: int) -> None:
        """Raises UserError when teacher, student and losses do not go together on such images, or
        in batches of this size. Leaves no trace."""
        size = images.shape[-1]
        if self.student.fixed_size and self.student.input_size != size:
            raise UserError(f"the student takes {self.student.input_size} px only, and --input-size"
                            f" is {size}.")
        has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in self.modules())
        if batch_size == 1 and has_batch_norm:
            raise UserError("--batch-size 1 leaves BatchNorm nothing to average over; use 2 or "
                            "more.")
        was_training = self.training
        self.eval()
        try:
            output = None if teacher is None else teacher.forward_with_features(images)
            # forward itself: a compiled module would be compiled for this odd batch, too.
            self.forward(images, targets, output)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"teacher, student and losses do not go together at --input-size "
                            f"{size}: {one_line(error)}.") from error
        finally:
            self.train(was_training)

    def no_weight_decay(self) -> set[str]:
        return {f"student.{name}" for name in self.student.no_weight_decay()}

    def layer_ids(self) -> dict[str, int]:
        """The student's; the losses' own parameters train at the full rate, as its head does."""
        ids = {f"student.{name}": i for name, i in self.student.layer_ids().items()}
        last = max(ids.values())
        return {name: ids.get(name, last) for name, _ in self.named_parameters()}
