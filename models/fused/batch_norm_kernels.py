"""The kernels of models/fused/batch_norm.py in Triton.

A map is a table of positions, the pixels of all images one after another, by channels. A program
takes one block of channels, whose parameters it keeps in registers, and every so many tiles of
positions. LAST: the map is channels-last, so that an index is position * C + channel. Maps may pass
2^31 elements. Kernels that read a map a second time go backwards through it: what was read last may
still lie in the L2 cache.
"""
from __future__ import annotations

from models.fused import jit, tl


@jit
def _place(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's first tile, the number of programs for these channels, the channels, and which
    of them exist. Programs that run together share the rows of a channels-last map."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.program_id(0) // BLOCKS, tl.num_programs(0) // BLOCKS, channel, channel < C


@jit
def _pointers(x, first, channel, C: tl.constexpr, HW: tl.constexpr, LAST: tl.constexpr,
              BLOCK_P: tl.constexpr):
    """To BLOCK_P positions from `first` on, at some channels."""
    row = tl.arange(0, BLOCK_P)
    if LAST:
        return x + tl.cast(first, tl.int64) * C + (row[:, None] * C + channel[None, :])
    position = first + row
    image = (position // HW).to(tl.int64) * (C * HW)
    return x + (image + position % HW)[:, None] + (channel * HW)[None, :]


@jit
def _inside(first, num_positions, exists, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr):
    inside = (first + tl.arange(0, BLOCK_P) < num_positions)[:, None]
    return inside if WHOLE else inside & exists[None, :]


@jit
def _load(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@jit
def _row(values, channel, own):
    """Parameters of channels, (1, BLOCK_C)."""
    return tl.load(values + channel, mask=own, other=0.0).to(tl.float32)[None, :]


@jit
def _folded(values, FOLD: tl.constexpr):
    """(BLOCK_P, BLOCK_C) summed to (BLOCK_P / FOLD, BLOCK_C), of rows that one thread has."""
    if FOLD == 1:
        return values
    return tl.sum(tl.reshape(values, (FOLD, values.shape[0] // FOLD, values.shape[1])), 0)


@jit
def _normalized(x, mean, scale, bias):
    return (x - mean) * scale + bias


@jit
def _cut(values, by):
    """values where `by` is above 0, or NaN, and else 0."""
    return tl.where(by <= 0, 0.0, values)


# Forward

@jit
def _moments(partial, x, num_positions, num_tiles, C: tl.constexpr, HW: tl.constexpr,
             LAST: tl.constexpr, FOLD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations from it of a program's positions, partial (2, C). Sums are
    of the differences from the first of them: a mean far from zero cancels nothing."""
    program, programs, channel, exists = _place(C, BLOCK_C)
    first = _pointers(x, program * BLOCK_P, channel, C, HW, LAST, 1)
    shift = tl.load(first, mask=exists[None, :], other=0.0)
    total = tl.zeros((BLOCK_P // FOLD, BLOCK_C), tl.float32)
    square = total
    for tile in range(program, num_tiles, programs):
        start = tile * BLOCK_P
        inside = _inside(start, num_positions, exists, C % BLOCK_C == 0, BLOCK_P)
        here = tl.load(_pointers(x, start, channel, C, HW, LAST, BLOCK_P), mask=inside, other=shift)
        away = here.to(tl.float32) - shift.to(tl.float32)
        total += _folded(away, FOLD)
        square += _folded(away * away, FOLD)
    total, square = tl.sum(total, 0), tl.sum(square, 0)
    count = _count(program, programs, num_positions, num_tiles, BLOCK_P).to(tl.float32)
    partial += channel
    tl.store(partial, tl.sum(shift.to(tl.float32), 0) + total / count, mask=exists)
    tl.store(partial + C, square - total * total / count, mask=exists)


@jit
def _count(program, programs, num_positions, num_tiles, BLOCK_P: tl.constexpr):
    """Positions of a program; the last tile may not be full."""
    missing = tl.where((num_tiles - 1 - program) % programs == 0,
                       num_tiles * BLOCK_P - num_positions, 0)
    return (num_tiles - program + programs - 1) // programs * BLOCK_P - missing


# The number of positions is specialized: a multiple of 16, contiguous maps are read by 16 bytes.
@jit(do_not_specialize=["num_tiles"])
def moments_kernel(partial, x0, x1, x2, num_positions, num_tiles, C: tl.constexpr,
                   HW: tl.constexpr, MAPS: tl.constexpr, LAST: tl.constexpr, FOLD: tl.constexpr,
                   BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Moments of a part of one map in a program, partial (programs, MAPS, 2, C)."""
    which = tl.program_id(1)
    partial += (_place(C, BLOCK_C)[0] * MAPS + which) * (2 * C)
    if MAPS == 1 or which == 0:
        _moments(partial, x0, num_positions, num_tiles, C, HW, LAST, FOLD, BLOCK_P, BLOCK_C)
    elif which == 1:
        _moments(partial, x1, num_positions, num_tiles, C, HW, LAST, FOLD, BLOCK_P, BLOCK_C)
    else:
        _moments(partial, x2, num_positions, num_tiles, C, HW, LAST, FOLD, BLOCK_P, BLOCK_C)


@jit
def _update(mean, variance, tracked, found_mean, found_variance, momentum, channel, own):
    before = tl.load(mean + channel, mask=own, other=0.0)
    tl.store(mean + channel, before + momentum * (found_mean - before), mask=own)
    before = tl.load(variance + channel, mask=own, other=0.0)
    tl.store(variance + channel, before + momentum * (found_variance - before), mask=own)
    if tl.program_id(0) == 0:
        tl.store(tracked, tl.load(tracked) + 1)


@jit(do_not_specialize=["programs", "num_positions", "num_tiles"])
def statistics_kernel(statistics, partial, mean0, mean1, mean2, variance0, variance1, variance2,
                      tracked0, tracked1, tracked2, programs, num_positions, num_tiles, eps,
                      momentum, OWN: tl.constexpr, C: tl.constexpr, MAPS: tl.constexpr,
                      UPDATES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
                      BLOCK_C: tl.constexpr):
    """Of one map, from the moments of its parts (Chan, Golub and LeVeque 1983): mean, unbiased
    variance and 1 / std, statistics (3, MAPS, C); and, if UPDATES, the running statistics of its
    OWN channels and the number of batches tracked."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists, which = channel < C, tl.program_id(1)
    partial += which * 2 * C + channel
    shift = tl.load(partial, mask=exists, other=0.0)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    square = total
    for start in range(0, programs, BLOCK_T):
        program = start + tl.arange(0, BLOCK_T)
        inside = (program < programs)[:, None] & exists[None, :]
        count = _count(program, programs, num_positions, num_tiles, BLOCK_P)
        count = count.to(tl.float32)[:, None]
        here = partial[None, :] + (program * (MAPS * 2 * C))[:, None]
        mean = tl.load(here, mask=inside, other=0.0)
        own_square = tl.load(here + C, mask=inside, other=0.0)
        away = tl.where(inside, mean - shift[None, :], 0.0)
        total += count * away
        square += own_square + count * away * away
    total, square, count = tl.sum(total, 0), tl.sum(square, 0), num_positions.to(tl.float32)
    square = tl.maximum(square - total * total / count, 0.0, propagate_nan=tl.PropagateNan.ALL)
    mean, variance = shift + total / count, square / tl.maximum(count - 1, 1.0)
    statistics += which * C + channel
    tl.store(statistics, mean, mask=exists)
    tl.store(statistics + MAPS * C, variance, mask=exists)
    tl.store(statistics + 2 * MAPS * C, 1.0 / tl.sqrt(square / count + eps), mask=exists)
    if UPDATES:
        own = channel < OWN
        if which == 0:
            _update(mean0, variance0, tracked0, mean, variance, momentum, channel, own)
        elif which == 1:
            _update(mean1, variance1, tracked1, mean, variance, momentum, channel, own)
        else:
            _update(mean2, variance2, tracked2, mean, variance, momentum, channel, own)


@jit(do_not_specialize=["num_tiles"])
def normalize_kernel(out, x0, x1, x2, shortcut, statistics, weight0, weight1, weight2, bias0, bias1,
                     bias2, num_positions, num_tiles, OWN: tl.constexpr, C: tl.constexpr,
                     HW: tl.constexpr, MAPS: tl.constexpr, LAST: tl.constexpr,
                     SHORTCUT: tl.constexpr, RELU: tl.constexpr, BLOCK_P: tl.constexpr,
                     BLOCK_C: tl.constexpr):
    """The sum of (x - mean) / std * weight + bias and a shortcut, cut by a ReLU. It and the
    shortcut are channels-last. The OWN first channels have weights; of the others only the shortcut
    is left, zeros."""
    program, programs, channel, exists = _place(C, BLOCK_C)
    own, rstd = channel < OWN, statistics + 2 * MAPS * C
    mean0 = _row(statistics, channel, own)
    scale0 = _row(rstd, channel, own) * _row(weight0, channel, own)
    bias = _row(bias0, channel, own)
    if MAPS > 1:
        mean1 = _row(statistics + C, channel, own)
        scale1 = _row(rstd + C, channel, own) * _row(weight1, channel, own)
        bias += _row(bias1, channel, own)
    if MAPS > 2:
        mean2 = _row(statistics + 2 * C, channel, own)
        scale2 = _row(rstd + 2 * C, channel, own) * _row(weight2, channel, own)
        bias += _row(bias2, channel, own)
    for number in range(program, num_tiles, programs):
        start = (num_tiles - 1 - number) * BLOCK_P
        inside = _inside(start, num_positions, exists, C % BLOCK_C == 0, BLOCK_P)
        value = _normalized(_load(_pointers(x0, start, channel, C, HW, LAST, BLOCK_P), inside),
                            mean0, scale0, bias)
        if MAPS > 1:
            x = _load(_pointers(x1, start, channel, C, HW, LAST, BLOCK_P), inside)
            value += (x - mean1) * scale1
        if MAPS > 2:
            x = _load(_pointers(x2, start, channel, C, HW, LAST, BLOCK_P), inside)
            value += (x - mean2) * scale2
        if SHORTCUT:
            value += _load(_pointers(shortcut, start, channel, C, HW, True, BLOCK_P), inside)
        if RELU:
            value = _cut(value, value)
        tl.store(_pointers(out, start, channel, C, HW, True, BLOCK_P),
                 value.to(out.dtype.element_ty), mask=inside)


# Backward. CUT says how the gradient passes the ReLU: by the sign of the result, which is computed
# a second time from the only map ("map") or read ("out"); without a ReLU it does not matter ("").

@jit
def _gradient(gradient, out, x0, start, channel, inside, mean0, scale0, bias0, C: tl.constexpr,
              HW: tl.constexpr, LAST: tl.constexpr, GRADIENT_LAST: tl.constexpr, CUT: tl.constexpr,
              BLOCK_P: tl.constexpr):
    """A tile of the gradient of the sum, and of x0."""
    g = _load(_pointers(gradient, start, channel, C, HW, GRADIENT_LAST, BLOCK_P), inside)
    x = _load(_pointers(x0, start, channel, C, HW, LAST, BLOCK_P), inside)
    if CUT == "map":
        g = _cut(g, _normalized(x, mean0, scale0, bias0))
    if CUT == "out":
        g = _cut(g, _load(_pointers(out, start, channel, C, HW, True, BLOCK_P), inside))
    return g, x


@jit(do_not_specialize=["num_tiles"])
def products_kernel(partial, cut, gradient, out, x0, x1, x2, statistics, weight0, bias0,
                    num_positions, num_tiles, OWN: tl.constexpr, C: tl.constexpr, HW: tl.constexpr,
                    MAPS: tl.constexpr, LAST: tl.constexpr, GRADIENT_LAST: tl.constexpr,
                    CUT: tl.constexpr, STORES: tl.constexpr, FOLD: tl.constexpr,
                    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums over a part of the positions of the gradient of the ReLU's input and of its product with
    each x - mean, partial (programs, 1 + MAPS, C). STORES: that gradient itself, to `cut`."""
    program, programs, channel, exists = _place(C, BLOCK_C)
    own = channel < OWN
    mean0, scale0, bias = _row(statistics, channel, exists), 0.0, 0.0
    if CUT == "map":
        scale0 = _row(statistics + 2 * MAPS * C, channel, own) * _row(weight0, channel, own)
        bias = _row(bias0, channel, own)
    mean1 = _row(statistics + (1 % MAPS) * C, channel, exists)
    mean2 = _row(statistics + (2 % MAPS) * C, channel, exists)
    total = tl.zeros((BLOCK_P // FOLD, BLOCK_C), tl.float32)
    product0, product1, product2 = total, total, total
    for tile in range(program, num_tiles, programs):
        start = tile * BLOCK_P
        inside = _inside(start, num_positions, exists, C % BLOCK_C == 0, BLOCK_P)
        g, x = _gradient(gradient, out, x0, start, channel, inside, mean0, scale0, bias, C, HW,
                         LAST, GRADIENT_LAST, CUT, BLOCK_P)
        total += _folded(g, FOLD)  # 0 outside
        product0 += _folded(g * (x - mean0), FOLD)
        if MAPS > 1:
            x = _load(_pointers(x1, start, channel, C, HW, LAST, BLOCK_P), inside)
            product1 += _folded(g * (x - mean1), FOLD)
        if MAPS > 2:
            x = _load(_pointers(x2, start, channel, C, HW, LAST, BLOCK_P), inside)
            product2 += _folded(g * (x - mean2), FOLD)
        if STORES:
            tl.store(_pointers(cut, start, channel, C, HW, True, BLOCK_P),
                     g.to(cut.dtype.element_ty), mask=inside)
    partial += program * ((1 + MAPS) * C) + channel
    tl.store(partial, tl.sum(total, 0), mask=exists)
    tl.store(partial + C, tl.sum(product0, 0), mask=exists)
    if MAPS > 1:
        tl.store(partial + 2 * C, tl.sum(product1, 0), mask=exists)
    if MAPS > 2:
        tl.store(partial + 3 * C, tl.sum(product2, 0), mask=exists)


@jit(do_not_specialize=["programs", "num_positions"])
def gradients_kernel(gradients, means, partial, statistics, programs, num_positions,
                     C: tl.constexpr, MAPS: tl.constexpr, BLOCK_T: tl.constexpr,
                     BLOCK_C: tl.constexpr):
    """From the sums of the parts: gradients (2, MAPS, C) of the weights and of the biases, and
    means (1 + MAPS, C) over the positions of the gradient and of its product with each normalized
    map. One row of partial in a program."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists, row = channel < C, tl.program_id(1)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(0, programs, BLOCK_T):
        program = start + tl.arange(0, BLOCK_T)
        inside = (program < programs)[:, None] & exists[None, :]
        total += tl.load(partial + (program * ((1 + MAPS) * C))[:, None]
                         + (row * C + channel)[None, :], mask=inside, other=0.0)
    total = tl.sum(total, 0)
    if row > 0:
        total *= tl.load(statistics + (2 * MAPS + row - 1) * C + channel, mask=exists, other=0.0)
        tl.store(gradients + (row - 1) * C + channel, total, mask=exists)
    else:
        for i in tl.static_range(MAPS):
            tl.store(gradients + (MAPS + i) * C + channel, total, mask=exists)
    tl.store(means + row * C + channel, total / num_positions.to(tl.float32), mask=exists)


@jit
def _input_gradient(g, x, mean, scale, along):
    return (g - (x - mean) * along) * scale


@jit(do_not_specialize=["num_tiles"])
def input_gradients_kernel(out0, out1, out2, gradient, out, x0, x1, x2, statistics, means, weight0,
                           weight1, weight2, bias0, num_positions, num_tiles,
                           GRADIENT_LAST: tl.constexpr, OWN: tl.constexpr, C: tl.constexpr,
                           HW: tl.constexpr, MAPS: tl.constexpr, LAST: tl.constexpr,
                           CUT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The gradients of all maps, in the maps' layout."""
    program, programs, channel, exists = _place(C, BLOCK_C)
    own, rstd = channel < OWN, statistics + 2 * MAPS * C
    bias = _row(bias0, channel, own) if CUT == "map" else 0.0
    mean_gradient = _row(means, channel, own)
    mean0, scale0 = _row(statistics, channel, own), _row(rstd, channel, own)
    along0 = scale0 * _row(means + C, channel, own)
    scale0 *= _row(weight0, channel, own)
    if MAPS > 1:
        mean1, scale1 = _row(statistics + C, channel, own), _row(rstd + C, channel, own)
        along1 = scale1 * _row(means + 2 * C, channel, own)
        scale1 *= _row(weight1, channel, own)
    if MAPS > 2:
        mean2, scale2 = _row(statistics + 2 * C, channel, own), _row(rstd + 2 * C, channel, own)
        along2 = scale2 * _row(means + 3 * C, channel, own)
        scale2 *= _row(weight2, channel, own)
    for number in range(program, num_tiles, programs):
        start = (num_tiles - 1 - number) * BLOCK_P
        inside = _inside(start, num_positions, exists, C % BLOCK_C == 0, BLOCK_P)
        g, x = _gradient(gradient, out, x0, start, channel, inside, mean0, scale0, bias, C, HW,
                         LAST, GRADIENT_LAST, CUT, BLOCK_P)
        # All loads come before the first store, behind which none can be moved up.
        if MAPS > 1:
            y = _load(_pointers(x1, start, channel, C, HW, LAST, BLOCK_P), inside)
        if MAPS > 2:
            z = _load(_pointers(x2, start, channel, C, HW, LAST, BLOCK_P), inside)
        g -= mean_gradient
        tl.store(_pointers(out0, start, channel, C, HW, LAST, BLOCK_P),
                 _input_gradient(g, x, mean0, scale0, along0).to(out0.dtype.element_ty),
                 mask=inside)
        if MAPS > 1:
            tl.store(_pointers(out1, start, channel, C, HW, LAST, BLOCK_P),
                     _input_gradient(g, y, mean1, scale1, along1).to(out1.dtype.element_ty),
                     mask=inside)
        if MAPS > 2:
            tl.store(_pointers(out2, start, channel, C, HW, LAST, BLOCK_P),
                     _input_gradient(g, z, mean2, scale2, along2).to(out2.dtype.element_ty),
                     mask=inside)
