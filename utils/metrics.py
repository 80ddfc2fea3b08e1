"""What is logged of logits, as tensors on their device."""
import torch
import torch.nn.functional as F
from torch import Tensor


def teacher_metrics(student_logits: Tensor, teacher_logits: Tensor | None,
                    targets: Tensor) -> dict[str, Tensor]:
    """What passes from teacher to student on a training batch, as scalars; nothing for a teacher
    without logits.

    - `teacher_acc1`: percent of the images whose top class by the teacher is the one with the
      largest target. Of two mixed images that is the one with more of the area or weight.
    - `teacher_entropy`: of the teacher's softmax, in nats, mean over the images; log K at most.
    - `agreement`: percent of the images where teacher and student, in training mode, have the same
      top class.
    """
    if teacher_logits is None:
        return {}
    labels = targets if targets.dim() == 1 else targets.argmax(1)
    teacher_logits = teacher_logits.float()
    top = teacher_logits.argmax(1)
    return {"teacher_acc1": 100 * (top == labels).float().mean(),
            "teacher_entropy": torch.special.entr(teacher_logits.softmax(1)).sum(1).mean(),
            "agreement": 100 * (top == student_logits.argmax(1)).float().mean()}


def sample_results(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Five best classes (N, 5), filled with -1 below five classes; probability of the first (N,);
    cross-entropy (N,)."""
    logits = logits.float()
    prob, top = logits.softmax(1).topk(min(5, logits.shape[1]), dim=1)
    top = F.pad(top, (0, 5 - top.shape[1]), value=-1)
    return top, prob[:, 0], F.cross_entropy(logits, labels, reduction="none")


def no_samples() -> list[Tensor]:
    """What a process has whose share of a tiny data set is empty."""
    empty = torch.zeros(0, dtype=torch.long)
    return [empty, empty, empty.bool(), empty.view(0, 5), torch.zeros(0), torch.zeros(0)]
