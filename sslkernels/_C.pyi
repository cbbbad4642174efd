# SPDX-License-Identifier: Apache-2.0
# Addresses are data_ptr() integers, None for null; strides are in elements.  The names
# come from csrc/bindings*.cpp; tests/test_bindings.py compares this file with the module.
from typing import Any, NewType

from torch import Tensor

_Address = int | None
_Tiles = NewType("_Tiles", object)
_Contrastive = NewType("_Contrastive", object)
_Regression = NewType("_Regression", object)
_Paired = NewType("_Paired", object)
_Triplet = NewType("_Triplet", object)
_Vae = NewType("_Vae", object)

def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str, /) -> None: ...
def has_bf16() -> bool: ...
def has_openmp() -> bool: ...
def workspace_peak() -> int: ...
def reset_workspace_peak() -> None: ...
def release_workspaces() -> None: ...
def fill_workspaces(with_nan: bool, /) -> None: ...
def peak_flops(*, bf16: bool, n_threads: int) -> float: ...
def round_trip(*, exchanges: int) -> float: ...
def tiles(
    *,
    kind: str,
    dtype: str,
    d: int,
    q: _Address,
    n: int,
    k: _Address,
    m: int,
    scale: _Address,
    bias: _Address,
    ids_q: _Address,
    ids_k: _Address,
    n_threads: int,
) -> _Tiles: ...
def pairwise_forward(
    tiles: _Tiles,
    /,
    *,
    row: _Address,
    col: _Address,
    threshold_row: _Address,
    threshold_col: _Address,
    rank_row: _Address,
    rank_col: _Address,
) -> None: ...
def pairwise_backward(
    tiles: _Tiles,
    /,
    *,
    row: _Address,
    col: _Address,
    drow: _Address,
    dcol: _Address,
    dq: _Address,
    dk: _Address,
) -> float: ...
def attend(
    tiles: _Tiles,
    /,
    *,
    lse: _Address,
    mean_key: _Address,
    threshold: _Address,
    rank: _Address,
) -> None: ...
def extremes(
    tiles: _Tiles, /, *, bias_k: _Address, max_same: _Address, min_other: _Address
) -> None: ...
def contrastive(
    *,
    layout: str,
    reduction: str,
    dtype: str,
    normalize: bool,
    d: int,
    n: int,
    a: _Address,
    a_stride: int,
    b: _Address,
    b_stride: int,
    scale: _Address,
    bias: _Address,
    ids_q: _Address,
    bf16: bool,
    n_threads: int,
) -> _Contrastive: ...
def contrastive_forward(
    contrastive: _Contrastive,
    /,
    *,
    state: _Address,
    mean_key: _Address,
    tiles: _Address,
    bank: _Address = ...,
    bank_rows: int = ...,
    bank_stride: int = ...,
    ids_k: _Address = ...,
    sigma: float = ...,
    loss: _Address,
    rank: _Address,
) -> None: ...
def contrastive_backward(
    contrastive: _Contrastive,
    /,
    *,
    state: _Address,
    mean_key: _Address,
    tiles: _Address,
    dloss: _Address,
    dloss_stride: int,
    da: _Address,
    db: _Address,
    want_dscale: bool,
    dbias: _Address = ...,
    sigma: float = ...,
) -> float: ...
def contrastive_at_once(
    contrastive: _Contrastive,
    /,
    *,
    state: _Address,
    loss: _Address,
    da: _Address,
    db: _Address,
    want_dscale: bool,
    dbias: _Address = ...,
    sigma: float = ...,
) -> float: ...
def kept_tiles(*, layout: str, dtype: str, n: int, d: int) -> int: ...
def unit_forward(
    *,
    dtype: str,
    d: int,
    n: int,
    x: _Address,
    x_stride: int,
    eps: float,
    n_threads: int,
    unit_dtype: str,
    unit: _Address,
    norm: _Address,
) -> None: ...
def unit_backward(
    *,
    dtype: str,
    d: int,
    n: int,
    x: _Address,
    x_stride: int,
    eps: float,
    n_threads: int,
    dunit_dtype: str,
    dunit: _Address,
    dunit_stride: int,
    norm: _Address,
    dx: _Address,
) -> None: ...
def regression(
    *,
    reduction: str,
    dtype: str,
    d: int,
    n: int,
    prediction: _Address,
    prediction_stride: int,
    target: _Address,
    target_stride: int,
    cosine: bool = ...,
    n_threads: int,
) -> _Regression: ...
def regression_forward(regression: _Regression, /, *, state: _Address, loss: _Address) -> None: ...
def regression_backward(
    regression: _Regression,
    /,
    *,
    state: _Address,
    dloss: _Address,
    dloss_stride: int,
    dprediction: _Address,
) -> None: ...
def paired(
    *,
    reduction: str,
    dtype: str,
    normalize: bool,
    d: int,
    n: int,
    query: _Address,
    query_stride: int,
    positive_key: _Address,
    positive_stride: int,
    scale: _Address,
    ids_q: _Address,
    ids_k: _Address,
    n_threads: int,
) -> _Paired: ...
def paired_forward(
    paired: _Paired,
    /,
    *,
    negatives: _Address,
    m: int,
    row_stride: int,
    key_stride: int,
    lse: _Address,
    positive: _Address,
    norms: _Address,
    mean_key: _Address,
    loss: _Address,
    rank: _Address,
) -> float: ...
def paired_backward(
    paired: _Paired,
    /,
    *,
    negatives: _Address,
    m: int,
    row_stride: int,
    key_stride: int,
    lse: _Address,
    positive: _Address,
    norms: _Address,
    mean_key: _Address,
    dloss: _Address,
    dloss_stride: int,
    dquery: _Address,
    dpositive: _Address,
    dnegatives: _Address,
) -> float: ...
def triplet(
    *,
    reduction: str,
    dtype: str,
    normalize: bool,
    cosine: bool,
    d: int,
    n: int,
    z: _Address,
    z_stride: int,
    margin: _Address,
    ids: _Address,
    n_threads: int,
) -> _Triplet: ...
def triplet_forward(
    triplet: _Triplet,
    /,
    *,
    chosen: _Address,
    distance: _Address,
    norm: _Address,
    share: _Address,
    loss: _Address,
) -> None: ...
def triplet_backward(
    triplet: _Triplet,
    /,
    *,
    chosen: _Address,
    distance: _Address,
    norm: _Address,
    share: _Address,
    dloss: _Address,
    dz: _Address,
) -> float: ...
def vae(
    *,
    likelihood: str,
    dtype: str,
    d: int,
    n: int,
    reconstruction: _Address,
    reconstruction_stride: int,
    x: _Address,
    x_stride: int,
    spread: _Address,
    spread_stride: int,
    n_threads: int,
) -> _Vae: ...
def vae_forward(
    vae: _Vae,
    /,
    *,
    z: int,
    mean: _Address,
    mean_stride: int,
    log_variance: _Address,
    log_variance_stride: int,
    weights: _Address,
    reconstruction: _Address,
    kl: _Address,
) -> None: ...
def vae_backward(
    vae: _Vae,
    /,
    *,
    z: int,
    mean: _Address,
    mean_stride: int,
    log_variance: _Address,
    log_variance_stride: int,
    weights: _Address,
    drec: _Address,
    row_stride: int,
    dkl: _Address,
    dreconstruction: _Address,
    dx: _Address,
    dspread: _Address,
    dmean: _Address,
    dlog_variance: _Address,
) -> None: ...
def reparameterize(
    *,
    dtype: str,
    n: int,
    mean: _Address,
    log_variance: _Address,
    dz: _Address,
    out: _Address,
    seed: _Address,
    n_threads: int,
) -> None: ...
def features_forward(
    *,
    features: list[int],
    targets: list[int],
    sizes: list[int],
    dtypes: list[str],
    target_dtypes: list[str],
    n: int,
    smooth: bool,
    beta: float,
    wide: bool,
    n_threads: int,
    out: _Address,
) -> None: ...
def features_backward(
    *,
    features: list[int],
    targets: list[int],
    sizes: list[int],
    dtypes: list[str],
    target_dtypes: list[str],
    n: int,
    smooth: bool,
    beta: float,
    wide: bool,
    n_threads: int,
    dout: _Address,
    gradients: list[_Address],
) -> None: ...
def enqueue(
    *,
    queue: _Address,
    queue_dtype: str,
    size: int,
    dim: int,
    ptr: _Address,
    fill: _Address,
    keys: _Address,
    keys_dtype: str,
    n: int,
    keys_stride: int,
    normalize: bool,
    queue_labels: _Address,
    labels: _Address,
    n_threads: int,
) -> None: ...

class EmaPlan:
    def __init__(
        self,
        *,
        targets: list[int],
        sources: list[int],
        sizes: list[int],
        target_dtypes: list[str],
        source_dtypes: list[str],
        indices: list[int] = ...,
        firsts: list[int] = ...,
    ) -> None: ...
    def run(
        self, *, decay: float, stochastic_rounding: bool, seed: int, step: int, n_threads: int
    ) -> None: ...

class CopyPlan:
    def __init__(self, *, targets: list[int], sources: list[int], bytes: list[int]) -> None: ...
    def run(self) -> None: ...

class TensorWatch:
    def __init__(
        self,
        *,
        tensors: list[Tensor],
        data_ptr: int,
        numel: int,
        dtype: int,
        dim: int,
        strides: int,
    ) -> None: ...
    def unchanged(self, a: list[Tensor], b: list[Tensor], /) -> bool: ...

class SlotWatch:
    def __init__(self, *, dicts: list[dict[str, Any]]) -> None: ...
    def unchanged(self) -> bool: ...
