"""Knowledge distillation from a stronger teacher (DIST; Huang et al. 2022, arXiv 2205.10536)."""
import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import Loss, check_not_negative, check_positive, register_loss
from models.base import ModelOutput

EPSILON = 1e-8  # the published code's, absolute
NO_VARIANCE = 1e-6  # of a row, relative to its norm: what float32 leaves of equal numbers


@register_loss("dist")
class CorrelationDistillation(Loss):
    """T^2 (beta (1 - mean_n r(s[n, :], t[n, :])) + gamma (1 - mean_c r(s[:, c], t[:, c]))).

    r is Pearson's correlation; s and t, (N, C), are softmaxes of logits / T. The first term
    compares the classes of an image, the second the images of a batch under a class: it sees one
    micro-batch of one process, so the loss is no mean over images, and for a single image the term
    is 1. The loss is 0 for s = t up to EPSILON (which leaves 0.02 of 1000 classes at logits of
    standard deviation 5). The targets are not used.
    Defaults as in the published code (hunto/image_classification_sota), which adds cross-entropy:
    here that is `--loss ce --loss dist`. Its T^2 is not in the paper's listing; at T = 1, as on
    ImageNet, it makes no difference. Probabilities that do not vary, as those of a head that starts
    at zero, count as r = 0 without a gradient (the published code divides it by 1e-8).
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        check_not_negative("dist beta", beta)
        check_not_negative("dist gamma", gamma)
        check_positive("dist temperature", temperature)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def forward(self, student: ModelOutput, teacher: ModelOutput, targets: Tensor) -> Tensor:
        student_prob = F.softmax(student.logits.float() / self.temperature, dim=1)
        teacher_prob = F.softmax(teacher.logits.detach().float() / self.temperature, dim=1)
        inter_class = 1 - _correlation(student_prob, teacher_prob)
        intra_class = 1 - _correlation(student_prob.T, teacher_prob.T)
        return self.temperature ** 2 * (self.beta * inter_class + self.gamma * intra_class)


def _correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Pearson's correlation of each row with the same row of the other, mean over the rows."""
    student, student_norm, student_varies = _centre(student)
    teacher, teacher_norm, teacher_varies = _centre(teacher)
    # It damps rows of tiny probabilities: (nearly) unused classes count little, as published.
    correlation = (student * teacher).sum(1) / (student_norm * teacher_norm + EPSILON)
    return torch.where(student_varies & teacher_varies, correlation, 0).mean()


def _centre(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows less their means, the norms of that, and whether it is more than rounding."""
    centred = rows - rows.mean(1, keepdim=True)
    norm = centred.norm(dim=1)  # its gradient at 0 is 0
    return centred, norm, norm > NO_VARIANCE * rows.norm(dim=1)
