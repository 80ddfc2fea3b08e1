"""What passes from a teacher to its student: figures of one training batch, for the log."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.base import ModelOutput
from models.distiller import Distiller, PendingOutput


def measure_health(distiller: Distiller, images: Tensor, targets: Tensor,
                   teacher: ModelOutput | PendingOutput,
                   scale: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Scalars by name, of a batch that was just trained on; NaN where a gradient overflowed:

    - teacher_acc1: percent of the images whose top class by the teacher is the one with the largest
      target. Of two mixed images that is the one with more of the area or weight.
    - agreement: percent of the images where teacher and student, in its present mode, have the
      same top class.
    - teacher_entropy: of the teacher's softmax, in nats, mean over the images; log K at most.
    - grad_share_NAME: norm of the gradient of weight x term NAME with respect to the student's
      parameters (those under a mask, too), over the sum of these norms; in [0, 1], 1 in total. Of
      this process's images alone, before gradients are averaged. It cannot say whether the terms
      pull together or apart. `scale` is what a loss goes through before it is differentiated.

    By a forward pass of its own, not compiled, under the caller's autocast, and a backward pass per
    term. It leaves no trace in buffers or gradients, and draws on the random stream.
    """
    if isinstance(teacher, PendingOutput):
        teacher = teacher.wait()
    with buffers_kept(distiller):
        student = distiller.student.forward_with_features(images)
        terms = distiller.terms(student, teacher, targets)
        weighted = [scale(distiller.weights[name] * term) for name, term in terms.items()]
        with torch.autocast(images.device.type, enabled=False):  # as around any backward pass
            shares = gradient_shares(weighted, distiller.student)
    labels = targets if targets.dim() == 1 else targets.argmax(1)
    logits = teacher.logits.float()
    top = logits.argmax(1)
    return {"teacher_acc1": 100 * (top == labels).float().mean(),
            "agreement": 100 * (top == student.logits.float().argmax(1)).float().mean(),
            "teacher_entropy": torch.special.entr(logits.softmax(1)).sum(1).mean(),
            **{f"grad_share_{name}": share for name, share in zip(terms, shares)}}


def gradient_shares(losses: Sequence[Tensor], student: nn.Module) -> Tensor:
    """(len(losses),) norm of the gradient of each loss with respect to the parameters of `student`,
    over the sum of them; all NaN where any is not finite, or none is positive."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    norms = []
    for loss in losses:
        gradients = ()
        if loss.requires_grad:
            # What a loss does not reach gets None: the head, from fd.
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        of_parameters = [g.norm() for g in gradients if g is not None]
        norms.append(torch.stack([loss.new_zeros(()), *of_parameters]).norm())
    total = torch.stack(norms).sum()
    # Else a finite norm over an infinite sum would count as a share of 0.
    return torch.stack(norms) / torch.where(total.isfinite(), total, torch.nan)


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Whatever is computed inside, the buffers of `module` (BatchNorm's statistics) have their
    values again afterwards."""
    saved = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        # Not before the backward passes, which would find what they saved changed.
        for buffer, value in saved:
            buffer.copy_(value)
