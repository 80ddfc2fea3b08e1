"""The teacher of a distillation run: it never trains."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import ModelOutput, VisionModel


class FrozenTeacher(nn.Module):
    """`model` for inference only: evaluation mode for ever, no gradient, folded, channels-last.

    It takes the batches of the student, normalised with `data_mean` and `data_std`, and gives
    `model` what its weights expect: its own normalisation and, where they have one, their size.
    """

    def __init__(self, model: VisionModel, data_mean: tuple[float, ...],
                 data_std: tuple[float, ...]) -> None:
        super().__init__()
        self.num_parameters = sum(p.numel() for p in model.parameters())  # before folding
        self.model = model.eval().fold().requires_grad_(False)
        self.model.to(memory_format=torch.channels_last)
        self.feature_info, self.num_classes = model.feature_info, model.num_classes
        self.input_size = model.input_size or model.native_size
        # (p - m) / s from x = (p - dm) / ds is x * (ds / s) + (dm - m) / s.
        stats = [torch.tensor(values).view(1, 3, 1, 1)
                 for values in (data_mean, data_std, model.input_mean, model.input_std)]
        self.register_buffer("scale", stats[1] / stats[3])
        self.register_buffer("shift", (stats[0] - stats[2]) / stats[3])
        self.renormalises = (tuple(data_mean), tuple(data_std)) != (model.input_mean,
                                                                    model.input_std)
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenTeacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> ModelOutput:
        """(N, 3, H, W) -> logits and stage maps without gradient history."""
        if self.renormalises:
            images = images * self.scale + self.shift
        if self.input_size not in (None, images.shape[-1]):
            images = F.interpolate(images, (self.input_size, self.input_size), mode="bicubic",
                                   antialias=True)
        return self.model.forward_with_features(images)
