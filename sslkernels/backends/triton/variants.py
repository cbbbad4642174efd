# SPDX-License-Identifier: Apache-2.0
"""Which kernels are compiled ahead of time, and with which flags: the tables of ``aot``."""

from __future__ import annotations

from typing import Any

import triton

from . import (
    autoencoders,
    features,
    kernels,
    kernels_backward,
    kernels_contrastive,
    kernels_rows,
    pairs,
    plan,
    updates,
)

Types = str | tuple[str, ...]  # of an argument, or of the members of a tuple

FLOAT32 = {
    "row_s_ptr", "col_s_ptr", "m_ptr", "s_ptr", "scale_ptr", "bias_ptr", "lift_ptr", "factor_ptr",
    "center_ptr", "threshold_row_ptr", "threshold_col_ptr", "threshold_ptr", "row_ptr", "drow_ptr",
    "col_ptr", "dcol_ptr", "dx_ptr", "dbias_ptr", "acc_ptr", "parts_ptr", "value_ptr", "bias_y_ptr",
    "mean_ptr", "out_ptr", "lse_ptr", "grad_ptr", "weight_ptr", "weight_x_ptr", "weight_y_ptr",
    "positive_ptr", "inv_ptr", "logit_ptr", "loss_ptr", "dloss_ptr", "lse_out_ptr", "row_weight_ptr",
    "along_ptr", "divisor_ptr", "divisor", "factor",
}  # fmt: skip
INT32 = {
    "row_rank_ptr", "col_rank_ptr", "part_rank_ptr", "index_ptr", "short_ptr", "short_x_ptr",
    "short_y_ptr", "span_ptr", "span_x_ptr", "span_y_ptr", "wide_ptr", "calm_ptr", "calm_x_ptr",
    "calm_y_ptr",
}  # fmt: skip
INT64 = {"ids_ptr", "ids_x_ptr", "ids_y_ptr", "rank_ptr", "index_out_ptr"}
# Integers that are taken for multiples of 16, beside D.
DIVISIBLE = {"stride_xn", "stride_gn", "stride_n", "stride_r", "stride_x", "stride_s", "stride_v"}
OPERANDS = {"x_ptr", "y_ptr", "g_ptr", "unit_ptr", "a_ptr", "b_ptr", "da_ptr", "db_ptr"}

_FORWARD = {"KIND": 0, "TRIANGLE": False, "HAS_COL": False, "HAS_BIAS": False, "EXCLUDE": 1,
            "HAS_RANK_ROW": False, "HAS_RANK_COL": False}  # fmt: skip
_LSE = {"KIND": 0, "HAS_ROW": True, "HAS_COL": True, "HAS_BIAS": False, "EXCLUDE": 1,
        "WANT_DBIAS": False}  # fmt: skip
_SOFTPLUS = {**_LSE, "KIND": 1, "HAS_BIAS": True, "WANT_DBIAS": True}
# One variant for each way a kernel is used by the losses.  (kernel, its row of the config table, flags)
VARIANTS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "forward self": (
        kernels.forward_kernel, "forward", {**_FORWARD, "TRIANGLE": True, "HAS_COL": True},
    ),
    "forward self, few rows": (
        kernels.forward_kernel,
        "narrow",
        {**_FORWARD, "TRIANGLE": True, "HAS_COL": True, "EXCLUDE": 3},
    ),
    "forward self ids": (
        kernels.forward_kernel,
        "forward",
        {**_FORWARD, "TRIANGLE": True, "HAS_COL": True, "EXCLUDE": 2},
    ),
    "forward rows": (kernels.forward_kernel, "forward", {**_FORWARD, "EXCLUDE": 0}),
    "forward rows+cols": (
        kernels.forward_kernel, "forward", {**_FORWARD, "EXCLUDE": 0, "HAS_COL": True},
    ),
    "forward rows+cols ids": (
        kernels.forward_kernel, "forward", {**_FORWARD, "HAS_COL": True, "EXCLUDE": 2},
    ),
    "forward softplus": (
        kernels.forward_kernel, "narrow", {**_FORWARD, "KIND": 1, "HAS_BIAS": True},
    ),
    "ranks self": (
        kernels.forward_kernel,
        "narrow",
        {**_FORWARD, "TRIANGLE": True, "HAS_COL": True, "HAS_RANK_ROW": True, "HAS_RANK_COL": True},
    ),
    "ranks rows+cols ids": (
        kernels.forward_kernel,
        "narrow",
        {**_FORWARD, "HAS_COL": True, "EXCLUDE": 2, "HAS_RANK_ROW": True, "HAS_RANK_COL": True},
    ),
    "extremes": (kernels_rows.extremes_kernel, "extremes", {"SELF": True, "HAS_BIAS": True}),
    "backward": (kernels_backward.backward_kernel, "fused", _LSE),
    "backward, few rows": (kernels_backward.backward_kernel, "fused", {**_LSE, "EXCLUDE": 3}),
    "backward ids": (kernels_backward.backward_kernel, "fused", {**_LSE, "EXCLUDE": 2}),
    "backward rows": (kernels_backward.backward_kernel, "fused", {**_LSE, "HAS_COL": False}),
    "backward softplus": (kernels_backward.backward_kernel, "fused", _SOFTPLUS),
    "attend": (kernels_rows.attend_kernel, "fused", {"EXCLUDE": 0, "HAS_RANK": False}),
    "attend ids ranks": (kernels_rows.attend_kernel, "fused", {"EXCLUDE": 2, "HAS_RANK": True}),
    "panel": (kernels_backward.panel_kernel, "panel", {**_LSE, "SYMMETRIC": True}),
    "panel ids": (kernels_backward.panel_kernel, "panel", {**_LSE, "EXCLUDE": 2, "SYMMETRIC": False}),
    "panel softplus": (
        kernels_backward.panel_kernel, "panel", {**_SOFTPLUS, "EXCLUDE": 2, "SYMMETRIC": False},
    ),
    "product": (kernels_backward.product_kernel, "product", {}),
}  # fmt: skip


# The kernels around the tiles, one program shape each: (kernel, constants, types of arguments whose
# names are not in the lists above).  "T" is the dtype of the operands.
_ROWS = {"ACC": triton.language.float32, "BLOCK_N": 8, "BLOCK_D": 128}
_AGAIN = {"STRIDE_X": 128, "STRIDE_Y": 128, "D": 128, "PRECISION": "ieee",
          "SLOTS": 16, "BLOCK_M": 32, "BLOCK_D": 32}  # fmt: skip
_PAIRS = {"NORMALIZE": True, "EXACT": "T", "D": 128, "STRIDE_AN": 128, "STRIDE_AD": 1, "STRIDE_BN": 128,
          "STRIDE_BD": 1, "WIDTH": 128, "NUM_D": 1, "BLOCK_D": 128}  # fmt: skip
_COMBINE = {**_AGAIN, "SLOTS": 128, "LOSS": True, "PER_ROW": False, "KIND": 0,
            "TRIANGLE": True, "ROWS": True, "HAS_RANK": True, "EXCLUDE": 1,
            "HELD": 128, "RATIO": 2, "BLOCK_N": plan.COMBINE_ROWS}  # fmt: skip
_ELEMENTS = {"BLOCK_D": autoencoders.BLOCK_D}
_VAE: dict[str, Types] = {
    **dict.fromkeys("r_ptr x_ptr spread_ptr mean_ptr v_ptr dr_ptr dx_ptr ds_ptr dm_ptr dv_ptr".split(), "*T"),
    **dict.fromkeys("rec_ptr kl_ptr drec_ptr dkl_ptr".split(), "*fp32"),
}  # fmt: skip
_UNITS = {"UNIT": features.UNIT, "BLOCK": features.BLOCK}
_MAPS: dict[str, Types] = {
    "features": ("*T",) * 16, "targets": ("*T",) * 16, "gradients": ("*T",) * 16, "sizes": ("i32",) * 16,
    "columns": ("i32",) * 16, "dout_ptr": "*fp32", "beta": "fp32", "inverse": "fp32",
    "half_inverse": "fp32",
}  # fmt: skip
SMALL: dict[str, tuple[Any, dict[str, Any], dict[str, Types]]] = {
    "combine": (kernels.combine_kernel, {**_COMBINE, "FINAL": True}, {}),
    "combine, fold": (kernels.combine_kernel, {**_COMBINE, "ROWS": False, "FINAL": False, "LOSS": False}, {}),
    "attend combine": (
        kernels_rows.attend_combine_kernel,
        {**_AGAIN, "SLOTS": 32, "HAS_RANK": False, "EXCLUDE": 0, "ONLINE": False, "HELD": 64,
         "BLOCK_N": 16},
        {},
    ),
    "extremes combine": (
        kernels_rows.extremes_combine_kernel, {"HELD": 128, "BLOCK_L": 256}, {},
    ),
    "narrow": (pairs.narrow_kernel, {"SPANS": plan.NARROW_SPANS}, {}),
    "weigh": (
        kernels_backward.weigh_kernel, {"HAS_LIFT": False, "SPANS": plan.NARROW_SPANS}, {},
    ),
    "lift": (kernels_backward.lift_kernel, {"BLOCK": 4096}, {}),
    "gather": (
        kernels_backward.gather_kernel,
        {"D": 128, "HELD": 64, "FEATURES": 128, "SLOTS": 16, "BLOCK_N": 16,
         "BLOCK_D": 128},
        {},
    ),
    "prepare": (
        kernels_contrastive.prepare_kernel, {**_PAIRS, "HAS_LOGIT": True, "BLOCK_N": 8}, {"da_ptr": "*T"},
    ),
    "sum": (kernels_contrastive.sum_kernel, {"DIVIDE": True, "BLOCK": 1024}, {}),
    "lift pairs": (kernels_contrastive.lift_pairs_kernel, {"PER_ROW": False, "BLOCK": 4096}, {}),
    "weigh pairs": (
        kernels_contrastive.weigh_pairs_kernel,
        {**_PAIRS, "PER_ROW": False, "HAS_LIFT": True, "BLOCK_N": plan.SPAN, "num_warps": 8},
        {"da_ptr": "*T"},
    ),
    "finish": (
        kernels_contrastive.finish_kernel,
        {**_PAIRS, "WANT_A": True, "WANT_B": True, "WANT_DSCALE": True, "HELD": 64, "SLOTS": 4,
         "BLOCK_N": 8},
        {"da_ptr": "*T"},
    ),
    "normalize": (updates.normalize_kernel, _ROWS, {"unit_ptr": "*T", "norm_ptr": "*fp32"}),
    "normalize backward": (
        updates.normalize_backward_kernel,
        _ROWS,
        {"dx_ptr": "*T", "dunit_ptr": "*fp32", "norm_ptr": "*fp32"},
    ),
    "EMA": (
        updates.ema_kernel,
        {"HAS_DECAY_PTR": False, "STOCHASTIC": False, "TARGET": "T", "SOURCE": triton.language.float32,
         "ACC": triton.language.float32, "ALIGNED": True, "BLOCK": updates.EMA_BLOCK},
        {"address_ptr": "*i64", "numel_ptr": "*i64", "tensor_ptr": "*i32", "start_ptr": "*i64",
         "place_ptr": "*i32", "decay_ptr": "*fp32", "decay_bits": "i64", "rest_bits": "i64",
         "seed": "i64", "step": "i64"},
    ),
    "enqueue": (
        updates.enqueue_kernel,
        {**_ROWS, "NORMALIZE": True, "HAS_LABELS": True},
        {"queue_ptr": "*T", "labels_ptr": "*i64", "position_ptr": "*i64", "keys_ptr": "*T",
         "new_labels_ptr": "*i64"},
    ),
    "advance": (updates.advance_kernel, {}, {"position_ptr": "*i64", "fill_ptr": "*i64"}),
    "VAE": (
        autoencoders.vae_forward_kernel,
        {"BERNOULLI": True, "HAS_SPREAD": False, "HAS_WEIGHT": False, **_ELEMENTS},
        _VAE,
    ),
    "VAE, variance": (
        autoencoders.vae_forward_kernel,
        {"BERNOULLI": False, "HAS_SPREAD": True, "HAS_WEIGHT": True, **_ELEMENTS},
        _VAE,
    ),
    "VAE backward, decoder": (
        autoencoders.vae_decoder_backward_kernel,
        {"BERNOULLI": True, "HAS_SPREAD": False, "WANT_R": True, "WANT_X": False, "WANT_S": False,
         **_ELEMENTS},
        _VAE,
    ),
    "VAE backward, decoder, variance": (
        autoencoders.vae_decoder_backward_kernel,
        {"BERNOULLI": False, "HAS_SPREAD": True, "WANT_R": True, "WANT_X": True, "WANT_S": True,
         **_ELEMENTS},
        _VAE,
    ),
    "VAE backward, code": (
        autoencoders.vae_latent_backward_kernel,
        {"HAS_WEIGHT": True, "WANT_M": True, "WANT_V": True, **_ELEMENTS},
        _VAE,
    ),
    "noise": (
        autoencoders.noise_kernel, {"FORWARD": True, "GROUPS": autoencoders.GROUPS},
        {"out_ptr": "*T", "x_ptr": "*T", "v_ptr": "*T", "seed_ptr": "*i64"},
    ),
    "noise backward": (
        autoencoders.noise_kernel, {"FORWARD": False, "GROUPS": autoencoders.GROUPS},
        {"out_ptr": "*T", "x_ptr": "*T", "v_ptr": "*T", "seed_ptr": "*i64"},
    ),
    "features": (
        features.features_forward_kernel, {"KIND": 0, "DIVIDE": False, **_UNITS}, _MAPS,
    ),
    "features, smooth L1": (
        features.features_forward_kernel, {"KIND": 2, "DIVIDE": True, **_UNITS}, _MAPS,
    ),
    "features combine": (
        features.features_combine_kernel,
        {"UNIT": features.UNIT, "BLOCK": features.COMBINE_BLOCK},
        _MAPS,
    ),
    "features backward": (features.features_backward_kernel, {"KIND": 0, **_UNITS}, _MAPS),
    "features backward, smooth L1": (
        features.features_backward_kernel, {"KIND": 2, **_UNITS}, _MAPS,
    ),
}  # fmt: skip
# 64-bit divisions by run-time values, none of them in an inner loop: a position in the queue once a key, a
# place on the line of tiles once a program or once a row (``pairs.share_of_line``, ``pairs.slots_of``).
DIVISIONS = dict.fromkeys(
    ("enqueue", "advance", "combine", "attend combine", "extremes combine", "gather"), 4
) | {"finish": 8}
