"""Feature distillation (Wei et al. 2022, arXiv 2205.14141)."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.base import Loss, Stages, check_positive, register_loss, stage_pairs
from models.base import ModelOutput
from utils.registry import UserError


@register_loss("fd")
class FeatureDistillation(Loss):
    """Distance between the student's feature map, after a 1x1 convolution to the teacher's
    channels, and the teacher's map; mean over all elements, then over the chosen stages.

    `kind`: smooth_l1 with `beta`, or mse. `whiten` normalises the teacher's map over its channels
    without affine, as the FD paper does; the published distillation code compares raw maps (off).
    `features`: stage indices, -1 = last. `project=false` compares the maps as they are. Between
    equal channel counts the projection starts as the identity. Where the sizes differ the student's
    map is interpolated (nearest) to the teacher's.
    The head gets nothing from it: combine it with ce, kd or nkd.
    """

    trains_logits = False
    needs_teacher_logits = False
    needs_teacher_features = True

    def __init__(self, student_info: Stages, teacher_info: Stages, kind: str = "smooth_l1",
                 beta: float = 2.0, whiten: bool = False, features: int | tuple[int, ...] = -1,
                 project: bool = True) -> None:
        super().__init__()
        if kind not in ("smooth_l1", "mse"):
            raise UserError(f"fd kind must be smooth_l1 or mse, got {kind!r}.")
        check_positive("fd beta", beta)
        self.kind, self.beta, self.whiten = kind, beta, whiten
        self.stages, self.projections = [], nn.ModuleList()
        for stage, student, teacher in stage_pairs("fd", features, student_info, teacher_info):
            self.stages.append(stage)
            self.projections.append(_projection(student.channels, teacher.channels, project))

    def forward(self, student: ModelOutput, teacher: ModelOutput, targets: Tensor) -> Tensor:
        distances = [self._distance(projection(student.features[stage].float()),
                                    teacher.features[stage].detach().float())
                     for stage, projection in zip(self.stages, self.projections)]
        return torch.stack(distances).mean()

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Both (N, C, H, W), their H and W may differ."""
        if self.whiten:
            channels = teacher.shape[1:2]
            teacher = F.layer_norm(teacher.permute(0, 2, 3, 1), channels).permute(0, 3, 1, 2)
        if student.shape[2:] != teacher.shape[2:]:
            student = F.interpolate(student, teacher.shape[2:], mode="nearest")
        if self.kind == "mse":
            return F.mse_loss(student, teacher)
        return F.smooth_l1_loss(student, teacher, beta=self.beta)


def _projection(in_channels: int, out_channels: int, project: bool) -> nn.Module:
    if not project:
        if in_channels != out_channels:
            raise UserError(f"fd project=false needs equal channels; the student has {in_channels}"
                            f", the teacher {out_channels}. Leave project at true.")
        return nn.Identity()
    projection = nn.Conv2d(in_channels, out_channels, kernel_size=1)
    if in_channels == out_channels:
        nn.init.dirac_(projection.weight)
        nn.init.zeros_(projection.bias)
    return projection
