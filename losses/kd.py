"""Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531)."""
import torch.nn.functional as F
from torch import Tensor

from losses.base import Loss, check_fraction, check_positive, register_loss
from models.base import ModelOutput


@register_loss("kd")
class KnowledgeDistillation(Loss):
    """alpha T^2 KL(softmax(t / T) || softmax(s / T)) + (1 - alpha) CE(s, y), mean over the batch.

    `alpha` is the weight of the KL term: 0.1 and T = 1 as in the published code (classic recipes
    use 0.9). With `hard` it is CE(s, y) / 2 + CE(s, argmax t) / 2, and neither is used (DeiT's hard
    distillation, arXiv 2012.12877 eq. 3, without its extra token). Targets may be soft.
    """

    def __init__(self, temperature: float = 1.0, alpha: float = 0.1, hard: bool = False) -> None:
        super().__init__()
        check_positive("kd temperature", temperature)
        check_fraction("kd alpha", alpha)
        self.temperature, self.alpha, self.hard = temperature, alpha, hard

    def forward(self, student: ModelOutput, teacher: ModelOutput, targets: Tensor) -> Tensor:
        student_logits = student.logits.float()
        teacher_logits = teacher.logits.detach().float()
        cross_entropy = F.cross_entropy(student_logits, targets)
        if self.hard:
            return (cross_entropy + F.cross_entropy(student_logits, teacher_logits.argmax(1))) / 2
        divergence = F.kl_div(F.log_softmax(student_logits / self.temperature, dim=1),
                              F.log_softmax(teacher_logits / self.temperature, dim=1),
                              reduction="batchmean", log_target=True)
        return self.alpha * self.temperature ** 2 * divergence + (1 - self.alpha) * cross_entropy
