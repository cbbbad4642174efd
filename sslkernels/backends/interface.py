# SPDX-License-Identifier: Apache-2.0
"""What a backend must provide, and the values that it is given: the tiles, in one place.

Every contrastive loss of the library is a reduction over the tiles of

    S_ij = scale * <q_i, k_j> (+ bias),     q: [N, D],  k: [M, D]

which is never written to memory.  ``Tiles`` says what S is, and is the one noun that ops, backends and
launchers pass on.  The layer above (``sslkernels.ops``) has checked shapes, dtypes and devices, so a
backend assumes them:

* ``acc`` is the accumulation dtype: float64 for float64 inputs, float32 for everything else.
  Every floating output of a backend has dtype ``acc``.
* Scalars are 0-d ``acc`` tensors on the device of ``q`` (read on the device: no host sync).
* Any of N, M and D may be 0.  Without features every dot product is 0, so that S is the bias; without
  keys nothing is allowed.
* Rows or columns that have nothing allowed give ``-inf`` (lse), 0 (softplus, weighted mean) or -1
  (indices), and no gradient.
* A NaN in the inputs reaches every output that depends on it; logits of +-1e4 are fine; results do
  not depend on the number of threads or on the order in which tiles are visited; nothing is added
  with atomics; extra memory is O((N + M) * D).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import accumulation_dtype

Kind = Literal["lse", "softplus"]


# ------------------------------------------------------------------------------------------- tiles


class Tiles(NamedTuple):
    """What S is: S_ij = scale * <q_i, k_j> + bias, less the pairs of equal ids."""

    q: Tensor  # [N, D], any strides, used as it is (not normalised here)
    k: Tensor | None  # [M, D], dtype and device of q; None is self mode: k = q, S is symmetric
    scale: Tensor  # 0-d acc
    bias: Tensor | None = None  # 0-d acc, kind "softplus" only; op extremes: [M] acc, for columns
    ids_q: Tensor | None = None  # [N] int64
    ids_k: Tensor | None = None  # [M] int64; None in self mode, where it is ids_q

    @property
    def is_self(self) -> bool:
        """Whether the keys are the queries."""
        return self.k is None

    @property
    def n(self) -> int:
        """Rows."""
        return self.q.shape[0]

    @property
    def m(self) -> int:
        """Columns."""
        return self.q.shape[0] if self.k is None else self.k.shape[0]

    @property
    def acc(self) -> torch.dtype:
        """Accumulation dtype."""
        return accumulation_dtype(self.q.dtype)

    def excluded(self, rows: slice) -> Tensor | None:
        """[rows, M] bool: which pairs are left out, those of equal ids; None: nothing is.

        In self mode unique ids leave out the diagonal.  NT-Xent takes its positives out of the
        tiles by giving both views of one sample the same id.
        """
        if self.ids_q is None:
            return None
        columns = self.ids_q if self.ids_k is None else self.ids_k
        return self.ids_q[rows, None] == columns[None, :]


class Thresholds(NamedTuple):
    """Above which S_ij pairs are counted, in units of S; None: no count."""

    row: Tensor | None = None  # [N] acc
    col: Tensor | None = None  # [M] acc, only where columns are reduced


class RowState(NamedTuple):
    """What the backward pass knows of the rows (or the columns)."""

    lse: Tensor | None  # [N] acc, of the forward pass; kind "softplus" needs none
    gradient: Tensor  # [N] acc: of what forward returned for the rows


class Wanted(NamedTuple):
    """Which gradients are to be computed.  Of a whole loss: dq is that of a, dk that of b."""

    dq: bool
    dk: bool
    dscale: bool = False


class PairwiseForward(NamedTuple):
    """Reductions of one pass over the tiles."""

    row: Tensor  # [N] acc: kind "lse": log sum_j exp(S_ij); "softplus": sum_j softplus(S_ij)
    col: Tensor  # [M] acc: the same over i for each column; empty [0] unless want_col
    rank_row: Tensor  # [N] int64: how many allowed j have S_ij > threshold_i; [0] without threshold
    rank_col: Tensor  # [M] int64: how many allowed i have S_ij > threshold_j; [0] without threshold


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

    max_same: Tensor  # [N] int64: argmax_j of S_ij over ids equal (self mode: and j != i)
    min_other: Tensor  # [N] int64: argmin_j of S_ij over ids different


class Backend(Protocol):
    """The primitives.  ``chunked.py`` is the readable example to follow."""

    def why_unavailable(
        self,
        device: torch.device,  # of any type; "cuda" without a number is the current device
    ) -> str:
        """Why tensors on this device can't be served; an empty string when they can.

        Asked once a device, before the first call with tensors on it.
        """
        ...

    def pairwise_forward(
        self, kind: Kind, tiles: Tiles, want_col: bool, thresholds: Thresholds
    ) -> PairwiseForward:
        """One pass over the tiles, reduced over rows, and over columns with ``want_col``.

        In self mode want_col is False: columns are the rows.
        """
        ...

    def pairwise_backward(
        self, kind: Kind, tiles: Tiles, row: RowState, col: RowState | None, wanted: Wanted
    ) -> PairwiseBackward:
        """Recompute S and form G, then dq = scale * G k and dk = scale * G^T q.

        lse:       G_ij = drow_i exp(S_ij - row_i) + dcol_j exp(S_ij - col_j)
        softplus:  G_ij = (drow_i + dcol_j) sigmoid(S_ij)
        Excluded pairs have G_ij = 0, and a term whose row_i or col_j is -inf is 0: nothing is allowed there.
        ``col`` is None where columns have no gradient, and in self mode, where dq is the whole
        gradient, scale * (G + G^T) q.  ``wanted.dscale`` is for the ops: backends leave it.
        """
        ...

    def attend(self, tiles: Tiles, threshold: Tensor | None) -> Attend:
        """LSE over rows and the softmax-weighted mean key in one pass (online softmax); k is given."""
        ...

    def extremes(self, tiles: Tiles) -> Extremes:
        """Arg-max over equal ids and arg-min over different ids, per row; ids are given."""
        ...


# ------------------------------------------------------------------------------------- whole losses

Layout = Literal["joint", "cross", "both", "bank", "decoupled", "sigmoid", "classes"]


class Problem(NamedTuple):
    """A whole loss with one positive a row (layouts: ``sslkernels.ops.contrastive``)."""

    layout: str  # see Layout
    a: Tensor  # [N, D], any strides
    b: Tensor  # [N, D]; layout "classes": a again, detached, and not used
    bank: Tensor | None  # [K, D], layout "bank" only
    scale: Tensor  # 0-d acc
    # [N] int64; None: the row number (bank: nothing is excluded).  Layout "classes": the labels.
    ids_q: Tensor | None = None
    ids_k: Tensor | None = None  # [K] int64, layout "bank" with ids_q only
    normalize: bool = True  # rows, of the bank too, are divided by max(norm, 1e-12) first
    reduction: str = "mean"  # "mean", "sum" or "none"
    bf16: bool = False  # negatives are multiplied in bfloat16; positives never are
    bias: Tensor | None = None  # 0-d acc, layout "sigmoid" only
    sigma: float = 0.0  # layout "decoupled": width of DCLW's weights; 0: they are 1

    @property
    def n(self) -> int:
        """Rows of a."""
        return self.a.shape[0]

    @property
    def acc(self) -> torch.dtype:
        """Accumulation dtype."""
        return accumulation_dtype(self.a.dtype)

    @property
    def joined(self) -> bool:
        """Whether the rows are cat(a, b)."""
        return self.layout in ("joint", "decoupled")

    @property
    def rows(self) -> int:
        """R, the rows that are reduced: 2N where both sides count, N where one does."""
        return (2 if self.layout in ("joint", "both", "decoupled") else 1) * self.a.shape[0]

    @property
    def outputs(self) -> int:
        """Rows of the loss before it is reduced."""
        return (2 if self.joined else 1) * self.a.shape[0]

    @property
    def loss_shape(self) -> tuple[int, ...]:
        """0-d, or a number for each row."""
        return (self.outputs,) if self.reduction == "none" else ()


class Kept(NamedTuple):
    """What the forward pass of a whole loss leaves for its backward pass."""

    state: Tensor  # [R + 3N] acc, see State
    mean_key: Tensor | None  # [N, D] acc, softmax-weighted mean of the bank; layout "bank" only
    tiles: Tensor | None = None  # logits, in the backend's own layout


class State(NamedTuple):
    """Views of ``Kept.state``; R = ``Problem.rows``."""

    lse: Tensor  # [R] log-sum-exp over the negatives; layout "sigmoid": sum of softplus
    # [N] <a_i, b_i> of the (normalised) rows, without scale; layout "classes": the sum of the positives
    positive: Tensor
    inv: Tensor  # [2N] what the rows of a and b were multiplied with: 1 without normalize

    @classmethod
    def split(cls, state: Tensor, n: int) -> State:
        """The parts of the op's one tensor, [R + 3N]."""
        rows = state.shape[0] - 3 * n
        return cls(state[:rows], state[rows : rows + n], state[rows + n :])


class Contrastive(NamedTuple):
    """Results of a whole loss."""

    loss: Tensor  # 0-d, or [2N] (joint, decoupled) or [N], acc
    state: Tensor  # [R + 3N], see State
    mean_key: Tensor | None  # [N, D] acc; layout "bank" only
    rank: Tensor | None  # [R] int64, how many negatives are above the positive; if wanted


class AtOnce(NamedTuple):
    """Gradients of a whole loss for an incoming gradient of 1, computed with its value."""

    da: Tensor | None  # [N, D] of the dtype of a
    db: Tensor | None
    dscale: float | None
    dbias: Tensor | None  # 0-d acc


class Paired(NamedTuple):
    """InfoNCE with negatives of its own for every query (``sslkernels.ops.paired``)."""

    query: Tensor  # [N, D]
    positive_key: Tensor  # [N, D]
    negative_keys: Tensor | None  # [N, M, D]; None in backward: they get no gradient
    scale: Tensor  # 0-d acc
    ids_q: Tensor | None = None  # [N] int64: (i, m) is left out where ids_q[i] == ids_k[i, m]
    ids_k: Tensor | None = None  # [N, M] int64
    normalize: bool = True
    reduction: str = "mean"

    @property
    def n(self) -> int:
        """Queries."""
        return self.query.shape[0]

    @property
    def acc(self) -> torch.dtype:
        """Accumulation dtype."""
        return accumulation_dtype(self.query.dtype)


class PairedState(NamedTuple):
    """What the forward pass of ``Paired`` leaves for its backward pass; acc."""

    lse: Tensor  # [N] log-sum-exp over the negatives
    positive: Tensor  # [N] <query_i, positive_i> of the (normalised) rows, without scale
    norms: Tensor  # [2N] what the rows of query and positive_key were divided by
    mean_key: Tensor  # [N, D] softmax-weighted mean of the negatives


class Triplets(NamedTuple):
    """The batch-hard triplet loss (``sslkernels.ops.triplet_hard``)."""

    z: Tensor  # [N, D], any strides
    ids: Tensor  # [N] int64 labels
    margin: Tensor  # 0-d acc, added to d(a, p) - d(a, n)
    normalize: bool  # rows are divided by max(norm, 1e-12) first
    cosine: bool  # d = 1 - <x, y> instead of the Euclidean distance; only with normalize
    reduction: str = (
        "mean"  # over anchors with a triplet; "sum"; "mean_nonzero": over terms above 0
    )

    @property
    def n(self) -> int:
        """Rows."""
        return self.z.shape[0]

    @property
    def acc(self) -> torch.dtype:
        """Accumulation dtype."""
        return accumulation_dtype(self.z.dtype)


class TripletState(NamedTuple):
    """What the forward pass of ``Triplets`` leaves for its backward pass."""

    chosen: Tensor  # [2, N] int64: the hardest positives and negatives, -1 where there is none
    distance: Tensor  # [2, N] acc: of row i from those; 0 where one of the two is missing
    norm: Tensor  # [N] acc: what rows were divided by, 1 without normalize
    share: Tensor  # 0-d acc: what a term counts in the loss; NaN where rows are not finite


class WholeLosses(Protocol):
    """What a backend may have beyond the primitives; the ops compose it where one lacks it.

    The CPU has it, and Triton contrastive_* of the problems of which its ``serves_contrastive`` is true.
    Gradients have the dtype of their inputs.
    """

    def contrastive_forward(
        self, problem: Problem, want_rank: bool, keep_tiles: bool
    ) -> tuple[Contrastive, Tensor | None]:
        """The loss, and with ``keep_tiles`` the logits where they are worth keeping."""
        ...

    def contrastive_backward(
        self, problem: Problem, kept: Kept, dloss: Tensor, wanted: Wanted
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of a, b, scale and bias (None without one)."""
        ...

    def contrastive_at_once(
        self, problem: Problem, wanted: Wanted
    ) -> tuple[Contrastive, AtOnce] | None:
        """The loss and its gradients; None where two calls are better.

        Only the CPU has it: a few rows take less time than the way to the kernels.
        """
        ...

    def regression_forward(
        self, prediction: Tensor, target: Tensor, reduction: str, cosine: bool
    ) -> tuple[Tensor, Tensor]:
        """Loss and state, see ``sslkernels.ops.regression``."""
        ...

    def regression_backward(
        self,
        prediction: Tensor,
        target: Tensor,
        reduction: str,
        cosine: bool,
        state: Tensor,
        dloss: Tensor,
    ) -> Tensor:
        """The gradient of the prediction."""
        ...

    def paired_forward(self, problem: Paired) -> tuple[Tensor, PairedState, Tensor, Tensor]:
        """Loss, state, rank [N] int64 and mean <query_i, negative_im> (0-d)."""
        ...

    def paired_backward(
        self,
        problem: Paired,
        state: PairedState,
        dloss: Tensor,
        want_query: bool,
        want_positive: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of query, positive_key, negative_keys and scale; [0] where not wanted."""
        ...

    def triplet_forward(self, problem: Triplets) -> tuple[Tensor, TripletState]:
        """The loss (0-d acc) and state."""
        ...

    def triplet_backward(
        self, problem: Triplets, state: TripletState, dloss: Tensor, want_z: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Gradients of z, where wanted, and of the margin (0-d acc)."""
        ...


class RowKernels(Protocol):
    """What a backend may have beyond the primitives: C++ and Triton have it, the others leave it to torch.

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


class Vae(NamedTuple):
    """A variational autoencoder's output, what it should be, and its codes (``sslkernels.ops.vae``)."""

    reconstruction: Tensor  # [N, D] logits (bernoulli) or means (gaussian)
    x: Tensor  # [N, D]
    spread: Tensor | None  # [N, D] log-variances, gaussian only; None: variance 1
    mean: Tensor  # [N, Z]
    log_variance: Tensor  # [N, Z]
    weights: Tensor | None  # [Z] acc, of the KL of each dimension; no gradient
    likelihood: str  # "bernoulli" or "gaussian"

    @property
    def n(self) -> int:
        """Rows."""
        return self.x.shape[0]

    @property
    def acc(self) -> torch.dtype:
        """Accumulation dtype."""
        return accumulation_dtype(self.x.dtype)


class VaeTerms(NamedTuple):
    """The two terms of every row, without constants; acc."""

    reconstruction: Tensor  # [N]
    kl: Tensor  # [N]


class VaeWanted(NamedTuple):
    """Which gradients of ``Vae``."""

    want_reconstruction: bool
    want_x: bool
    want_spread: bool
    want_mean: bool
    want_log_variance: bool


class VaeGradients(NamedTuple):
    """In the dtypes and shapes of the inputs; None where not wanted."""

    reconstruction: Tensor | None
    x: Tensor | None
    spread: Tensor | None
    mean: Tensor | None
    log_variance: Tensor | None


class Autoencoders(Protocol):
    """One pass over elements; every backend with tiles has it."""

    def vae_forward(self, problem: Vae) -> VaeTerms:
        """Reconstruction and KL of every row."""
        ...

    def vae_backward(
        self,
        problem: Vae,
        drec: Tensor,  # [N] acc, any stride
        dkl: Tensor,  # [N] acc, any stride
        wanted: VaeWanted,
    ) -> VaeGradients:
        """The gradients that are wanted."""
        ...

    def reparameterize(self, mean: Tensor, log_variance: Tensor, seed: Tensor) -> Tensor:
        """Return mean + exp(log_variance / 2) eps(seed), contiguous; same shape and dtype."""
        ...

    def reparameterize_backward(self, log_variance: Tensor, seed: Tensor, dz: Tensor) -> Tensor:
        """Gradient of log_variance, contiguous: dz exp(log_variance / 2) eps / 2."""
        ...

    def features_forward(
        self,
        features: list[Tensor],  # L of [N, d_l], float dtypes
        targets: list[Tensor],  # as many, same shapes
        smooth: bool,  # smooth L1 of width beta; else squares
        beta: float,  # 0 or at least 2^-126
    ) -> Tensor:
        """Mean distance by sample and map, [N, L] acc of the widest dtype."""
        ...

    def features_backward(
        self,
        features: list[Tensor],
        targets: list[Tensor],
        smooth: bool,
        beta: float,
        dout: Tensor,  # [N, L]
        wanted: list[bool],
    ) -> list[Tensor | None]:
        """Gradients of the features that are wanted."""
        ...
