# SPDX-License-Identifier: Apache-2.0
"""The tile engine: every kernel visits the tiles of S = scale * X Y^T (+ bias) and keeps none.

``x`` [N, D] owns the rows a program works on, ``y`` [M, D] is the side it sweeps over.  For the
gradient of k the launcher swaps the roles, so there is one backward kernel and not two.

What all kernels share, and why:

* A row index becomes int64 where it is multiplied by a stride or D, and stays int32 where it is only
  compared: there are fewer than 2^31 rows, and masks in int64 would cost twice the registers.
* D is swept in chunks of ``BLOCK_D``, the last one masked.  D = 768 is six chunks of 128 and wastes
  nothing, where padding to the next power of two would waste a quarter.
* Loads are masked with 0 and *S* is masked with -inf before any maximum or exponential, so neither
  padded columns nor whatever lies behind a buffer can enter a reduction.
* exp(S - m) = exp2((S - m) * LOG2_E), one hardware instruction.  The difference comes first: where the
  result matters it is small, so the product with LOG2_E adds no error to that of S itself, also for
  logits of 1e4.  Running state is the pair (m, sum), and lse = m + log2(sum) * LN_2.
* No atomics: every partial result has a slot of its own and the combine kernels read the slots in
  ascending order.
"""

# Triton reads annotations of kernel arguments itself (tl.constexpr), so no `from __future__ import
# annotations` here: it would turn them into strings.

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Softmax weights of float16 operands are multiplied by 2^14: the smallest weight that keeps full
# precision falls from 6e-5 to 4e-9 and the largest (two sides of G: 2 * 2^14) is below 65504.
HALF_LIFT = tl.constexpr(16384.0)
NO_INDEX = tl.constexpr(0x7FFFFFFF)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
# One exponential may stand for two where its argument stays this small: exp(S - c) serves rows and
# columns of a tile if S spans at most CALM_RANGE, and G = exp(S - c) (a_i + b_j) if the log-sum-exps of
# rows and columns do.  With c in the middle |argument| <= 16 (8 for what matters of G), so its rounding
# is below 1e-6, and no factor leaves float32.  Temperatures of 0.05 and more rarely go beyond.
CALM_RANGE = tl.constexpr(32.0)
CALM_SPREAD = tl.constexpr(16.0)
# Triton's interpreter keeps bfloat16 as uint16 and multiplies those in tl.dot.  There the operands
# are widened first, which is exact and what a tensor core does.
INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))

KIND_LSE = tl.constexpr(0)
KIND_SOFTPLUS = tl.constexpr(1)


# ---- helpers -------------------------------------------------------------------------------------


@triton.jit
def aligned(n, ALIGN: tl.constexpr):
    """n, of which the launcher knows that ALIGN divides it; so does the compiler then.

    Triton itself looks for 16 only: without this, rows of 200 float16 are read two bytes at a time.
    """
    return n // ALIGN * ALIGN


@triton.jit
def load_chunk(
    ptr, rows, row_ok, stride_n, stride_d, start, D, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr
):
    """Block [rows, BLOCK_D] of a matrix from feature ``start`` on; outside the matrix it is 0."""
    features = start + tl.arange(0, BLOCK_D)
    # int64 before the products: rows * D, and D * rows of a transposed operand, pass 2^31 early.
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride_n + features.to(tl.int64)[None, :] * stride_d
    if EVEN_D:
        mask = row_ok[:, None]
    else:
        mask = row_ok[:, None] & (features < D)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def load_chunks(
    ptr,
    rows,
    row_ok,
    stride_n,
    stride_d,
    D,
    BLOCK_D: tl.constexpr,
    NUM_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """All NUM_D chunks of the rows, as a tuple."""
    chunks = ()
    for c in tl.static_range(NUM_D):
        chunks = chunks + (
            load_chunk(ptr, rows, row_ok, stride_n, stride_d, c * BLOCK_D, D, BLOCK_D, EVEN_D),
        )
    return chunks


@triton.jit
def tile_dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b with float32 sums."""
    if INTERPRETING:
        if a.dtype == tl.bfloat16:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_chunks(xs, ys, NUM_D: tl.constexpr, PRECISION: tl.constexpr):
    """<x_i, y_j> for blocks held as tuples of chunks; float32 sums."""
    s = tl.zeros((xs[0].shape[0], ys[0].shape[0]), tl.float32)
    for c in tl.static_range(NUM_D):
        s = tile_dot(xs[c], tl.trans(ys[c]), s, PRECISION)
    return s


@triton.jit
def dot_streamed(
    x_ptr, y_ptr, rows, row_ok, cols, col_ok, stride_xn, stride_xd, stride_yn, stride_yd, D,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> reading both sides chunk by chunk, for D too large to keep x resident."""
    s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # D is a run-time value on purpose: with a constant count the compiler unrolls the loop and spills.
    for start in range(0, D, BLOCK_D):
        x = load_chunk(x_ptr, rows, row_ok, stride_xn, stride_xd, start, D, BLOCK_D, EVEN_D)
        y = load_chunk(y_ptr, cols, col_ok, stride_yn, stride_yd, start, D, BLOCK_D, EVEN_D)
        s = tile_dot(x, tl.trans(y), s, PRECISION)
    return s


@triton.jit
def exp(x):
    """Exponential of a difference of logits."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def id_range(ids):
    """Smallest and largest id of a block."""
    return tl.min(ids, 0), tl.max(ids, 0)


@triton.jit
def load_ids(ids_ptr, index, count):
    """Ids of a block.  Beyond the end the last one is repeated: a made-up id would widen the range.

    Loaded where it is needed and again where it is needed again (from L1): 64-bit ids of a tile's columns
    that stay alive through its epilogue cost 32 registers.
    """
    return tl.load(ids_ptr + tl.minimum(index, count - 1))


@triton.jit
def ids_may_meet(low, high, ids):
    """Whether an id of the block can lie in [low, high]; False: no pair of the tile is excluded."""
    return (tl.min(ids, 0) <= high) & (tl.max(ids, 0) >= low)


@triton.jit
def finite_or_zero(m):
    """The shift before exp: m, or 0 where m is +-inf, so that no inf - inf appears."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def softplus(s):
    """max(s, 0) + log1p(exp(-|s|)); log1p by 2 atanh(e / (2 + e)), accurate for the smallest e.

    t = e / (2 + e) <= 1/3, so the first omitted term t^16 / 17 is below 2e-9.  log(1 + e) would lose
    every digit for s < -16, where SigLIP's negatives live.
    """
    e = tl.exp2(-tl.abs(s) * LOG2_E)
    t = e / (2.0 + e)
    u = t * t
    p = u * (1.0 / 15.0) + (1.0 / 13.0)
    p = p * u + (1.0 / 11.0)
    p = p * u + (1.0 / 9.0)
    p = p * u + (1.0 / 7.0)
    p = p * u + (1.0 / 5.0)
    p = p * u + (1.0 / 3.0)
    # tl.where and not tl.maximum: a NaN has to pass, and maximum may drop it.
    return tl.where(s < 0.0, 0.0, s) + 2.0 * (t + t * u * p)


@triton.jit
def sigmoid(s):
    """1 / (1 + exp(-s)); for s < -88 exp(-s) is inf and the result 0, not NaN."""
    return 1.0 / (1.0 + tl.exp2(s * -LOG2_E))


@triton.jit
def tile_range(row_start, tiles, tiles_per_split, BLOCK_M: tl.constexpr, TRIANGLE: tl.constexpr):
    """Column tiles [lo, hi) of this program: its split, and from the diagonal on if TRIANGLE."""
    lo = tl.program_id(1) * tiles_per_split
    hi = tl.minimum(lo + tiles_per_split, tiles)
    if TRIANGLE:
        lo = tl.maximum(lo, row_start // BLOCK_M)
    return lo, hi
