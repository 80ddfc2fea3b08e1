"""Everything with a gradient in one module, to be wrapped once by DDP and optimised as one."""
import torch
from torch import Tensor, nn

from models.base import ModelOutput, VisionModel
from models.teacher import PendingOutput
from utils.errors import UserError, one_line


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
