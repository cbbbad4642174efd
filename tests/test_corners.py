# SPDX-License-Identifier: Apache-2.0
"""Corners of the kernels that mutants and random cases found without a test of their own."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_alike, check_loss, engine, engines, outcome, threads
from loss_cases import ON_TILES, Case, negatives, views
from torch import Tensor, nn

import sslkernels
from sslkernels import reference

_C = pytest.importorskip("sslkernels._C", reason="the C++ extension is not built")


@pytest.mark.parametrize("mode", ["in batch", "bank", "learned", "paired"])
def test_ids_that_are_equal_in_32_bits_only(on_engine: str, mode: str) -> None:
    """Negative ones too: who compares 32 bits leaves out too much."""
    n, m = 9, 12
    q, p = torch.randn(n, 5), torch.randn(n, 5)
    ids_q = torch.arange(n) % 3 * 2**32 - 2**62
    ids_k = torch.arange(m) % 4 * 2**32 - 2**62
    given: list[Tensor] = [q, p]
    more = {"query_ids": ids_q}
    if mode != "in batch":
        given.append(torch.randn(m, 5) if mode != "paired" else torch.randn(n, m, 5))
        more["negative_ids"] = ids_k if mode != "paired" else ids_k.expand(n, m)
        more |= {"negative_mode": "paired"} if mode == "paired" else {}

    def call(module):
        def loss(leaves: list[Tensor]) -> Tensor:
            keys = leaves[2] if len(leaves) > 2 else None
            keys = keys.detach() if mode == "bank" and keys is not None else keys
            return module.info_nce_loss(leaves[0], leaves[1], keys, 0.3, **more)

        return loss

    got, want = outcome(call(sslkernels), given), outcome(call(reference), given)
    assert_alike(got, want, mode)


@pytest.mark.parametrize("elements", [65536, 65537, 131073, 65599])
@pytest.mark.parametrize("n_threads", [2, 3])
def test_the_last_element_of_an_average(elements: int, n_threads: int) -> None:
    """Shares of the threads are multiples of 64 elements, whatever is left over."""
    target, source = torch.zeros(elements), torch.randn(elements)
    with engine(engines()[-1]), threads(n_threads):
        sslkernels.ema_update_([target], [source], 0.5)
    assert torch.equal(target, source * 0.5)


def test_integers_below_32_bits_are_refused() -> None:
    arguments = {"layout": "joint", "dtype": "float32", "n": 3, "d": 2}
    assert _C.kept_tiles(**arguments) == 0
    call = dict(reduction="mean", dtype="float32", d=2, n=1, prediction=None, prediction_stride=2)
    with pytest.raises(
        TypeError, match="n_threads must be an integer of 32 bits, got -1099511627776"
    ):
        _C.regression(**call, target=None, target_stride=2, n_threads=-(2**40))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", engines())
def test_every_number_of_16_bits_and_those_between(name: str, dtype: torch.dtype) -> None:
    """Rounded as torch rounds: subnormals, ties, the step to infinity; vectors and the tail of one."""
    exact = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(dtype).float()
    exact = exact[exact.isfinite()].sort().values
    between = exact[:-1].double() + exact.double().diff() / 2
    nearly = [between.float().nextafter(torch.tensor(x)) for x in (-torch.inf, torch.inf)]
    wide = torch.cat((exact, between.float(), *nearly))
    target = torch.zeros(len(wide), dtype=dtype)
    with engine(name):
        sslkernels.ema_update_([target], [wide], 0.0)
        one = [torch.zeros(1, dtype=dtype) for _ in range(400)]
        some = wide[:: len(wide) // 400][:400]
        sslkernels.ema_update_(one, list(some.split(1)), 0.0)
    assert torch.equal(target, wide.to(dtype))
    assert torch.equal(torch.cat(one), some.to(dtype))


@pytest.mark.parametrize("temperature", [0.5, 0.01])  # one shift for all rows, and running maxima
def test_ranks_among_a_bank(on_engine: str, temperature: float) -> None:
    q, bank = torch.randn(33, 24), torch.randn(150, 24)
    p = q + 3 * torch.randn(33, 24)
    got = sslkernels.info_nce_loss(q, p, bank, temperature, return_metrics=True)[1]
    want = reference.info_nce_loss(q, p, bank, temperature, return_metrics=True)[1]
    assert 0 < float(want[0]) < float(want[1]) < 1
    assert_alike(list(got), list(want))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("loss", ["nt_xent_loss", "clip_loss", "info_nce_loss", "byol_loss"])
def test_rows_shorter_than_eps(on_engine: str, loss: str, dtype: torch.dtype) -> None:
    """Below 1e-12 the norm is a constant: the gradient is not projected."""
    x, y = torch.randn(5, 6, dtype=dtype), torch.randn(5, 6, dtype=dtype)
    x[1] *= 6e-13 / x[1].norm()
    y[2] *= 3e-13 / y[2].norm()
    more = {"logit_scale": 2.0, "normalize": True} if loss == "clip_loss" else {}

    def run(module):
        return lambda leaves: getattr(module, loss)(*leaves, **more)

    got = outcome(run(sslkernels), [x, y])
    want = outcome(run(reference), [x.double(), y.double()])
    assert_alike(got[:1], want[:1])
    for g, w in zip(got[1:], want[1:], strict=True):
        assert_alike(
            [g / w.abs().amax(1, True).clamp(min=1)], [w / w.abs().amax(1, True).clamp(min=1)]
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("loss", ["nt_xent_loss", "info_nce_loss", "byol_loss", "simsiam_loss"])
def test_rows_whose_squares_overflow_are_rows_of_zeros(
    on_engine: str, loss: str, dtype: torch.dtype
) -> None:
    """As torch's normalize makes them, in every backend: not NaN in one and 0 in another."""
    largest = 1e30 if dtype == torch.float32 else 1e200
    x, y = torch.randn(5, 6, dtype=dtype), torch.randn(5, 6, dtype=dtype)
    more = (x.flip(0), y.flip(0)) if loss == "simsiam_loss" else ()
    huge, zero = x.clone(), x.clone()
    huge[1:3] *= largest
    zero[1:3] = 0
    y[1] *= largest
    other = y.clone()
    other[1] = 0
    got = getattr(sslkernels, loss)(huge, y, *more)
    assert_alike([got], [getattr(reference, loss)(zero, other, *more)])


@pytest.mark.parametrize("size", [0.0, 1e-41, 1e-30, 1e-17, 1e200])
@pytest.mark.parametrize("short", [1, 3, 6])
def test_uniformity_of_rows_that_do_not_become_unit_vectors(
    on_engine: str, short: int, size: float
) -> None:
    """Their squared length is not 1, and the loss is made of distances."""
    z = torch.randn(6, 5, dtype=torch.float64)
    z[:short] *= size / z[:short].norm(dim=1, keepdim=True)
    got, want = (m.uniformity_loss(z) for m in (sslkernels, reference))
    assert_alike([got], [want], f"{short} rows of length {size}", 1e-9)


def test_a_weight_that_is_transposed_in_place(on_engine: str) -> None:
    """Same memory, same size, other strides: a kept plan must notice."""
    online, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    ema = sslkernels.EMA(online, 0.5)
    for step in range(3):
        before = ema.module.weight.detach().clone()
        if step:
            online.weight.data = online.weight.data.t()
        else:
            online.weight.data.copy_(other.weight.data)
        ema.update(online)
        expected = 0.5 * before + 0.5 * online.weight.detach()
        torch.testing.assert_close(ema.module.weight.detach(), expected)


def test_gradients_of_a_bias_in_self_mode(on_engine: str) -> None:
    """SigLIP of a batch with itself has its diagonal blocks counted once."""
    from flat import pairwise

    q = torch.randn(150, 8, dtype=torch.float64) / 3

    def ours(q: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return pairwise("softplus", q, scale=scale, bias=bias).row

    def truth(q: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        s = q @ q.T * scale + bias
        return torch.logaddexp(s, torch.zeros_like(s)).sum(1)

    scalars = [torch.tensor(x, dtype=q.dtype) for x in (2.0, -0.5)]
    weights = torch.linspace(0.5, 1.5, 150, dtype=q.dtype)
    check_loss(ours, truth, [q, *scalars], name=on_engine, dloss=weights)


@pytest.mark.parametrize("wanted", ["keys", "queries"])
def test_gradients_of_one_side_with_ids(on_engine: str, wanted: str) -> None:
    """The problem is transposed where only the keys have a gradient: so must its ids be."""
    from flat import pairwise

    q, k = torch.randn(40, 8, dtype=torch.float64), torch.randn(70, 8, dtype=torch.float64)
    ids_q, ids_k = torch.arange(40) % 3, torch.arange(70) % 5
    scale = torch.tensor(0.7, dtype=q.dtype)

    def ours(leaf: Tensor) -> Tensor:
        sides = (q, leaf) if wanted == "keys" else (leaf, k)
        return pairwise("lse", *sides, scale=scale, ids_q=ids_q, ids_k=ids_k, want_col=True).row

    def truth(leaf: Tensor) -> Tensor:
        sides = (q, leaf) if wanted == "keys" else (leaf, k)
        s = sides[0] @ sides[1].T * scale
        return s.masked_fill(ids_q[:, None] == ids_k, -torch.inf).logsumexp(1)

    check_loss(ours, truth, [k if wanted == "keys" else q], name=f"{on_engine} {wanted}")


@pytest.mark.parametrize("loss", ["nt_xent_loss", "info_nce_loss", "dcl_loss"])
def test_one_feature_has_no_gradient(on_engine: str, loss: str) -> None:
    """Its unit is a sign, whatever its size: what cancels must cancel, not leave a rounding of 1 / |x|."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = [torch.randn(5, 1, generator=generator).requires_grad_() for _ in range(2)]
        value = getattr(sslkernels, loss)(*x, temperature=0.1)
        for gradient in torch.autograd.grad(value, x):
            assert torch.equal(gradient, torch.zeros(5, 1)), f"{on_engine}, seed {seed}"


class Frozen(Case):
    """A bank without a gradient, which is read once."""

    def run(self, function, inputs, keywords):
        q, p, bank, temperature = inputs
        return function(q, p, bank.detach(), temperature, **keywords)


BANK = Frozen("info_nce_loss bank", lambda n, d: [*views(n, d), negatives(n, d), torch.tensor(0.2)])
# Losses that compute in bfloat16 where they are asked to, and the kernels that do.
IN_BFLOAT16 = (
    "nt_xent_loss",
    "info_nce_loss batch",
    "info_nce_loss bank",
    "clip_loss",
    "siglip_loss",
    "sup_con_loss",
    "dcl_loss",
)
BFLOAT16_ISA = [isa for isa in _C.available_isas() if isa == "avx512_bf16"]


@pytest.mark.parametrize(
    ("case", "isa", "compute"),
    [(c, isa, None) for c in (*ON_TILES, BANK) for isa in _C.available_isas()]
    + [
        (c, isa, torch.bfloat16)
        for c in (*ON_TILES, BANK)
        for isa in BFLOAT16_ISA
        if c.name in IN_BFLOAT16
    ],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_what_another_call_left_in_the_workspace(
    case: Case, isa: str, compute: torch.dtype | None
) -> None:
    """Workspaces are not cleared: the same bits where they are full of NaN."""
    more = {} if compute is None else {"compute_dtype": compute}
    for n, d in ((1, 8), (3, 5), (33, 20), (70, 129), (130, 16)):
        results = []
        for spoilt in (False, True):
            _C.fill_workspaces(spoilt)
            try:
                with engine(f"cpu:{isa}"):
                    results.append(
                        outcome(lambda x: case.call(sslkernels, x, **more), case.make(n, d))
                    )
            finally:
                _C.fill_workspaces(False)
        for got, wanted in zip(*reversed(results), strict=True):
            assert torch.equal(got.nan_to_num(-7), wanted.nan_to_num(-7)), (n, d)
