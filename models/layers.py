"""Building blocks that several networks share."""
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.fused import HALVES, autocast_dtype, has_kernels, is_traced, stem
from models.fused import layer_norm as fused_norm
from models.fused.depthwise import depthwise_conv2d
from models.fused.max_pool import max_pool2d
from utils.registry import UserError

# Maps may carry more channels than a layer has, zeros behind its own: matrix units want widths that
# are multiples of 8. The layers below then pad their weights with zeros, so that zeros stay zeros.

MOST_BLOCKS = 1000  # of a stage


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def pad_to(tensor: Tensor, *sizes: int) -> Tensor:
    """`tensor` with zeros behind it up to `sizes` in its first dimensions; itself where it has
    them. Gradients come back in its own shape."""
    missing = [size - present for size, present in zip(sizes, tensor.shape)]
    if not any(missing):
        return tensor
    missing += [0] * (tensor.dim() - len(missing))
    return F.pad(tensor, [amount for number in reversed(missing) for amount in (0, number)])


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, width: int) -> Tensor:
    """LayerNorm over the first `width` channels of (..., C); zeros behind them."""
    channels = x.shape[-1]
    if x.is_cuda and not torch.compiler.is_compiling():
        return fused_norm.layer_norm(x, weight, bias, eps, width)
    if channels == width:
        return F.layer_norm(x, (width,), weight, bias, eps)
    # Written out, which torch.compile joins with what stands beside it.
    wide = x if x.dtype == torch.float64 else x.float()
    is_own = torch.arange(channels, device=x.device) < width
    centred = (wide - wide.sum(-1, keepdim=True) / width) * is_own
    variance = centred.square().sum(-1, keepdim=True) / width
    y = centred * (variance + eps).rsqrt() * pad_to(weight, channels) + pad_to(bias, channels)
    return y.to(x.dtype)


class LaunchAware(nn.Module):
    """A module that may choose, on a GPU, between arrangements of the same function by what their
    launches cost: `launches_are_free` in a student whose step a CUDA graph replays, so that they
    take no time of the host."""

    launches_are_free = False


def set_launches_free(network: nn.Module, are_free: bool) -> None:
    """For all modules of the network."""
    for module in network.modules():
        if isinstance(module, LaunchAware):
            module.launches_are_free = are_free


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, of maps that may carry channels of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, self.normalized_shape[0])


class LayerNorm2d(LayerNorm):
    """LayerNorm over the channels of (N, C, H, W), at every position by itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C); free in channels-last memory
        return super().forward(x).permute(0, 3, 1, 2)


class Conv2d(nn.Conv2d):
    """A dense convolution of maps that may carry channels of zeros. `width`: channels of the
    result, zeros behind its own."""

    def forward(self, x: Tensor, width: int | None = None) -> Tensor:
        width = width or len(self.weight)
        weight, bias = pad_to(self.weight, width, x.shape[1]), pad_to(self.bias, width)
        return F.conv2d(x, weight, bias, self.stride, self.padding)

    def prefers_patches(self, x: Tensor) -> bool:
        """Whether x is better taken as patches, by `of_patches` or a kernel: where kernel and
        stride are the same and x is computed in half precision on a GPU. There PyTorch adds the
        bias in a second pass, which takes as long as the convolution."""
        size = self.kernel_size[0]
        return (self.kernel_size == self.stride == (size, size) and self.padding == (0, 0)
                and not is_traced() and autocast_dtype(x) in HALVES
                and has_kernels(x.device) and min(x.shape[2:]) >= size)

    def of_patches(self, patches: Tensor, width: int) -> Tensor:
        """(N, H, W, k * k * channels) -> (N, width, H, W), channels-last."""
        channels = patches.shape[3] // (self.kernel_size[0] * self.kernel_size[1])
        weight, bias = pad_to(self.weight, width, channels), pad_to(self.bias, width)
        # A view of weights in channels-last memory.
        rows = F.linear(patches.flatten(0, 2), weight.permute(0, 2, 3, 1).flatten(1), bias)
        return rows.view(*patches.shape[:3], width).permute(0, 3, 1, 2)


def are_ordinary(layers: Iterable[nn.Module], kinds: Sequence[type]) -> bool:
    """Whether each is of one of these classes itself, and nobody watches it by hooks: what a kernel
    computes for them is then all that they do."""
    return all(type(layer) in kinds
               and not (layer._forward_hooks or layer._forward_pre_hooks
                        or layer._backward_hooks or layer._backward_pre_hooks)
               for layer in layers)


def down_sampled(layers: nn.Sequential, x: Tensor, width: int) -> Tensor:
    """x through a stem (Conv2d, LayerNorm2d) or a down-sampling (LayerNorm2d, Conv2d), into `width`
    channels. Where the convolution is a product of patches, the stem is one kernel, and the norm
    before a convolution writes its rows as patches, unless a layer has hooks."""
    first, second = layers
    is_stem, is_ordinary = isinstance(first, Conv2d), are_ordinary(layers, (Conv2d, LayerNorm2d))
    if (is_stem and is_ordinary and first.prefers_patches(x)
            and stem.can_fuse(x, first.weight, second.weight, width)):
        return stem.stem(x, first.weight, first.bias, second.weight, second.bias, second.eps, width)
    # In rows of 16 bytes; other widths are filled up better by the library.
    if (not is_stem and is_ordinary and second.prefers_patches(x)
            and x.shape[1] % 8 == width % 8 == 0):
        patches = fused_norm.layer_norm(x.permute(0, 2, 3, 1), first.weight, first.bias, first.eps,
                                        first.normalized_shape[0], second.kernel_size[0])
        return second.of_patches(patches, width)
    for layer in layers:
        x = layer(x, width) if isinstance(layer, Conv2d) else layer(x)
    return x


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution, with an odd square kernel and zeros around the map to keep its size,
    of maps that may carry channels of zeros."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        return depthwise_conv2d(x, pad_to(self.weight, width), pad_to(self.bias, width))

    def in_any_layout(self, x: Tensor) -> Tensor:
        return self(x)


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm`, an nn.BatchNorm2d, nn.SyncBatchNorm or nn.Identity, of a map that may carry channels
    of zeros; or another norm of one that does not."""
    channels = x.shape[1]
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or channels == norm.num_features:
        return norm(x)
    mean, var = pad_to(norm.running_mean, channels), pad_to(norm.running_var, channels)
    padded = {"weight": pad_to(norm.weight, channels), "bias": pad_to(norm.bias, channels),
              "running_mean": mean, "running_var": var}
    y = torch.func.functional_call(norm, padded, (x,))
    if norm.training:
        norm.running_mean.copy_(mean[:norm.num_features])
        norm.running_var.copy_(var[:norm.num_features])
    return y


class PointwiseLinear(nn.Linear):
    """A linear layer over the channels of (N, H, W, C) maps, which may carry channels of zeros; its
    result is then wider by the same factor.

    In float32 on a CPU computed as the 1x1 convolution that it is: oneDNN's takes two thirds of
    the time of the matrix library's product on such shapes.
    """

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        width = self.out_features * x.shape[-1] // self.in_features
        weight = pad_to(self.weight, width, x.shape[-1])
        bias = pad_to(self.bias, width) if with_bias and self.bias is not None else None
        in_half = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() != 4 or in_half:
            return F.linear(x, weight, bias)
        y = F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
        return y.permute(0, 2, 3, 1)


class GELU(nn.GELU):
    """GELU of a tensor that nobody else will read: in place where no gradient is recorded. On a CPU
    it is not the arithmetic but the memory of a new map that takes the time."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return super().forward(x)
        return torch.ops.aten.gelu_(x, approximate=self.approximate)


class MaxPool2d(nn.MaxPool2d):
    """Over windows of one edge, stride and padding, without dilation or ceiling."""

    def __init__(self, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__(kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return max_pool2d(x, self.kernel_size, self.stride, self.padding)


class DropPath(nn.Module):
    """Drop the whole residual branch of a sample with probability `drop_prob` while training, and
    scale the kept ones by 1 / (1 - drop_prob) (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    @property
    def keep_prob(self) -> float:
        return 1 - self.drop_prob

    def draw(self, x: Tensor) -> Tensor | None:
        """Which samples of x keep their branch this time, bool (N, 1, ...); None: all."""
        if not self.training or self.drop_prob == 0:
            return None
        shape = (len(x),) + (1,) * (x.dim() - 1)
        return torch.rand(shape, device=x.device).lt(self.keep_prob)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.draw(x)
        return x if kept is None else x * kept.to(x.dtype) / self.keep_prob

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
            or min(depths) < smallest_depth or max(depths) > MOST_BLOCKS):
        raise UserError(f"depths and dims need one whole number per stage, depths of at least "
                        f"{smallest_depth} and at most {MOST_BLOCKS}, and widths of at least 1, "
                        f"for one to four stages; got depths {tuple(depths)} and widths "
                        f"{tuple(dims)}.")


def check_drop_path(rate: float) -> None:
    if not 0 <= rate < 1:
        raise UserError(f"drop_path must lie in [0, 1), got {rate}.")
