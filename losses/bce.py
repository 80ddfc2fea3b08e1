"""Binary cross-entropy with the targets alone: every class a question of its own."""
import torch.nn.functional as F
from torch import Tensor

from losses.base import Loss, check_fraction, register_loss
from models.base import ModelOutput


@register_loss("bce")
class BinaryCrossEntropy(Loss):
    """-[y_i log sigmoid(s_i) + (1 - y_i) log(1 - sigmoid(s_i))], mean over the classes i and the
    batch (ResNet strikes back, arXiv 2110.00476, section 2.2; as timm's).

    y hard, or soft from mixup and smoothing. With `threshold` the targets above it are 1 and the
    others 0: DeiT III asks for both classes of mixed images at once with a threshold of 0.
    """

    needs_teacher = False

    def __init__(self, threshold: float | None = None) -> None:
        super().__init__()
        if threshold is not None:
            check_fraction("bce threshold", threshold)
        self.threshold = threshold

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor) -> Tensor:
        logits = student.logits.float()
        if targets.dim() == 1:
            targets = F.one_hot(targets, logits.shape[1])
        if self.threshold is not None:
            targets = targets > self.threshold
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
