"""What every backend of the large depthwise convolutions provides."""
from collections.abc import Sequence

import torch
from torch import Tensor


class Backend:
    """One way to convolve a map x (N, C, H, W) with depthwise kernels (C, 1, kh, kw) of odd edges,
    cut to what the map reaches, zeros around the map to keep its size. Records no graph."""

    memory_format = torch.channels_last  # of every map that it gives

    def why_not(self, device: torch.device) -> str | None:
        """None if it runs on `device`, else one sentence that says why not."""
        return None

    def prepare(self, kernels: Sequence[Tensor], height: int, width: int,
                dtype: torch.dtype) -> list[Tensor]:
        """What `total` takes beside the kernels for maps of this size and dtype. It does not follow
        later changes of the kernels."""
        return []

    def total(self, x: Tensor, kernels: Sequence[Tensor], prepared: Sequence[Tensor],
              bias: Tensor) -> Tensor:
        """Sum of the convolutions and of the bias (C,), one map (N, C, H, W)."""
        raise NotImplementedError

    def outputs(self, x: Tensor, kernels: Sequence[Tensor]) -> list[Tensor]:
        """Each convolution by itself, a map (N, C, H, W) per kernel."""
        raise NotImplementedError

    def input_gradient(self, gradients: Sequence[Tensor], kernels: Sequence[Tensor]) -> Tensor:
        """Gradient of x from that of each output: the sum of the convolutions of gradients[i] with
        kernels[i] turned by 180 degrees."""
        raise NotImplementedError

    def kernel_gradients(self, x: Tensor, gradients: Sequence[Tensor],
                         sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Gradient (C, 1, *sizes[i]) of each kernel from that of its output: [c, 0, i, j] sums
        x[n, c, h + i - kh // 2, w + j - kw // 2] * gradient[n, c, h, w] over n, h and w. In float32
        or the map's dtype."""
        raise NotImplementedError


def sum_dtype(x: Tensor) -> torch.dtype:
    """What sums over many values of x are kept in."""
    return x.dtype if x.dtype == torch.float64 else torch.float32
