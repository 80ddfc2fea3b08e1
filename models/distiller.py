"""Everything with a gradient in one module, to be wrapped once by DDP and optimised as one."""
import torch
from torch import Tensor, nn

from models.base import ModelOutput, VisionModel


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
                teacher: ModelOutput | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, and each raw term under its name."""
        student = self.student.forward_with_features(images)
        with torch.autocast(images.device.type, enabled=False):
            terms = {name: loss(student, teacher, targets) for name, loss in self.losses.items()}
            total = sum(self.weights[name] * term for name, term in terms.items())
        return total, terms

    def no_weight_decay(self) -> set[str]:
        return {f"student.{name}" for name in self.student.no_weight_decay()}

    def layer_ids(self) -> dict[str, int]:
        """The student's; the losses' own parameters train at the full rate, as its head does."""
        ids = {f"student.{name}": i for name, i in self.student.layer_ids().items()}
        last = max(ids.values())
        return {name: ids.get(name, last) for name, _ in self.named_parameters()}
