"""Large depthwise convolutions by the library's forward convolution, in channels-last memory.

oneDNN's forward depthwise kernel runs near the arithmetic limit of a CPU in that layout, its
backward ones far from it. So the gradients are forward convolutions as well:

    of the map      the gradient's map convolved with the flipped kernel
    of the kernel   the map convolved with the gradient's map as if that were a kernel: one
                    convolution of an image whose channels are the N x C maps

Per output and kernel tap one multiply-add each; each map is read and written once. A large map in
float32 is too large a kernel for the caches: there the gradient of a kernel is a matrix product.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.large_kernel import banded

# Bytes of a map of 16 channels, one vector of float32, from which it no longer stays in the second
# cache together with the map that it slides over. Measured: 200 KB (56 x 56) is beyond it.
LARGE_MAP = 150_000


def why_not(device: torch.device) -> str | None:
    return None


def prepare(kernels: Sequence[Tensor], height: int, width: int,
            dtype: torch.dtype) -> list[Tensor]:
    return []


def total(x: Tensor, kernels: Sequence[Tensor], prepared: Sequence[Tensor],
          bias: Tensor | None = None) -> Tensor:
    """(N, C, H, W) -> sum of the convolutions and the bias (C,)."""
    x = x.contiguous(memory_format=torch.channels_last)
    result = _convolve(x, kernels[0], bias)
    for kernel in kernels[1:]:
        result += _convolve(x, kernel)
    return result


def outputs(x: Tensor, kernels: Sequence[Tensor]) -> list[Tensor]:
    x = x.contiguous(memory_format=torch.channels_last)
    return [_convolve(x, kernel) for kernel in kernels]


def input_gradient(gradients: Sequence[Tensor], kernels: Sequence[Tensor]) -> Tensor:
    """Sum over the branches, (N, C, H, W)."""
    parts = [_convolve(gradient.contiguous(memory_format=torch.channels_last), kernel.flip(2, 3))
             for gradient, kernel in zip(gradients, kernels)]
    result = parts[0]
    for part in parts[1:]:
        result += part
    return result


def kernel_gradients(x: Tensor, gradients: Sequence[Tensor],
                     sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(C, 1, kh, kw) for each size. dK[c, i, j] is the sum over n, h, w of x[n, c, h + i - kh // 2,
    w + j - kw // 2] * gradient[n, c, h, w]."""
    num_images, channels = x.shape[:2]
    if num_images == 0:
        return [x.new_zeros(channels, 1, *size) for size in sizes]
    maps = _images_as_channels(x)
    is_large = x.dtype == torch.float32 and 64 * x.shape[2] * x.shape[3] > LARGE_MAP
    result = []
    for gradient, size in zip(gradients, sizes):
        if is_large and max(size) > 2 * min(size):
            result += banded.kernel_gradients(x, [gradient], [size])
            continue
        kernels = _images_as_channels(gradient).transpose(0, 1)  # (N * C, 1, H, W)
        padding = (size[0] // 2, size[1] // 2)
        per_image = _conv2d(maps, kernels, padding)  # (1, N * C, kh, kw)
        per_image = per_image.view(num_images, channels, *size)
        result.append(per_image.sum(0, dtype=banded.sum_dtype(x))[:, None])
    return result


def _images_as_channels(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (1, N * C, H, W) in channels-last memory."""
    num_images, channels, height, width = x.shape
    x = x.permute(2, 3, 0, 1).reshape(1, height, width, num_images * channels)
    return x.permute(0, 3, 1, 2)


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    return _conv2d(x, kernel, (kernel.shape[2] // 2, kernel.shape[3] // 2), bias)


def _conv2d(x: Tensor, kernel: Tensor, padding: tuple[int, int],
            bias: Tensor | None = None) -> Tensor:
    if x.dtype == torch.float16 and x.device.type == "cpu":
        # Without its own float16 units a CPU takes 100 times as long as in float32.
        bias = bias if bias is None else bias.float()
        with torch.autocast("cpu", enabled=False):  # which would cast back
            return _conv2d(x.float(), kernel.float(), padding, bias).half()
    y = F.conv2d(x, kernel, bias, padding=padding, groups=x.shape[1])
    return y.contiguous(memory_format=torch.channels_last)  # as it is already, but on some GPUs
