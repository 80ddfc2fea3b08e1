"""Masked generative distillation (Yang et al. 2022, arXiv 2205.01529)."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.base import Loss, Stages, check_positive, register_loss, stage_pairs
from models.base import ModelOutput
from utils.registry import UserError


@register_loss("mgd")
class MaskedGenerativeDistillation(Loss):
    """alpha / N sum |G(mask * A(student)) - teacher|^2 over all elements, summed over the stages.

    A is a 1x1 convolution to the teacher's channels, left out where they are equal, then bilinear
    interpolation where the sizes differ. The mask zeroes whole channels of an image, each with
    probability `mask_ratio`, without rescaling the others. G is 3x3 convolution, ReLU, 3x3
    convolution on the teacher's channels. A and G train with the student and are never part of it.
    `features`: stage indices, -1 = last.
    The defaults are MGD's own on ImageNet (yzd-v/MGD, cls/configs/distillers), which add
    cross-entropy: the head gets nothing from this loss, so combine it with ce, kd or nkd. The
    published L2S code has mask_ratio 0.5, in a loss that it never calls.
    Masks come from the global generator, which the step seeds, so a resume repeats them. In
    evaluation mode nothing is masked: the value is then repeatable, and the generator untouched.
    """

    trains_logits = False
    needs_teacher_logits = False
    needs_teacher_features = True

    def __init__(self, student_info: Stages, teacher_info: Stages,
                 features: int | tuple[int, ...] = -1, mask_ratio: float = 0.15,
                 alpha: float = 7e-5) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise UserError(f"mgd mask_ratio must lie in [0, 1), got {mask_ratio}; at 1 nothing is "
                            "left of the student.")
        check_positive("mgd alpha", alpha)
        self.mask_ratio, self.alpha = mask_ratio, alpha
        self.stages, self.aligns, self.generators = [], nn.ModuleList(), nn.ModuleList()
        for stage, student, teacher in stage_pairs("mgd", features, student_info, teacher_info):
            self.stages.append(stage)
            is_equal = student.channels == teacher.channels
            self.aligns.append(nn.Identity() if is_equal else
                               nn.Conv2d(student.channels, teacher.channels, kernel_size=1))
            self.generators.append(nn.Sequential(
                nn.Conv2d(teacher.channels, teacher.channels, kernel_size=3, padding=1), nn.ReLU(),
                nn.Conv2d(teacher.channels, teacher.channels, kernel_size=3, padding=1)))

    def forward(self, student: ModelOutput, teacher: ModelOutput, targets: Tensor) -> Tensor:
        distances = []
        for stage, align, generator in zip(self.stages, self.aligns, self.generators):
            target = teacher.features[stage].detach().float()
            feature = align(student.features[stage].float())
            if feature.shape[2:] != target.shape[2:]:
                feature = F.interpolate(feature, target.shape[2:], mode="bilinear")
            generated = generator(self._mask(feature))
            distances.append(F.mse_loss(generated, target, reduction="sum") / len(target))
        return self.alpha * torch.stack(distances).sum()

    def _mask(self, feature: Tensor) -> Tensor:
        """(N, C, H, W), some of its N x C maps at zero."""
        if not self.training:
            return feature
        drawn = torch.rand(*feature.shape[:2], 1, 1, device=feature.device)
        return feature * (drawn >= self.mask_ratio)
