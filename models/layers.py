"""Building blocks that several networks share."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.registry import UserError


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W), at every position by itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C); free in channels-last memory
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class PointwiseLinear(nn.Linear):
    """A linear layer over the channels of (N, H, W, C) maps.

    In float32 on a CPU computed as the 1x1 convolution that it is: oneDNN's takes two thirds of
    the time of the matrix library's product on such shapes.
    """

    def forward(self, x: Tensor) -> Tensor:
        in_half = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() != 4 or in_half:
            return super().forward(x)
        y = F.conv2d(x.permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias)
        return y.permute(0, 2, 3, 1)


class GELU(nn.GELU):
    """GELU of a tensor that nobody else will read: in place where no gradient is recorded. On a CPU
    it is not the arithmetic but the memory of a new map that takes the time."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return super().forward(x)
        return torch.ops.aten.gelu_(x, approximate=self.approximate)


class DropPath(nn.Module):
    """Drop the whole residual branch of a sample with probability `drop_prob` while training, and
    scale the kept ones by 1 / (1 - drop_prob) (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep_prob = 1 - self.drop_prob
        shape = (len(x),) + (1,) * (x.dim() - 1)
        return x * torch.rand(shape, device=x.device).lt(keep_prob).to(x.dtype) / keep_prob

    def extra_repr(self) -> str:
        return f"{self.drop_prob:.3f}"


def drop_path_rates(final: float, num_blocks: int) -> list[float]:
    """Rates growing linearly from 0 at the first block to `final` at the last."""
    check_drop_path(final)
    return [final * i / max(num_blocks - 1, 1) for i in range(num_blocks)]


def check_stages(depths: Sequence[int], dims: Sequence[int], smallest_depth: int = 0) -> None:
    """One depth and one positive width per stage, four stages at the most."""
    is_whole = all(type(number) is int for number in (*depths, *dims))
    if (not is_whole or not 1 <= len(depths) == len(dims) <= 4 or min(dims) < 1
            or min(depths) < smallest_depth):
        raise UserError(f"depths and dims need one whole number per stage, depths of at least "
                        f"{smallest_depth} and widths of at least 1, for one to four stages; got "
                        f"depths {tuple(depths)} and widths {tuple(dims)}.")


def check_drop_path(rate: float) -> None:
    if not 0 <= rate < 1:
        raise UserError(f"drop_path must lie in [0, 1), got {rate}.")
