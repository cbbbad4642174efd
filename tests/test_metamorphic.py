# SPDX-License-Identifier: Apache-2.0
"""What must not change a loss, or change it in a known way; no truth is needed to see it broken.

The relations hold for every loss on every backend and instruction set.  Inputs are float64 unless a test says
otherwise: relations that are exact in real numbers then hold to 1e-9.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import SLACK, engine, engines, threads
from torch import Tensor, nn

import sslkernels as ssl

N, D = 67, 21  # more than a block of the baseline, tails of every vector
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of views x, y [N, D] and labels [N]

BANK = torch.randn(150, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

NORMALIZED: dict[str, Loss] = {
    "nt_xent": lambda x, y, c: ssl.nt_xent_loss(x, y, 0.2),
    "nt_xent, three views": lambda x, y, c: ssl.nt_xent_loss([x, y, x + 2 * y], temperature=0.3),
    "nt_xent, cold": lambda x, y, c: ssl.nt_xent_loss(x, y, 0.004),
    "info_nce": lambda x, y, c: ssl.info_nce_loss(x, y, None, 0.1),
    "info_nce, ids": lambda x, y, c: ssl.info_nce_loss(x, y, None, 0.1, query_ids=c),
    "info_nce, learned bank": lambda x, y, c: ssl.info_nce_loss(x, y, y.roll(1, 1), 0.1),
    "clip": lambda x, y, c: ssl.clip_loss(x, y, 8.0, normalize=True),
    "siglip": lambda x, y, c: ssl.siglip_loss(x, y, 8.0, -3.0, normalize=True),
    "sup_con": lambda x, y, c: ssl.sup_con_loss(x + y, c, 0.2),
    "dcl": lambda x, y, c: ssl.dcl_loss(x, y, 0.2),
    "dclw": lambda x, y, c: ssl.dcl_loss(x, y, 0.2, sigma=0.5),
    "byol": lambda x, y, c: ssl.byol_loss_symmetric(x, y, y, x),
    "simsiam": lambda x, y, c: ssl.simsiam_loss(x, y, y, x),
    "triplet, cosine": lambda x, y, c: ssl.triplet_loss(x + y, c, distance="cosine"),
    "alignment": lambda x, y, c: ssl.alignment_loss(x, y),
    "uniformity": lambda x, y, c: ssl.uniformity_loss(x),
}
RAW: dict[str, Loss] = {
    "nt_xent, raw": lambda x, y, c: ssl.nt_xent_loss(x, y, 5.0, normalize=False),
    "clip, raw": lambda x, y, c: ssl.clip_loss(x, y, 0.5),
    "triplet": lambda x, y, c: ssl.triplet_loss(x + y, c),
    "triplet, semihard": lambda x, y, c: ssl.triplet_loss(x + y, c, mining="semihard"),
    "triplet, all": lambda x, y, c: ssl.triplet_loss(x + y, c, mining="all", margin=0.5),
    "margin": lambda x, y, c: ssl.margin_loss(x, y, x, y.roll(1, 1)),
    "contrastive": lambda x, y, c: ssl.contrastive_loss(x, y, c == 1, 6.0),
    "uniformity, raw": lambda x, y, c: ssl.uniformity_loss(x / 5, normalize=False),
}
ALL = {**NORMALIZED, **RAW}
# Of these x and y are two views of one kind: nothing tells which is which.
SYMMETRIC = [
    "nt_xent", "nt_xent, cold", "nt_xent, raw", "clip", "clip, raw", "siglip", "sup_con", "dcl", "dclw",
    "byol", "simsiam", "triplet", "alignment", "contrastive",
]  # fmt: skip


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(N, D, generator=generator, dtype=torch.float64)
    views = [base + 0.7 * torch.randn(N, D, generator=generator, dtype=base.dtype) for _ in "xy"]
    return views[0].to(dtype), views[1].to(dtype), torch.arange(N) % 9


def value_and_gradients(loss: Loss, x: Tensor, y: Tensor, labels: Tensor) -> list[Tensor]:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    value = loss(x, y, labels)
    grads = torch.autograd.grad(value, (x, y), allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for g in grads)]


def same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-9) -> None:
    for g, w in zip(got, want, strict=True):
        scale = max(1e-3, float(w.abs().max()))
        error = float((g - w).abs().max())
        assert error <= tolerance * scale, f"{error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("name", ALL)
def test_permuted_rows_permute_the_gradients(on_engine: str, name: str) -> None:
    x, y, labels = inputs()
    order = torch.randperm(N)
    value, dx, dy = value_and_gradients(ALL[name], x, y, labels)
    got = value_and_gradients(ALL[name], x[order], y[order], labels[order])
    same(got, [value, dx[order], dy[order]])


@pytest.mark.parametrize("name", ALL)
def test_a_rotation_rotates_the_gradients(on_engine: str, name: str) -> None:
    x, y, labels = inputs()
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=x.dtype)).Q
    loss = ALL[name]
    if "roll" in name or name in ("info_nce, learned bank", "margin"):
        pytest.skip("its other input is a rolled copy, which a rotation does not commute with")
    value, dx, dy = value_and_gradients(loss, x, y, labels)
    got = value_and_gradients(loss, x @ rotation, y @ rotation, labels)
    same(got, [value, dx @ rotation, dy @ rotation], 1e-8)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_swapped_views_swap_the_gradients(on_engine: str, name: str) -> None:
    x, y, labels = inputs()
    value, dx, dy = value_and_gradients(ALL[name], x, y, labels)
    same(value_and_gradients(ALL[name], y, x, labels), [value, dy, dx])


# The sum of two views, or a third made of them, does not scale with them.
@pytest.mark.parametrize(
    "name",
    [n for n in NORMALIZED if n not in ("nt_xent, three views", "sup_con", "triplet, cosine")],
)
def test_lengths_of_rows_do_not_count_when_normalised(on_engine: str, name: str) -> None:
    """And the gradient shrinks as the row grows."""
    x, y, labels = inputs()
    a, b = (torch.empty(N, 1, dtype=x.dtype).uniform_(-6, 6).exp2() for _ in range(2))
    value, dx, dy = value_and_gradients(NORMALIZED[name], x, y, labels)
    same(value_and_gradients(NORMALIZED[name], a * x, b * y, labels)[:1], [value], 1e-9)
    _, da, db = value_and_gradients(NORMALIZED[name], a * x, b * y, labels)
    same([da * a, db * b], [dx, dy], 1e-8)


@pytest.mark.parametrize("name", ALL)
def test_features_of_zero_change_nothing(on_engine: str, name: str) -> None:
    """And get no gradient, where no other feature can be had from them."""
    if name in ("info_nce, learned bank", "margin"):
        pytest.skip("its other input is rolled along the features")
    x, y, labels = inputs()
    value, dx, dy = value_and_gradients(ALL[name], x, y, labels)
    wider = [nn.functional.pad(v, (0, 12)) for v in (x, y)]
    got = value_and_gradients(ALL[name], *wider, labels)
    same(got, [value, *(nn.functional.pad(g, (0, 12)) for g in (dx, dy))])


def test_temperature_is_a_scale_of_raw_rows(on_engine: str) -> None:
    x, y, labels = inputs()
    value, dx, dy = value_and_gradients(RAW["nt_xent, raw"], x, y, labels)
    shrunk = lambda x, y, c: ssl.nt_xent_loss(x / 8, y / 8, 5.0 / 64, normalize=False)  # noqa: E731
    same(value_and_gradients(shrunk, x, y, labels), [value, dx, dy])


# ---- parts and the whole -----------------------------------------------------------------------


@pytest.mark.parametrize("keys", [150, 6000])  # one range of keys, and several that are joined
def test_two_half_queues_make_one(on_engine: str, keys: int) -> None:
    """exp(loss) - 1 is a sum over the negatives."""
    x, y, _ = inputs()
    bank = torch.randn(keys, D, dtype=x.dtype)
    cut = keys // 3

    def terms(negatives: Tensor) -> Tensor:
        return ssl.info_nce_loss(x, y, negatives, 0.2, "none").expm1()

    whole, parts = terms(bank), terms(bank[:cut]) + terms(bank[cut:])
    same([whole], [parts])
    leaf = x.clone().requires_grad_()
    weights = torch.linspace(0.5, 1.5, N, dtype=x.dtype)

    def gradient(*banks: Tensor) -> Tensor:
        total = sum(ssl.info_nce_loss(leaf, y, b, 0.2, "none").expm1() @ weights for b in banks)
        return torch.autograd.grad(total, leaf)[0]

    same([gradient(bank)], [gradient(bank[:cut], bank[cut:])])


@pytest.mark.parametrize("labels", [False, True])
def test_two_half_batches_fill_a_queue_as_one(on_engine: str, labels: bool) -> None:
    """Round the end of the queue too; the same bits."""
    queues = [ssl.KeyQueue(50, D, labels=labels) for _ in range(2)]
    for step in range(5):
        keys, classes = torch.randn(33, D), torch.arange(33) + 100 * step
        queues[0].enqueue(keys, classes if labels else None)
        for part in (slice(0, 20), slice(20, 33)):
            queues[1].enqueue(keys[part], classes[part] if labels else None)
        for a, b in zip(*(q.state_dict().values() for q in queues), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("size", [1, 16, 40, 67])
def test_micro_batches_make_the_whole(size: int) -> None:
    """Each row's loss is its own where negatives are a queue; cached_step makes it so elsewhere."""
    x, y, _ = inputs()
    whole = value_and_gradients(lambda x, y, c: ssl.info_nce_loss(x, y, BANK, 0.2, "sum"), x, y, x)
    parts = [
        value_and_gradients(lambda x, y, c: ssl.info_nce_loss(x, y, BANK, 0.2, "sum"), *views, x)
        for views in zip(x.split(size), y.split(size), strict=True)
    ]
    value, dx, dy = zip(*parts, strict=True)
    same([torch.stack(value).sum(), torch.cat(dx), torch.cat(dy)], whole)

    encoder = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    for name, loss in (("nt_xent", ssl.nt_xent_loss), ("dcl", ssl.dcl_loss)):
        expected = loss(encoder(x), encoder(y))
        want = torch.autograd.grad(expected, list(encoder.parameters()))
        encoder.zero_grad()
        found = ssl.cached_step(encoder, [x, y], loss, size)
        got = [p.grad for p in encoder.parameters() if p.grad is not None]
        same([found.detach(), *got], [expected.detach(), *want]), name


# ---- threads and instruction sets ----------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_same_bits_for_any_number_of_threads(on_engine: str, name: str) -> None:
    """But for products of torch itself, which are all that "chunked" has."""
    x, y, labels = (v.repeat(5, *[1] * (v.ndim - 1)) for v in inputs(torch.float32))
    x, y = x + 0.1 * torch.randn(x.shape), y + 0.1 * torch.randn(y.shape)
    with threads(1):
        one = value_and_gradients(ALL[name], x, y, labels)
    for n in (2, 5):
        with threads(n):
            found = value_and_gradients(ALL[name], x, y, labels)
        if on_engine == "chunked":
            same(found, one, 1e-4)
            continue
        for a, b in zip(found, one, strict=True):
            assert torch.equal(a, b), f"{name} with {n} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_instruction_sets_agree(name: str, dtype: torch.dtype) -> None:
    """Each with each other, as closely as each with the truth."""
    x, y, labels = inputs(dtype)
    if "triplet" in name or name in ("margin", "nt_xent, three views", "sup_con"):
        x, y = x.float(), y.float()  # their inputs are sums, which halves round
    found: dict[str, list[Tensor]] = {}
    for each in engines():
        with engine(each):
            found[each] = [v.double() for v in value_and_gradients(ALL[name], x, y, labels)]
    first = next(iter(found.values()))
    slack = 4 * max(SLACK[x.dtype], 1e-10) * (25 if "cold" in name else 1)
    for each, results in found.items():
        for got, want in zip(results, first, strict=True):
            size = max(1e-2, float(want.abs().max()))
            error = float((got - want).abs().max())
            assert error <= slack * size, f"{name} on {each}: {error:.2e} of {size:.2e}"
