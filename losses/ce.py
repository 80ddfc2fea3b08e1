"""Cross-entropy with the targets alone: the supervised baseline."""
import torch.nn.functional as F
from torch import Tensor

from losses.base import Loss, check_fraction, register_loss
from models.base import ModelOutput
from utils.registry import UserError


@register_loss("ce")
class CrossEntropy(Loss):
    """-sum_i y_i log p_s[i], mean over the batch; y hard (with `label_smoothing`) or soft.

    Soft targets come smoothed from mixup already, so smoothing them again is refused.
    """

    needs_teacher = False

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_fraction("ce label_smoothing", label_smoothing)
        self.label_smoothing = label_smoothing

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor) -> Tensor:
        if self.label_smoothing and targets.dim() == 2:
            raise UserError(f"--loss ce label_smoothing={self.label_smoothing} got targets that "
                            "are already soft. Leave it out and set --smoothing instead.")
        return F.cross_entropy(student.logits.float(), targets,
                               label_smoothing=self.label_smoothing)
