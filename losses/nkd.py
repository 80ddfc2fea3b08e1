"""Normalised knowledge distillation (Yang et al. 2023, arXiv 2303.13005)."""
import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import Loss, check_not_negative, check_positive, hard_labels, register_loss
from models.base import ModelOutput


@register_loss("nkd")
class NormalizedKnowledgeDistillation(Loss):
    """-mean p_t[c] log p_s[c] - gamma T^2 mean sum_{i != c} q_t[i] log q_s[i].

    c is the target class, p = softmax of the logits, q = softmax of logits / T over the classes
    other than c. q is a log-softmax over the C - 1 remaining logits, so that it stays finite at any
    gap (the published code takes the log of a softmax, which is -inf beyond a gap of about 104).
    With mixed targets c is their arg-max class, as published: the second label is not used.
    gamma = 1 as in the published distillation runs; the NKD paper uses 1.5.
    """

    def __init__(self, temperature: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        check_positive("nkd temperature", temperature)
        check_not_negative("nkd gamma", gamma)
        self.temperature, self.gamma = temperature, gamma

    def forward(self, student: ModelOutput, teacher: ModelOutput, targets: Tensor) -> Tensor:
        student_logits = student.logits.float()
        teacher_logits = teacher.logits.detach().float()
        labels = hard_labels(targets).unsqueeze(1)  # (N, 1)
        target_prob = F.softmax(teacher_logits, dim=1).gather(1, labels)
        target_log_prob = F.log_softmax(student_logits, dim=1).gather(1, labels)
        target_term = -(target_prob * target_log_prob).mean()

        # Masks instead of indexing: the shapes stay fixed and the device is not waited for.
        is_target = torch.zeros_like(student_logits, dtype=torch.bool).scatter(1, labels, True)
        student_rest = (student_logits / self.temperature).masked_fill(is_target, -torch.inf)
        teacher_rest = (teacher_logits / self.temperature).masked_fill(is_target, -torch.inf)
        rest_log_prob = F.log_softmax(student_rest, dim=1).masked_fill(is_target, 0)
        rest_term = -(F.softmax(teacher_rest, dim=1) * rest_log_prob).sum(1).mean()
        return target_term + self.gamma * self.temperature ** 2 * rest_term
