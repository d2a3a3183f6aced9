"""What the attention kernels share: tiles, lists of tiles, and the entmax weights of a tile.

Queries and keys are cut into tiles of ``tile`` tokens. Of a query tile and a key tile that share no support nothing is
computed after the first pass. One bit says whether they do: ``tiles`` is int32 (B, H, query tiles, words + 2), and key
tile j is bit ``j % 32`` of word ``j // 32``. The last two say which key tiles, from one to before the other, all of the
queries see in full: they need no mask.

With ``z = (alpha-1) s`` the kernels hold, for every query, a threshold such that ``y = z - threshold`` gives

    alpha = 1.5:  p = [y]_+^2,              g = p^(2-alpha) = [y]_+
    alpha = 2:    p = [y]_+,                g = 1 on the support
    alpha = 1.25: p = [y]_+^4,              g = [y]_+^3
    else:         p = [1+y]_+^(1/(alpha-1)), g = p / (1+y)          (the threshold is tau + 1: nothing is lost near 1)

and their limit at alpha = 1, softmax, with ``z = s`` and the logarithm of the sum as threshold: p = g = exp(y). Of its
tiles those are left out where every p is 0 in float32. The constant ALPHA names the five: 1, 2 and 4 the first three,
3 softmax, 0 all else.

Source: arXiv 1905.05702, eq. 10; arXiv 1909.00015, propositions 1 and 2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

HIDDEN = tl.constexpr(-1.0e30)  # the score of a key that a query may not see
NOTHING = tl.constexpr(1.0e30)  # the threshold of a query that may see no key


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def any_bit(bits, ROWS: tl.constexpr, TILE: tl.constexpr):
    """int32 (ROWS * TILE,) -> (ROWS,): the union of the bits of each tile of rows."""
    return tl.reduce(tl.reshape(bits, (ROWS, TILE)), 1, either)


@triton.jit
def partial_sum(x, LANES: tl.constexpr):
    """(ROWS, COLUMNS) -> (ROWS, LANES): the sums of what each thread holds of a row, to be added up after the loop.

    LANES is 8 where matrix units give a thread every eighth column, else COLUMNS. It must not join threads here: each
    would then hold a copy of the sum, and Triton 3.6 adds copies up."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // LANES, LANES)), 1)


@triton.jit
def load_tile(ptr, start, stride, end, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr):
    """Rows ``start`` to ``start + ROWS`` of a (tokens, DIM) array, zeros from row ``end`` and column DIM on."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    pointers = ptr + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    mask = (start + rows < end)[:, None]
    if DIM != BLOCK_DIM:
        mask = mask & (dims < DIM)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, x, start, stride, end, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    pointers = ptr + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    mask = (start + rows < end)[:, None] & (dims < DIM)[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_intervals(first_ptr, last_ptr, rows, T):
    """``first``, ``last`` and whether there is a key between them, for each of ``rows``."""
    inside = rows < T
    first = tl.load(first_ptr + rows, mask=inside, other=0)
    last = tl.load(last_ptr + rows, mask=inside, other=0)
    return first, last, first < last


@triton.jit
def key_tile_ranges(first, last, visible, TILE: tl.constexpr):
    """The key tiles that some of the rows see, ``begin`` to ``end``, and those that all of them see in full,
    ``inner_begin`` to ``inner_end``: the former without the latter need a mask."""
    begin = tl.min(tl.where(visible, first, 2147483647), 0) // TILE
    end = (tl.max(tl.where(visible, last, 0), 0) + TILE - 1) // TILE
    inner_begin = (tl.max(tl.where(visible, first, 0), 0) + TILE - 1) // TILE
    inner_end = tl.min(tl.where(visible, last, 2147483647), 0) // TILE
    if inner_end <= inner_begin:
        inner_begin = begin
        inner_end = begin
    return begin, inner_begin, inner_end, end


@triton.jit
def load_exponent(alpha_ptr, h, stride, alpha_value, ALPHA: tl.constexpr):
    """z / s of a head: alpha - 1, or 1 for softmax."""
    if ALPHA == 1:
        return 0.5
    elif ALPHA == 2 or ALPHA == 3:
        return 1.0
    elif ALPHA == 4:
        return 0.25
    else:
        alpha = alpha_value
        if alpha_ptr is not None:
            alpha = tl.load(alpha_ptr + h * stride)
        return tl.maximum(alpha - 1.0, 1.0e-6)


@triton.jit
def load_row_scale(scale_ptr, offset, rows, T, scaling, ROWS: tl.constexpr):
    """``scaling * r_i``: what turns a product of query and key into a score."""
    if scale_ptr is None:
        return tl.zeros((ROWS,), tl.float32) + scaling
    else:
        return scaling * tl.load(scale_ptr + offset + rows, mask=rows < T, other=0.0)


@triton.jit
def log1p(y, EXACT: tl.constexpr):
    """log(1 + y) for y > -1, without loss for small y. EXACT is within rounding, the other within 1e-5 of it and three
    times faster."""
    u = 1.0 + y
    if EXACT:
        return tl.log(u) + (y - (u - 1.0)) / u
    else:
        series = y * (1.0 - y * (0.5 - y * (1.0 / 3.0 - 0.25 * y)))
        return tl.where(tl.abs(y) < 0.03, series, 0.6931471805599453 * libdevice.fast_log2f(u))


@triton.jit
def weights(y, e, ALPHA: tl.constexpr, EXACT: tl.constexpr):
    """p and g of the scores' excess over the threshold; NaN of NaN."""
    if ALPHA == 1:
        w = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return w * w, w
    elif ALPHA == 2:
        return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL), tl.where(y > 0.0, 1.0, 0.0)
    elif ALPHA == 3:
        p = tl.exp(y)
        return p, p
    elif ALPHA == 4:
        w = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        g = w * w * w
        return g * w, g
    else:
        outside = y <= -1.0
        y = tl.where(outside, 0.0, y)
        g = tl.where(outside, 0.0, tl.exp(log1p(y, EXACT) * (1.0 / e - 1.0)))
        return g * (1.0 + y), g


@triton.jit
def alpha_slopes(y, p, g, e, EXACT: tl.constexpr):
    """``p phi``: the derivative of p with respect to alpha at a fixed threshold."""
    a = tl.maximum(-log1p(tl.where(y > -1.0, y, 0.0), EXACT), 0.0)
    series = 0.5 + a * (1 / 6 + a * (1 / 24 + a * (1 / 120 + a * (1 / 720 + a * (1 / 5040 + a * (1 / 40320))))))
    return tl.where(a < 0.5, p * a * a * series, g - p * (1.0 + a)) * (-1.0 / (e * e))


@triton.jit
def newton_step(mass, slope, e, ALPHA: tl.constexpr):
    """Newton on the 1/(alpha-1)-norm of the weights: from below the root it never goes past it."""
    slope = tl.maximum(slope, 1.0e-30)
    if ALPHA == 1:
        return (mass - tl.sqrt(mass)) / slope
    elif ALPHA == 2:
        return (mass - 1.0) / slope
    elif ALPHA == 3:  # the root itself
        return tl.log(tl.maximum(mass, 1.0e-30))
    elif ALPHA == 4:
        root = tl.sqrt(tl.sqrt(mass))
        return (mass - root * root * root) / slope
    else:
        a = e * tl.log(tl.maximum(mass, 1.0e-30))
        small = a * (1.0 - a * (0.5 - a * (1.0 / 6.0)))
        return tl.where(tl.abs(a) < 0.01, small, 1.0 - tl.exp(-a)) * mass / slope


@triton.jit
def normalized(threshold, mass, e, ALPHA: tl.constexpr):
    """What gives weights of mass 1 in place of ``mass``: the threshold and the factor of ``y = norm z - threshold``."""
    log_mass = tl.log(mass)
    norm = tl.exp(-e * log_mass)
    if ALPHA == 3:
        norm = tl.full(mass.shape, 1.0, tl.float32)
        threshold += log_mass
    else:
        threshold = threshold * norm
    if ALPHA == 0:  # (1 + y) norm = 1 + y'
        a = e * log_mass
        threshold += tl.where(tl.abs(a) < 0.01, a * (1.0 - a * (0.5 - a * (1.0 / 6.0))), 1.0 - norm)
    return threshold, norm


@triton.jit
def below(ALPHA: tl.constexpr):
    """A row's threshold is at least its largest z less this."""
    if ALPHA == 0 or ALPHA == 3:
        return 0.0
    else:
        return 1.0


@triton.jit
def depth(ALPHA: tl.constexpr):
    """A key has the weight 0 from so far below the threshold on."""
    if ALPHA == 3:
        return 104.0
    elif ALPHA == 0:
        return 1.0
    else:
        return 0.0


@triton.jit
def hide(x, hidden, j, first_ptr, last_ptr, rows, T, WIDTH: tl.constexpr):
    """``hidden`` in place of x (rows, WIDTH) where a row may not see the key. Called under a branch, it loads the
    intervals anew: were they at hand, the compiler would run this for every tile, under a predicate."""
    first = tl.load(first_ptr + rows, mask=rows < T, other=0)
    last = tl.load(last_ptr + rows, mask=rows < T, other=0)
    place = (j * WIDTH + tl.arange(0, WIDTH))[None, :] - first[:, None]
    count = tl.maximum(last - first, 0)
    return tl.where(place.to(tl.uint32) < count.to(tl.uint32)[:, None], x, hidden)  # one comparison for both ends


@triton.jit
def load_bias(slopes_ptr, last_ptr, h, e, tile_row, TILE: tl.constexpr, BIASED: tl.constexpr):
    """ALiBi of a head, in units of z: the slope, and the position from which a query tile counts distances."""
    if BIASED:
        return e * tl.load(slopes_ptr + h), tl.load(last_ptr + tile_row * TILE) - 1
    else:
        return 0.0, 0


@triton.jit
def excess(
    q, k, j, ce, norm, threshold, slope, origin, partial, first_ptr, last_ptr, rows, T, TILE: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """``y`` of a query tile and key tile j: far below any support where the query may not see the key."""
    x = tl.dot(q, tl.trans(k), input_precision="ieee")
    if BIASED:
        distance = (j * TILE + tl.arange(0, TILE) - origin).to(tl.float32)
        y = (x * ce[:, None] + (slope * distance)[None, :]) * norm[:, None] - threshold[:, None]
    else:
        y = x * (ce * norm)[:, None] - threshold[:, None]
    if partial:
        y = hide(y, HIDDEN, j, first_ptr, last_ptr, rows, T, TILE)
    return y


@triton.jit
def compress(ptr, values, chosen):
    """Write the chosen of some values one after the other; returns how many."""
    bit = chosen.to(tl.int32)
    tl.store(ptr + tl.cumsum(bit, 0) - 1, values, mask=chosen)
    return tl.sum(bit, 0)


@triton.jit
def list_tiles(words_ptr, n_words, list_ptr, CHUNK: tl.constexpr):
    """Write down the key tiles whose bit is set, in order; returns how many."""
    count = 0
    for start in range(0, n_words * 32, CHUNK):
        j = start + tl.arange(0, CHUNK)
        word = tl.load(words_ptr + j // 32, mask=j < n_words * 32, other=0)
        count += compress(list_ptr + count, j, (word >> (j % 32) & 1) != 0)
    tl.debug_barrier()
    return count
