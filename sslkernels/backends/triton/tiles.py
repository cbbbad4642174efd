# SPDX-License-Identifier: Apache-2.0
"""The tile engine: every kernel visits the tiles of S = scale * X Y^T (+ bias) and keeps none.

``x`` [N, D] is the *held* side: a program keeps BLOCK_N of its rows on chip and sweeps over ``y`` [M, D],
the *swept* side.  For the gradient of k the launcher swaps the roles: there is one backward kernel.

What all kernels share, and why:

* A program's first row is an int64 before it is multiplied by a stride; within a block offsets are int32, and
  the strides are compile-time constants, so that the addresses of a tile are one pointer and constants.
* Operands have whole blocks of rows: ``plan.packed`` fills them up with zeros where they have not, and every
  vector likewise.  So no load needs a mask, and neither padding nor whatever lies behind a buffer can
  enter a reduction: columns from M on are -inf in S or zero rows in a product, rows from N on are not stored.
* D is swept in chunks of ``BLOCK_D``, the last one masked.  D = 768 is six chunks of 128 and wastes
  nothing, where padding to the next power of two would waste a quarter.
* Beyond D = 256 a loop over tiles with a held block keeps what does not change where it is needed
  (``disable_licm``): the descriptors of all chunks of x, computed ahead, would take 64 registers and spill.
* exp(S - c) = exp2(dot * k - c2) with k = scale * LOG2_E is one multiply-add and one hardware instruction.
  c is one number for all of S, ``constant_shift(scale)``: right for unit rows up to a scale of 64 + 53, and
  any others as long as no sum leaves [TINY, HUGE].  Every kernel checks its sums and computes what fails
  again with a running maximum, so the shift is never a question of correctness.
* No atomics: every partial result has a slot of its own and the combine kernels read the slots in
  a fixed order.
"""

# Triton reads annotations of kernel arguments itself (tl.constexpr), so no `from __future__ import
# annotations` here: it would turn them into strings.

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# Arguments that are read or written a tile at a time, from addresses that are multiples of 16 bytes.
MATRICES = (
    "x_ptr", "y_ptr", "g_ptr", "dx_ptr", "acc_ptr", "parts_ptr", "mean_ptr", "a_ptr", "b_ptr", "da_ptr",
    "db_ptr", "unit_ptr",
)  # fmt: skip


def kernel(fn: Callable[..., Any]) -> Any:
    """``triton.jit`` for a kernel whose sizes vary: one binary serves every number of rows.

    Triton would compile anew for an integer that is 1 or a multiple of 16, and for a vector that begins
    elsewhere: a last batch of 255 rows must not cost seconds.
    """
    plain = [
        name
        for name, parameter in inspect.signature(fn).parameters.items()
        if parameter.annotation is not tl.constexpr
    ]
    pointers = [name for name in plain if name.endswith("_ptr")]
    return triton.jit(
        do_not_specialize=[name for name in plain if name not in pointers],
        do_not_specialize_on_alignment=[name for name in pointers if name not in MATRICES],
    )(fn)


def wait_turn(_semantic: Any = None) -> None:
    """First statement of every kernel: nothing is read or written before the launches before it have ended.

    Where a launch may be placed while the one before it still runs (``configs.compiler_options``), this
    waits, and says that the next one may be placed.  Elsewhere, and in the interpreter, it is nothing.
    """
    if _semantic is None or not getattr(_semantic.builder.options, "launch_pdl", False):
        return
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    gdc_wait(_semantic=_semantic)
    gdc_launch_dependents(_semantic=_semantic)


wait_turn.__triton_builtin__ = True  # type: ignore[attr-defined]  # the compiler calls it

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Softmax weights of float16 operands are multiplied by 2^14: the smallest weight that keeps full
# precision falls from 6e-5 to 4e-9 and the largest (two sides of G: 2 * 2^14) is below 65504.
HALF_LIFT = tl.constexpr(16384.0)
NO_INDEX = tl.constexpr(0x7FFFFFFF)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
# Logits up to here need no shift: exp(64) * 2^24 terms is 2^116.
SAFE_LOGIT = tl.constexpr(64.0)
# A sum of at most 2^24 exponentials between these lost nothing: what was flushed to 0 is below 2^-126 a
# term, together 2^-26 of TINY; and 2^20 slots of HUGE do not overflow.
TINY = tl.constexpr(2.0**-76)
HUGE = tl.constexpr(2.0**106)
# G = exp(S - c) (a_i + b_j) with a_i = drow_i exp(c - row_i) where the log-sum-exps of a block lie within
# CALM_SPREAD of c: then no factor leaves float32, and the rounding of either argument is below 1e-6.
CALM_SPREAD = tl.constexpr(16.0)
# And where |c| is at most this: k is rounded, which costs exp(S - c) a relative 2^-24 |S|.
CALM_CENTER = tl.constexpr(128.0)
# Triton's interpreter keeps bfloat16 as uint16 and multiplies those in tl.dot.  There the operands
# are widened first, which is exact and what a tensor core does.
INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))

KIND_LSE = tl.constexpr(0)
KIND_SOFTPLUS = tl.constexpr(1)
# Which pairs are left out: none; those of equal ids, where ids are row numbers modulo a period (odd); those
# of equal ids, whatever they are.
EXCLUDE_NONE = tl.constexpr(0)
EXCLUDE_PERIOD = tl.constexpr(1)  # a tile has one multiple of the period at most
EXCLUDE_IDS = tl.constexpr(2)
EXCLUDE_SHORT_PERIOD = tl.constexpr(3)
# Ids are summed up in spans of this many (``kernels_rows.narrow_kernel``).
SPAN = tl.constexpr(64)


# ---- operands ------------------------------------------------------------------------------------


@triton.jit
def load_chunk(
    ptr, start, chunk,
    ROWS: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK_D]: one chunk of the rows from ``start`` on; 0 beyond D."""
    rows = tl.arange(0, ROWS)
    if ROWS * STRIDE >= 2147483648:
        rows = rows.to(tl.int64)
    features = tl.arange(0, BLOCK_D)
    ptrs = ptr + (tl.cast(start, tl.int64) * STRIDE + chunk * BLOCK_D)
    ptrs = ptrs + (rows[:, None] * STRIDE + features[None, :])
    if D % BLOCK_D == 0:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(features < D - chunk * BLOCK_D)[None, :], other=0.0)


@triton.jit
def load_block(
    ptr, start,
    ROWS: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    NUM_D: tl.constexpr,
):  # fmt: skip
    """All NUM_D chunks of ROWS rows, as a tuple."""
    chunks = ()
    for c in tl.static_range(NUM_D):
        chunks = chunks + (load_chunk(ptr, start, c, ROWS, STRIDE, D, BLOCK_D),)
    return chunks


@triton.jit
def store_chunk(
    ptr, row, chunk, values, ok,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of rows of a contiguous [., D] matrix from ``row`` on, where ``ok`` [ROWS]."""
    features = tl.arange(0, BLOCK_D)
    mask = ok[:, None]
    if D % BLOCK_D != 0:
        mask = mask & (features < D - chunk * BLOCK_D)[None, :]
    # One pointer and constants: addresses of 64 bits would take two registers an element.
    ptrs = ptr + (tl.cast(row, tl.int64) * D + chunk * BLOCK_D)
    ptrs = ptrs + (tl.arange(0, values.shape[0])[:, None] * D + features[None, :])
    tl.store(ptrs, values, mask=mask)


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
def dot_coming(
    xs, coming, y_ptr, y_start, y_next,
    SWEPT_FIRST: tl.constexpr, ROWS_Y: tl.constexpr, STRIDE_Y: tl.constexpr, D: tl.constexpr,
    PREFETCH: tl.constexpr, NUM_D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(<x_i, y_j>, the first chunks of the rows from ``y_next`` on): x held, y by way of registers.

    ``coming`` are the first PREFETCH chunks of this tile; while one is multiplied the next are on their way.
    """
    s = tl.zeros((xs[0].shape[0], ROWS_Y), tl.float32)
    if SWEPT_FIRST:
        s = tl.zeros((ROWS_Y, xs[0].shape[0]), tl.float32)
    for c in tl.static_range(NUM_D):
        start = y_start
        if PREFETCH > 0 and c + PREFETCH >= NUM_D:
            start = y_next
        chunk = load_chunk(y_ptr, start, (c + PREFETCH) % NUM_D, ROWS_Y, STRIDE_Y, D, BLOCK_D)
        if PREFETCH > 0:
            y = coming[0]
            coming = coming[1:] + (chunk,)
        else:
            y = chunk
        if SWEPT_FIRST:
            s = tile_dot(y, tl.trans(xs[c]), s, PRECISION)
        else:
            s = tile_dot(xs[c], tl.trans(y), s, PRECISION)
    return s, coming


@triton.jit
def dot_streamed(
    x_ptr, y_ptr, x_start, y_start, chunks,
    ROWS_X: tl.constexpr, ROWS_Y: tl.constexpr, STRIDE_X: tl.constexpr, STRIDE_Y: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> reading both sides chunk by chunk, for D too large to keep a side on chip."""
    s = tl.zeros((ROWS_X, ROWS_Y), tl.float32)
    # The count is a run-time value on purpose: the compiler would unroll a constant one and spill.
    for c in range(0, chunks):
        x = load_chunk(x_ptr, x_start, c, ROWS_X, STRIDE_X, D, BLOCK_D)
        y = load_chunk(y_ptr, y_start, c, ROWS_Y, STRIDE_Y, D, BLOCK_D)
        s = tile_dot(x, tl.trans(y), s, PRECISION)
    return s


# ---- arithmetic ----------------------------------------------------------------------------------


@triton.jit
def exp(x):
    """exp by way of exp2."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def finite_or_zero(m):
    """The shift before exp: m, or 0 where m is +-inf, so that no inf - inf appears."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def constant_shift(scale):
    """c, in units of S: what the largest logit of unit rows is above SAFE_LOGIT."""
    return tl.maximum(tl.abs(scale) - SAFE_LOGIT, 0.0)


@triton.jit
def softplus2(t):
    """log(1 + 2^t) = max(t, 0) * ln 2 + log1p(2^-|t|); 0 for -inf, NaN for NaN.

    log1p(e) = e P(e) on [0, 1], P minimax of degree 8 to 3e-8 of the value: log(1 + e) would lose every
    digit of the small e where the negatives of SigLIP live.
    """
    e = tl.exp2(-tl.abs(t))
    p = e * 0.005232676863670349 - 0.02950516901910305
    p = p * e + 0.07822583615779877
    p = p * e - 0.13663235306739807
    p = p * e + 0.19106002151966095
    p = p * e - 0.2484298050403595
    p = p * e + 0.3331909775733948
    p = p * e - 0.4999949336051941
    p = p * e + 0.9999999403953552
    return tl.maximum(t, 0.0) * LN_2 + e * p


@triton.jit
def sigmoid2(t):
    """1 / (1 + 2^-t); for t < -128 2^-t is inf and the result 0, not NaN."""
    return 1.0 / (1.0 + tl.exp2(-t))


@triton.jit
def _pairs(parts, COUNT: tl.constexpr):
    """Sums of neighbours."""
    halves = ()
    for i in tl.static_range(COUNT // 2):
        halves = halves + (parts[2 * i] + parts[2 * i + 1],)
    return halves


@triton.jit
def tree_sum(parts, COUNT: tl.constexpr):
    """Sum of a tuple of 4, 16 or 32 values, neighbours first."""
    if COUNT == 32:
        return _pairs(_pairs(_pairs(_pairs(_pairs(parts, 32), 16), 8), 4), 2)[0]
    elif COUNT == 16:
        return _pairs(_pairs(_pairs(_pairs(parts, 16), 8), 4), 2)[0]
    else:
        tl.static_assert(COUNT == 4)
        return _pairs(_pairs(parts, 4), 2)[0]
