# SPDX-License-Identifier: Apache-2.0
"""What a backend must provide: the tile-engine primitives, in one place.

Every contrastive loss of the library is a reduction over the tiles of

    S_ij = scale * <q_i, k_j> (+ bias),     q: [N, D],  k: [M, D]

which is never written to memory.  A backend is a module with the functions below.  The layer
above (``sslkernels.ops``) has checked shapes, dtypes and devices, so a backend assumes them:

* ``q`` and ``k`` are 2-D, the same floating dtype, on one device, and used as they are (no
  normalisation happens here).  ``k is None`` means *self mode*: k = q, S is symmetric, and a
  backend may compute one triangle only.
* ``acc`` is the accumulation dtype: float64 for float64 inputs, float32 for everything else.
  Every floating output of a backend has dtype ``acc``.
* ``scale`` and ``bias`` are 0-d ``acc`` tensors on the device of ``q`` (read on the device: no host
  sync).
* ``ids_q`` [N] and ``ids_k`` [M], int64, or both None.  The pair (i, j) is *excluded* when
  ``ids_q[i] == ids_k[j]``.  In self mode ``ids_k`` is None and stands for ``ids_q``; the diagonal is
  excluded by unique ids.  NT-Xent takes its positives out of the tiles by giving both views of one
  sample the same id.
* Rows or columns that have nothing allowed give ``-inf`` (lse), 0 (softplus, weighted mean) or -1
  (indices), and no gradient.
* A NaN in the inputs reaches every output that depends on it; logits of +-1e4 are fine; results do
  not depend on the number of threads or on the order in which tiles are visited; nothing is added
  with atomics; extra memory is O((N + M) * D).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from torch import Tensor

Kind = Literal["lse", "softplus"]


class PairwiseForward(NamedTuple):
    """Reductions of one pass over the tiles."""

    row: Tensor  # [N] acc: kind "lse": log sum_j exp(S_ij); "softplus": sum_j softplus(S_ij)
    col: Tensor  # [M] acc: the same over i for each column; empty [0] unless want_col
    rank_row: (
        Tensor  # [N] int64: how many allowed j have S_ij > threshold_row[i]; [0] without threshold
    )
    rank_col: (
        Tensor  # [M] int64: how many allowed i have S_ij > threshold_col[j]; [0] without threshold
    )


class PairwiseBackward(NamedTuple):
    """Gradients of one pass over the recomputed tiles; a Tensor not asked for is empty [0]."""

    dq: Tensor  # [N, D] acc: scale * (G k); in self mode scale * (G q + G^T q)
    dk: Tensor  # [M, D] acc: scale * (G^T q); always empty in self mode
    dbias: Tensor  # 0-d acc: sum_ij G_ij for kind "softplus", else 0


class Attend(NamedTuple):
    """Row reductions for keys that need no gradient, finished in the forward pass."""

    lse: Tensor  # [N] acc
    mean_key: Tensor  # [N, D] acc: sum_j softmax_j(S_i:) k_j, so that d lse_i / d q_i = scale * mean_key_i
    rank: Tensor  # [N] int64: how many allowed j have S_ij > threshold[i]; [0] without threshold


class Extremes(NamedTuple):
    """Hard positives and negatives: indices, ties to the smallest index, -1 where there is none."""

    max_same: (
        Tensor  # [N] int64: argmax_j of S_ij + bias_k[j] over ids equal (self mode: and j != i)
    )
    min_other: Tensor  # [N] int64: argmin_j of S_ij + bias_k[j] over ids different


class Backend(Protocol):
    """The primitives.  ``chunked.py`` is the readable example to follow."""

    def pairwise_forward(
        self,
        kind: Kind,
        q: Tensor,  # [N, D]
        k: Tensor | None,  # [M, D]; None: self mode (want_col must then be False: row == col)
        scale: Tensor,  # 0-d acc
        bias: Tensor | None,  # 0-d acc, added to every S_ij
        ids_q: Tensor | None,  # [N] int64
        ids_k: Tensor | None,  # [M] int64
        want_col: bool,
        threshold_row: Tensor | None,  # [N] acc, in units of S
        threshold_col: Tensor | None,  # [M] acc, only with want_col
    ) -> PairwiseForward:
        """One pass over the tiles of S, reduced over rows (and columns)."""
        ...

    def pairwise_backward(
        self,
        kind: Kind,
        q: Tensor,
        k: Tensor | None,
        scale: Tensor,
        bias: Tensor | None,
        ids_q: Tensor | None,
        ids_k: Tensor | None,
        row: Tensor,  # [N] acc, from the forward pass (lse); ignored for softplus
        col: Tensor | None,  # [M] acc, or None when dcol is None; self mode: None
        drow: Tensor,  # [N] acc, gradient of row
        dcol: Tensor | None,  # [M] acc, gradient of col, or None
        want_dq: bool,
        want_dk: bool,
    ) -> PairwiseBackward:
        """Recompute S and form G, then dq = scale * G k and dk = scale * G^T q.

        lse:       G_ij = drow_i exp(S_ij - row_i) + dcol_j exp(S_ij - col_j)
        softplus:  G_ij = (drow_i + dcol_j) sigmoid(S_ij)
        Excluded pairs have G_ij = 0.  Where row_i is -inf nothing is allowed, so G_ij = 0 as well.
        In self mode dq is the whole gradient, scale * (G + G^T) q with dcol None.
        """
        ...

    def attend(
        self,
        q: Tensor,  # [N, D]
        k: Tensor,  # [M, D]
        scale: Tensor,
        ids_q: Tensor | None,
        ids_k: Tensor | None,
        threshold: Tensor | None,  # [N] acc
    ) -> Attend:
        """LSE over rows and the softmax-weighted mean key in one pass (online softmax)."""
        ...

    def extremes(
        self,
        q: Tensor,  # [N, D]
        k: Tensor | None,  # [M, D]; None: self mode
        scale: Tensor,
        bias_k: Tensor | None,  # [M] acc, added to column j
        ids_q: Tensor,  # [N] int64
        ids_k: Tensor | None,  # [M] int64
    ) -> Extremes:
        """Arg-max over equal ids and arg-min over different ids, per row."""
        ...


class RowKernels(Protocol):
    """What a backend may have beyond the primitives: Triton has it, the others leave it to torch.

    Used for float32, bfloat16 and float16; a backend that has one has both.
    """

    def normalize_rows(
        self,
        x: Tensor,  # [N, D], any strides
        eps: float,
        out: Tensor | None,  # [N, D] contiguous, any floating dtype; None: a new one, dtype of x
    ) -> tuple[Tensor, Tensor]:
        """Return x / max(|x|, eps) in ``out`` and |x| [N] acc, accumulated in acc for halves too."""
        ...

    def normalize_rows_backward(
        self,
        dunit: Tensor,  # [N, D], any floating dtype and strides
        x: Tensor,  # [N, D]
        norm: Tensor,  # [N] acc, as returned
        eps: float,
    ) -> Tensor:
        """Return dx in the dtype of x; below eps the norm is a constant: dunit / eps."""
        ...
