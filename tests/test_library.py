# SPDX-License-Identifier: Apache-2.0
"""Values of ops unfolded and folded in one place, from the schema."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sslkernels.backends.interface import Problem, RowState, Thresholds, Tiles, Wanted
from sslkernels.ops import _library as library
from sslkernels.ops.contrastive import CONTRASTIVE
from sslkernels.ops.pairwise import BACKWARD, PAIRWISE

TILES = "Tensor q, Tensor? k, Tensor scale, Tensor? bias, Tensor? ids_q, Tensor? ids_k"


def test_schemas_that_torch_sees() -> None:
    assert PAIRWISE.schema == (
        f"pairwise(str kind, {TILES}, bool want_col, Tensor? threshold_row, Tensor? threshold_col) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )
    assert BACKWARD.schema == (
        f"pairwise_backward(str kind, {TILES}, Tensor? row_lse, Tensor row_gradient, "
        "Tensor? col_lse, Tensor? col_gradient, bool want_dq, bool want_dk, bool want_dscale) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )
    assert CONTRASTIVE.schema == (
        "contrastive(str layout, Tensor a, Tensor b, Tensor? bank, Tensor scale, Tensor? ids_q, "
        "Tensor? ids_k, bool normalize, str reduction, bool bf16, Tensor? bias, "
        "float sigma, bool want_rank) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )


def test_values_come_back_as_they_went() -> None:
    one = torch.ones(1)
    tiles = Tiles(one, None, one, ids_q=one)
    state, want = RowState(None, one), Wanted(True, False, True)
    for col in (None, state):
        values = ["lse", tiles, state, col, want]
        flat = library._unfold(BACKWARD.form, values)
        assert len(flat) == len(BACKWARD.names)
        back = library._fold(BACKWARD.form, flat)
        assert back == values
        assert [type(v) for v in back] == [type(v) for v in values]
    # A value of which nothing is given is none.
    flat = library._unfold(PAIRWISE.form, ["lse", tiles, True, Thresholds()])
    assert library._fold(PAIRWISE.form, flat)[-1] is None


def test_a_forgotten_value_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        PAIRWISE("lse", Tiles(torch.ones(2, 2), None, torch.ones(())), True)


def test_a_new_field_reaches_the_schema_by_itself() -> None:
    class Wider(NamedTuple):
        q: Tensor
        margin: Tensor | None

    name, schema, form, results = library._expand(
        "op(*Wider, Wider? other, SymInt n) -> Tensor", {"Wider": Wider}
    )
    assert (name, results) == ("op", None)
    assert schema == (
        "op(Tensor q, Tensor? margin, Tensor? other_q, Tensor? other_margin, SymInt n) -> Tensor"
    )
    assert [part.width for part in form] == [2, 2, 1]
    with pytest.raises(ValueError, match="not a schema"):
        library._expand("op(Tensor q)", {})


def test_every_field_of_a_problem_is_an_argument() -> None:
    assert CONTRASTIVE.names[: len(Problem._fields)] == list(Problem._fields)
