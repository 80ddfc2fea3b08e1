"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679)."""
import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import Loss, check_not_negative, check_positive, hard_labels, register_loss
from models.base import ModelOutput


@register_loss("dkd")
class DecoupledKnowledgeDistillation(Loss):
    """T^2 (alpha KL(b_t || b_s) + beta KL(q_t || q_s)), mean over the batch.

    b = (p[c], 1 - p[c]) with p = softmax of logits / T and c the target class; q = softmax of
    logits / T over the classes other than c. With mixed targets c is their arg-max class. The paper
    adds cross-entropy with the targets: here that is `--loss ce --loss dkd`.
    The defaults are the authors' ResNet-34 to ResNet-18 on ImageNet (mdistiller, configs/imagenet;
    beta=2 from ResNet-50 to MobileNet). Their reported runs had alpha=0.5, with almost the same
    results (mdistiller issue 32). On CIFAR-100: alpha=1 beta=8 temperature=4. Their warm-up
    of the weight is left out: on ImageNet it lasts one epoch, counted from 1, and so is none.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__()
        check_not_negative("dkd alpha", alpha)
        check_not_negative("dkd beta", beta)
        check_positive("dkd temperature", temperature)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, student: ModelOutput, teacher: ModelOutput, targets: Tensor) -> Tensor:
        labels = hard_labels(targets).unsqueeze(1)  # (N, 1)
        student_parts = _decouple(student.logits.float() / self.temperature, labels)
        teacher_parts = _decouple(teacher.logits.detach().float() / self.temperature, labels)
        target_term, rest_term = [
            F.kl_div(student_part, teacher_part, reduction="batchmean", log_target=True)
            for student_part, teacher_part in zip(student_parts, teacher_parts)]
        return self.temperature ** 2 * (self.alpha * target_term + self.beta * rest_term)


def _decouple(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log b (N, 2) and log q (N, C), the latter 0 at the target class.

    Both stay finite at any gap: log(1 - p[c]) is a log-sum-exp over the other classes, where the
    published code takes the log of a sum that may have underflowed to 0.
    """
    log_prob = F.log_softmax(logits, dim=1)
    # Masks instead of indexing: the shapes stay fixed and the device is not waited for.
    is_target = torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels, True)
    others = log_prob.masked_fill(is_target, -torch.inf).logsumexp(1, keepdim=True)
    binary = torch.cat([log_prob.gather(1, labels), others], dim=1)
    rest = F.log_softmax(logits.masked_fill(is_target, -torch.inf), dim=1)
    return binary, rest.masked_fill(is_target, 0)
