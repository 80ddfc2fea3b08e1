"""The stem of ConvNeXt in Triton, forward and backward, in half precision:

    out = norm(W images + b),    W: a convolution of patches of 4 x 4 px, norm: LayerNorm

A tile of patches is a product on matrix units, the sums of which hold every channel of a position:
they are normalised where they are. The images are all that is read, in float32 or half, and the
result all that is written. The backward pass computes the sums again, so that nothing is kept but
the images; it reads the gradient once and writes but sums. The images themselves get none.

Rounded to half are the images, the weight, the result and, as operands of the product that gives
the weight's gradient, the gradients of the sums; statistics and sums are float32. No result depends
on the order in which programs run.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.fused import (
    FLOATS,
    autocast_dtype,
    cdiv,
    dot,
    jit,
    multiprocessors,
    next_power_of_2,
    on_device_of,
    tl,
)

SIZE, COLOURS = 4, 3  # of a patch
WIDEST = 256  # channels in memory, of the result
# For maps of at most so many channels: programs on one multiprocessor and their tiles of patches.
FORWARD = {128: (2, dict(BLOCK_P=64, num_warps=8, num_stages=1)),
           256: (2, dict(BLOCK_P=32, num_warps=8, num_stages=1))}
BACKWARD = {128: (2, dict(BLOCK_P=16, num_warps=8, num_stages=1)),
            256: (1, dict(BLOCK_P=16, num_warps=8, num_stages=1))}


# On the device. Images are (N, H, W, 3). A row of a patch is RUN = 12 values side by side, which
# are loaded by 4 and fill 16 places of a product's 64. Of the places left over one holds 1, whose
# weight is the bias; the others hold zeros.

RUN = SIZE * COLOURS
if tl is not None:
    _SIZE, _RUN = tl.constexpr(SIZE), tl.constexpr(RUN)


@jit
def _places(ROW: tl.constexpr):
    """Of the 64 places: which hold a value, which holds 1, and how far each value lies from the
    patch's first one, rows of pixels being ROW values apart."""
    place = tl.arange(0, 16 * _SIZE)
    return place % 16 < _RUN, place == _RUN, place // 16 * ROW + place % 16


@jit
def _patches(images, patch, num_patches, H: tl.constexpr, W: tl.constexpr, dtype: tl.constexpr):
    """(BLOCK_P, 64)"""
    ROW: tl.constexpr = W * _RUN // _SIZE
    DOWN: tl.constexpr = H // _SIZE
    ACROSS: tl.constexpr = W // _SIZE
    is_value, is_one, place = _places(ROW)
    row = (patch // (DOWN * ACROSS)).to(tl.int64) * H + patch // ACROSS % DOWN * _SIZE
    start = row * ROW + patch % ACROSS * _RUN
    values = tl.load(images + start[:, None] + place[None, :],
                     mask=(patch < num_patches)[:, None] & is_value[None, :], other=0.0)
    return tl.where(is_one[None, :], 1.0, values.to(tl.float32)).to(dtype)


@jit
def _weights(weight, bias, channel, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """(64, BLOCK_C), zeros behind WIDTH. Less their mean over the channels, which is all that the
    norm does with the mean of its input."""
    is_value, is_one, place = _places(_RUN)
    true = (channel < WIDTH)[None, :]
    w = tl.load(weight + channel[None, :] * (_SIZE * _RUN) + place[:, None],
                mask=true & is_value[:, None], other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)
    w = tl.where(is_one[:, None], b[None, :], w)
    return tl.where(true, w - (tl.sum(w, 1) / WIDTH)[:, None], 0.0).to(dtype)


@jit(do_not_specialize=["num_patches"])  # compiled once for any batch
def forward_kernel(out, images, weight, bias, scale, shift, num_patches, eps, H: tl.constexpr,
                   W: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                   BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """out (num_patches, PADDED), zeros behind WIDTH."""
    dtype: tl.constexpr = out.dtype.element_ty
    channel = tl.arange(0, BLOCK_C)
    true = channel < WIDTH
    w = _weights(weight, bias, channel, WIDTH, dtype)
    scales = tl.load(scale + channel, mask=true, other=0.0).to(tl.float32)[None, :]
    shifts = tl.load(shift + channel, mask=true, other=0.0).to(tl.float32)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(num_patches, BLOCK_P), tl.num_programs(0)):
        patch = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        values = _patches(images, patch, num_patches, H, W, dtype)
        y = dot(values, w, tl.zeros((BLOCK_P, BLOCK_C), tl.float32))
        inverse_std = 1 / tl.sqrt(tl.sum(y * y, 1) / WIDTH + eps)
        y = y * inverse_std[:, None] * scales + shifts
        tl.store(out + patch[:, None].to(tl.int64) * PADDED + channel[None, :], y.to(dtype),
                 mask=(patch < num_patches)[:, None] & (channel < PADDED)[None, :])


@jit
def _add_each(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@jit(do_not_specialize=["num_patches"])  # compiled once for any batch
def backward_kernel(sums, gradient, images, weight, bias, scale, num_patches, eps, H: tl.constexpr,
                    W: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """In sums (programs, 51 * WIDTH) the gradients of weight (WIDTH, 4, 4, 3), bias, scale and
    shift by this program's patches. gradient (num_patches, PADDED)."""
    dtype: tl.constexpr = gradient.dtype.element_ty
    channel = tl.arange(0, BLOCK_C)
    true = channel < WIDTH
    w = _weights(weight, bias, channel, WIDTH, dtype)
    scales = tl.load(scale + channel, mask=true, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((BLOCK_C, 16 * _SIZE), tl.float32)
    of_scale = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    of_shift = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_patches, BLOCK_P), tl.num_programs(0)):
        patch = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        # All PADDED are loaded, a multiple of 16 bytes where WIDTH may not be. Behind WIDTH y and
        # scales are 0, and no sum is stored.
        given = tl.load(gradient + patch[:, None].to(tl.int64) * PADDED + channel[None, :],
                        mask=(patch < num_patches)[:, None] & (channel < PADDED)[None, :],
                        other=0.0).to(tl.float32)
        values = _patches(images, patch, num_patches, H, W, dtype)
        y = dot(values, w, tl.zeros((BLOCK_P, BLOCK_C), tl.float32))
        scaled = given * scales
        square, mean, along = tl.reduce((y * y, scaled, scaled * y), 1, _add_each)
        inverse_std = 1 / tl.sqrt(square / WIDTH + eps)
        y *= inverse_std[:, None]
        of_scale += given * y
        of_shift += given
        # Away go the parts that would change the mean and the variance of the row.
        mean, along = mean * inverse_std / WIDTH, along * inverse_std * inverse_std / WIDTH
        scaled = scaled * inverse_std[:, None] - mean[:, None] - y * along[:, None]
        of_weight = dot(tl.trans(scaled.to(dtype)), values, of_weight)
    sums += tl.program_id(0).to(tl.int64) * ((_SIZE * _RUN + 3) * WIDTH)
    is_value, is_one, place = _places(_RUN)
    place = tl.where(is_one[None, :], _SIZE * _RUN * WIDTH + channel[:, None],
                     channel[:, None] * (_SIZE * _RUN) + place[None, :])
    tl.store(sums + place, of_weight, mask=true[:, None] & (is_value | is_one)[None, :])
    sums += (_SIZE * _RUN + 1) * WIDTH + channel
    tl.store(sums, tl.sum(of_scale, 0), mask=true)
    tl.store(sums + WIDTH, tl.sum(of_shift, 0), mask=true)


# On the host


def tiling(x: Tensor, num_patches: int, width: int, padded: int, choices: dict) -> tuple:
    """The number of programs, and what both kernels want to know of images (N, 3, H, W)."""
    at_once, tiles = choices[128 if padded <= 128 else 256]
    programs = min(at_once * multiprocessors(x), cdiv(num_patches, tiles["BLOCK_P"]))
    return programs, dict(H=x.shape[2], W=x.shape[3], WIDTH=width, PADDED=padded,
                          BLOCK_C=max(16, next_power_of_2(padded)), **tiles)


def channels_last(weight: Tensor) -> Tensor:
    """(channels, 3, 4, 4) -> (channels, 4, 4, 3), contiguous."""
    return weight.permute(0, 2, 3, 1).contiguous()


def launch(images: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float,
           dtype: torch.dtype, padded: int) -> Tensor:
    num_images, _, height, width = images.shape
    out = torch.empty((num_images, padded, height // SIZE, width // SIZE), dtype=dtype,
                      device=images.device, memory_format=torch.channels_last)
    num_patches = out.shape[0] * out.shape[2] * out.shape[3]
    programs, forms = tiling(images, num_patches, len(scale), padded, FORWARD)
    if programs:
        with on_device_of(images):
            forward_kernel[(programs,)](out, images, channels_last(weight), bias, scale, shift,
                                        num_patches, eps, **forms)
    return out


def gradients(gradient: Tensor, images: Tensor, weight: Tensor, bias: Tensor, scale: Tensor,
              eps: float) -> tuple[Tensor, ...]:
    """Of weight, bias, scale and shift; float32."""
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    num_images, padded, height, across = gradient.shape
    num_patches, width = num_images * height * across, len(scale)
    programs, forms = tiling(images, num_patches, width, padded, BACKWARD)
    sums = images.new_empty((programs, (SIZE * RUN + 3) * width), dtype=torch.float32)
    if programs:
        with on_device_of(images):
            backward_kernel[(programs,)](sums, gradient, images, channels_last(weight), bias, scale,
                                         num_patches, eps, **forms)
    of_weight, *others = sums.sum(0).split([SIZE * RUN * width, width, width, width])
    return of_weight.view(width, SIZE, SIZE, COLOURS).permute(0, 3, 1, 2), *others


class Stem(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor,
                eps: float, dtype: torch.dtype, padded: int) -> Tensor:
        ctx.save_for_backward(images, weight, bias, scale)
        ctx.eps, ctx.shift_dtype = eps, shift.dtype
        return launch(images, weight, bias, scale, shift, eps, dtype, padded)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple:
        _, weight, bias, scale = ctx.saved_tensors
        found = gradients(gradient, *ctx.saved_tensors, ctx.eps)
        dtypes = weight.dtype, bias.dtype, scale.dtype, ctx.shift_dtype
        return None, *[value.to(dtype) for value, dtype in zip(found, dtypes)], None, None, None


def can_fuse(images: Tensor, weight: Tensor, scale: Tensor, padded: int) -> bool:
    """Whether `stem` takes these images, of a convolution of patches in half precision. Not where
    the images want a gradient, nor where weights that are stored with their zeros do."""
    learns = torch.is_grad_enabled()
    return (images.dtype in FLOATS and images.shape[1:2] == weight.shape[1:2]
            and weight.shape[1:] == (COLOURS, SIZE, SIZE)
            and padded <= WIDEST and len(scale) <= len(weight) <= padded
            and not (learns and (images.requires_grad or len(scale) < len(weight))))


def stem(images: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float,
         padded: int) -> Tensor:
    """LayerNorm over the channels, with scale and shift (C,), of the convolution of images
    (N, 3, H, W) with weight (C, 3, 4, 4) and bias (C,), stride 4. (N, padded, H // 4, W // 4),
    channels-last, in autocast's dtype or that of the images; zeros behind the C channels. For what
    `can_fuse` takes."""
    images = images.contiguous(memory_format=torch.channels_last)
    inputs = images, weight, bias, scale, shift, eps, autocast_dtype(images), padded
    if torch.is_grad_enabled() and any(value.requires_grad for value in inputs[1:5]):
        return Stem.apply(*inputs)
    return launch(*inputs)
