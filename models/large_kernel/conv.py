"""Large depthwise convolutions by PyTorch's forward convolution, in channels-last memory.

oneDNN's forward depthwise kernel runs near the arithmetic limit of a CPU in that layout, its
backward ones far from it. So the gradients are forward convolutions as well:

    of the map      the gradient's map convolved with the flipped kernel
    of the kernel   the map convolved with the gradient's map as if that were a kernel: one
                    convolution of an image whose channels are the N x C maps

Per output and kernel tap one MAC each; each map is read and written once. A large map in
float32 is too large a kernel for the caches: there the gradient of a kernel is a matrix product.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.large_kernel import banded
from models.large_kernel.backend import Backend, sum_dtype

# Bytes of a map of 16 channels, one vector of float32, from which it no longer stays in the second
# cache together with the map that it slides over. Measured: 200 KB (56 x 56) is beyond it.
LARGE_MAP = 150_000


def conv2d(x: Tensor, kernel: Tensor, padding: tuple[int, int],
           bias: Tensor | None = None) -> Tensor:
    if x.dtype == torch.float16 and x.device.type == "cpu":
        # Without its own float16 units a CPU takes 100 times as long as in float32.
        bias = None if bias is None else bias.float()
        with torch.autocast("cpu", enabled=False):  # which would cast back
            return conv2d(x.float(), kernel.float(), padding, bias).half()
    y = F.conv2d(x, kernel, bias, padding=padding, groups=x.shape[1])
    return y.contiguous(memory_format=torch.channels_last)  # as it is already, but on some GPUs


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    return conv2d(x, kernel, (kernel.shape[2] // 2, kernel.shape[3] // 2), bias)


def images_as_channels(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (1, N * C, H, W) in channels-last memory."""
    num_images, channels, height, width = x.shape
    x = x.permute(2, 3, 0, 1).reshape(1, height, width, num_images * channels)
    return x.permute(0, 3, 1, 2)


class Conv(Backend):
    def total(self, x: Tensor, kernels: Sequence[Tensor], prepared: Sequence[Tensor],
              bias: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        result = convolve(x, kernels[0], bias)
        for kernel in kernels[1:]:
            result += convolve(x, kernel)
        return result

    def outputs(self, x: Tensor, kernels: Sequence[Tensor], matrices: Sequence[Tensor] = ()
                ) -> list[Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        return [convolve(x, kernel) for kernel in kernels]

    def input_gradient(self, gradients: Sequence[Tensor], kernels: Sequence[Tensor],
                       matrices: Sequence[Tensor] = ()) -> Tensor:
        first, *others = [
            convolve(gradient.contiguous(memory_format=torch.channels_last), kernel.flip(2, 3))
            for gradient, kernel in zip(gradients, kernels)]
        for other in others:
            first += other
        return first

    def kernel_gradients(self, x: Tensor, gradients: Sequence[Tensor], kernels: Sequence[Tensor]
                         ) -> list[Tensor]:
        num_images, channels, height, width = x.shape
        if num_images == 0:
            return [x.new_zeros(kernel.shape) for kernel in kernels]
        maps = images_as_channels(x)
        is_large = x.dtype == torch.float32 and 64 * height * width > LARGE_MAP
        result = []
        for gradient, kernel in zip(gradients, kernels):
            size = tuple(kernel.shape[2:])
            if is_large and max(size) > 2 * min(size):
                result.append(banded.kernel_gradient(x, gradient, size))
                continue
            sliding = images_as_channels(gradient).transpose(0, 1)  # (N * C, 1, H, W)
            per_image = conv2d(maps, sliding, (size[0] // 2, size[1] // 2))  # (1, N * C, kh, kw)
            per_image = per_image.view(num_images, channels, *size)
            result.append(per_image.sum(0, dtype=sum_dtype(x))[:, None])
        return result


BACKEND = Conv()
