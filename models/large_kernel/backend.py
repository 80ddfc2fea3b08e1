"""What every backend of the large depthwise convolutions provides."""
from collections.abc import Sequence

import torch
from torch import Tensor


class Backend:
    """One way to convolve a map x (N, C, H, W) with depthwise kernels (C, 1, kh, kw) of odd edges,
    zeros around the map to keep its size. Records no graph.

    Unless `takes_any_kernel`, kernels are cut to what the map reaches, in the map's dtype and with
    its channels; a backend that takes any rounds them itself and lets missing channels be zeros."""

    memory_format = torch.channels_last  # of every map that it gives, but
    branches_format = torch.channels_last  # of those of `outputs` and `total`
    takes_any_kernel = False
    keeps_matrices = False  # from the forward pass for the backward pass; else made again

    def why_not(self, device: torch.device) -> str | None:
        """None if it runs on `device`, else one sentence that says why not."""
        return None

    def arranged(self, x: Tensor) -> Tensor:
        """x as the forward pass reads it and keeps it for the backward pass."""
        return x

    def matrices(self, x: Tensor, kernels: Sequence[Tensor]) -> list[Tensor]:
        """What `outputs` and `backward` take beside the kernels for maps like x; they make it where
        they get none. It does not follow later changes of the kernels."""
        return []

    def prepare(self, x: Tensor, kernels: Sequence[Tensor]) -> list[Tensor]:
        """What `total` takes beside the kernels for maps like x."""
        return self.matrices(x, kernels)

    def total(self, x: Tensor, kernels: Sequence[Tensor], prepared: Sequence[Tensor],
              bias: Tensor) -> Tensor:
        """Sum of the convolutions and of the bias (C,), one map (N, C, H, W)."""
        raise NotImplementedError

    def outputs(self, x: Tensor, kernels: Sequence[Tensor], matrices: Sequence[Tensor] = ()
                ) -> list[Tensor]:
        """Each convolution by itself, a map (N, C, H, W) per kernel."""
        raise NotImplementedError

    def backward(self, x: Tensor, gradients: Sequence[Tensor], kernels: Sequence[Tensor],
                 matrices: Sequence[Tensor] = (), *, of_input: bool = True,
                 of_kernels: bool = True) -> tuple[Tensor | None, list[Tensor] | None]:
        """`input_gradient` and `kernel_gradients`, those wanted."""
        gradients = [self.arranged(gradient) for gradient in gradients]
        of_x = self.input_gradient(gradients, kernels, matrices) if of_input else None
        found = self.kernel_gradients(x, gradients, kernels) if of_kernels else None
        return of_x, found

    def input_gradient(self, gradients: Sequence[Tensor], kernels: Sequence[Tensor],
                       matrices: Sequence[Tensor] = ()) -> Tensor:
        """Gradient of x from that of each output: the sum of the convolutions of gradients[i] with
        kernels[i] turned by 180 degrees."""
        raise NotImplementedError

    def kernel_gradients(self, x: Tensor, gradients: Sequence[Tensor], kernels: Sequence[Tensor]
                         ) -> list[Tensor]:
        """Gradient of each kernel from that of its output: [c, 0, i, j] sums
        x[n, c, h + i - kh // 2, w + j - kw // 2] * gradient[n, c, h, w] over n, h and w. In float32
        or the map's dtype."""
        raise NotImplementedError


def sum_dtype(x: Tensor) -> torch.dtype:
    """What sums over many values of x are kept in."""
    return x.dtype if x.dtype == torch.float64 else torch.float32
