# SPDX-License-Identifier: Apache-2.0
"""EMA: arithmetic to the bit, every dtype, layouts, refusals, stochastic rounding."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import available_isas, engine, engines, threads
from torch import Tensor, nn

from sslkernels import EMA, ema_update_
from sslkernels.backends.rounding import philox_words, round_stochastic
from sslkernels.ops.eager import WRITES_LISTS
from sslkernels.ops.ema import Update

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
# 0 and 1; around a vector, a conversion block (512) and a thread's share (32768, 65536); odd.
SIZES = [0, 1, 7, 15, 16, 17, 511, 512, 513, 1025, 32769, 70001]


def exact(target: Tensor, source: Tensor, decay: float) -> np.ndarray:
    """fma(decay, t, (1 - decay) * s) rounded as promised, exact in between."""
    wide = torch.float64 in (target.dtype, source.dtype)
    acc = np.float64 if wide else np.float32
    t = target.double().numpy().astype(acc)
    s = source.double().numpy().astype(acc)
    product = acc(1.0 - decay) * s
    t = t.astype(np.longdouble)  # or NumPy 1 multiplies float32 by a scalar of any width in float32
    if wide:  # long double holds 64 bits of significand: not always exact, so callers allow one ulp
        return (np.longdouble(decay) * t + product).astype(np.float64)
    # 24 x 24 bits are exact in float64; the sum is rounded twice, which long double makes harmless
    # except on one input in 2^40.
    return (np.longdouble(acc(decay)) * t + product).astype(np.float32)


def pairs(target: torch.dtype, source: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    targets = [torch.randn(n).to(target) for n in SIZES]
    sources = [torch.randn(n).to(source) for n in SIZES]
    return targets, sources


@pytest.mark.parametrize("name", engines())
@pytest.mark.parametrize(
    ("target", "source"), list(itertools.product(DTYPES, DTYPES)), ids=lambda d: str(d)[6:]
)
def test_every_pair_of_dtypes(target: torch.dtype, source: torch.dtype, name: str) -> None:
    targets, sources = pairs(target, source)
    want = [exact(t, s, 0.9) for t, s in zip(targets, sources, strict=True)]
    before = [s.clone() for s in sources]
    with engine(name):
        ema_update_(targets, sources, 0.9)
    for got, expected, s, old in zip(targets, want, sources, before, strict=True):
        assert got.dtype == target
        assert torch.equal(s, old), "the source was written"
        rounded = torch.from_numpy(expected)
        if target in HALVES and rounded.dtype == torch.float64:
            rounded = rounded.float()
        rounded = rounded.to(target)
        fused = "chunked" not in name and torch.float64 not in (target, source)
        if fused:
            assert torch.equal(got, rounded), f"{(got != rounded).sum()} of {got.numel()} differ"
        else:  # plain torch may round the product and the sum: one unit in the last place each
            torch.testing.assert_close(
                got, rounded, rtol=2 * torch.finfo(target).eps, atol=2 * torch.finfo(target).eps
            )


def test_every_instruction_set_gives_the_same_bits() -> None:
    results = []
    for isa in available_isas():
        torch.manual_seed(0)
        targets = [torch.randn(5001), torch.randn(777).bfloat16(), torch.randn(99).half()]
        # A hard case for an emulated FMA: the product's low bits decide a tie.
        targets[0][:4] = torch.tensor([1.0 + 2**-23, 1.0 - 2**-24, 3e38, 1e-42])
        sources = [torch.randn(5001), torch.randn(777).half(), torch.randn(99)]
        sources[0][:4] = torch.tensor([2**-24, -(2**-25), 3e38, 1e-41])
        with engine(f"cpu:{isa}"):
            for step in range(3):
                ema_update_(targets, sources, 0.996)
                ema_update_(targets, sources, 0.996, stochastic_rounding=True, seed=5, step=step)
        results.append(targets)
    assert len(results) == len(available_isas()) >= 1
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("name", [name for name in engines() if name != "chunked"])
def test_the_sum_is_rounded_once(name: str) -> None:
    """decay * t + (1 - decay) * s lies 2^-54 below a tie of float32, which float64 can't hold."""
    t = torch.full((40,), 2**-24 * (1 + 2**-15))
    s = torch.full((40,), 2**15 * (1 + 2**-23))
    for sign in (1, -1):
        target = sign * t
        with engine(name):
            ema_update_([target], [sign * s], 1 - 2**-15)
        assert (target == sign * (1 + 2**-23)).all(), target[0].item()


@pytest.mark.parametrize("stochastic", [False, True])
def test_same_bits_for_any_number_of_threads(stochastic: bool) -> None:
    sizes = [1, 100_003, 3, 70_000, 0, 65_536]
    start = [torch.randn(n).to(d) for n, d in zip(sizes, itertools.cycle(DTYPES))]
    sources = [torch.randn(n) for n in sizes]
    results = []
    for n in (1, 2, 3, 7):
        targets = [t.clone() for t in start]
        with threads(n):
            ema_update_(targets, sources, 0.99, stochastic_rounding=stochastic, seed=1, step=2)
        results.append(targets)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(results[0], start, strict=True) if a.numel())


@pytest.mark.parametrize("name", engines())
def test_parts_of_tensors_are_rounded_as_the_whole(name: str) -> None:
    """Shards: the random bits count from where a part begins in its tensor."""
    wholes = [torch.randn(1000).bfloat16(), torch.randn(70_001).half(), torch.randn(9)]
    sources = [torch.randn(x.numel()) for x in wholes]
    cut = [(0, 0, 600), (0, 600, 1000), (1, 0, 513), (1, 513, 70_001), (2, 0, 9)]
    parts = [wholes[i][a:b].clone() for i, a, b in cut]
    with engine(name):
        ema_update_(wholes, sources, 0.9, stochastic_rounding=True, seed=3, step=4)
        places = [(i, a) for i, a, _ in cut]
        update = Update(parts, [sources[i][a:b] for i, a, b in cut], places=places)
        update.run(0.9, True, 3, 4)
    for part, (i, a, b) in zip(parts, cut, strict=True):
        assert torch.equal(part, wholes[i][a:b])


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", engines())
def test_ends_of_the_range(decay: float, name: str) -> None:
    t, s = torch.randn(100), torch.randn(100)
    old = t.clone()
    with engine(name):
        ema_update_([t], [s], decay)
    assert torch.equal(t, {0.0: s, 0.5: 0.5 * old + 0.5 * s, 1.0: old}[decay])


@pytest.mark.parametrize("name", engines())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan(dtype: torch.dtype, name: str) -> None:
    inf = float("inf")
    t = torch.tensor([inf, 1.0, float("nan"), 1.0, -inf, inf]).to(dtype)
    s = torch.tensor([1.0, inf, 1.0, float("nan"), 1.0, -inf]).to(dtype)
    for stochastic in (False, True):
        got = t.clone()
        with engine(name):
            ema_update_([got], [s], 0.9, stochastic_rounding=stochastic, seed=3)
        assert torch.equal(got[[0, 1, 4]].float(), torch.tensor([inf, inf, -inf]))
        assert got[[2, 3, 5]].isnan().all()
        # NaNs whose payload would carry into the sign, or be cut off to an infinity.
        payloads = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
        got = torch.zeros(300, dtype=dtype)
        with engine(name):
            ema_update_([got], [payloads.repeat(100)], 0.9, stochastic_rounding=stochastic, seed=3)
        assert got.isnan().all()


@pytest.mark.parametrize("name", engines())
def test_layouts(name: str) -> None:
    def layouts() -> dict[str, tuple[Tensor, Tensor]]:
        image = torch.randn(2, 3, 4, 5)
        return {
            "transposed": (torch.randn(5, 7).t(), torch.randn(5, 7).t()),
            "channels_last": (
                image.to(memory_format=torch.channels_last),
                torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            ),
            "target strided": (torch.randn(9, 8)[:, ::2], torch.randn(9, 4)),
            "source strided": (torch.randn(9, 4), torch.randn(9, 8)[:, ::2]),
            "source expanded": (torch.randn(9, 4), torch.randn(4).expand(9, 4)),
            "different": (torch.randn(6, 6).t(), torch.randn(6, 6)),
            "sliced": (torch.randn(10, 3)[1:], torch.randn(10, 3)[:-1]),
            "scalar": (torch.randn(()), torch.randn(())),
        }

    cases = layouts()
    want = {k: torch.lerp(t.double(), s.double(), 0.25) for k, (t, s) in cases.items()}
    for _ in range(2):  # the second time a cached plan could be stale
        old = {k: t.clone() for k, (t, _) in cases.items()}
        with engine(name):
            ema_update_([t for t, _ in cases.values()], [s for _, s in cases.values()], 0.75)
        for k, (t, _) in cases.items():
            torch.testing.assert_close(t.double(), want[k], rtol=0, atol=1e-6, msg=k)
            t.copy_(old[k])


def test_neighbours_in_memory_are_not_written() -> None:
    base = torch.full((1000,), 7.0)
    target = base[100:777]
    ema_update_([target], [torch.zeros(677)], 0.5)
    assert (base[:100] == 7).all() and (base[777:] == 7).all() and (target == 3.5).all()


def test_its_own_source() -> None:
    t = torch.randn(1000)
    old = t.clone()
    ema_update_([t], [t], 0.9)
    torch.testing.assert_close(t, old)


def test_sources_may_share_memory() -> None:
    s = torch.randn(50)
    a, b = torch.zeros(50), torch.zeros(30)
    ema_update_([a, b], [s, s[:30]], 0.5)
    assert torch.equal(a, s / 2) and torch.equal(b, s[:30] / 2)


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda x: ([x], []), ValueError, r"same length, got 1 and 0"),
        (lambda x: ([x, x], [x.clone(), x.clone()]), ValueError, r"overlap.*tied"),
        (lambda x: ([x[:5], x[4:]], [torch.ones(5), torch.ones(6)]), ValueError, r"overlap"),
        (lambda x: ([x[:5]], [x[1:6]]), ValueError, r"overlap"),
        (lambda x: ([x[:5], x[5:]], [x[5:], x[:5]]), ValueError, r"overlap"),
        (lambda x: ([x[:1].expand(4)], [torch.ones(4)]), ValueError, r"share memory"),
        (lambda x: ([x], [torch.ones(9)]), ValueError, r"targets\[0\].*\[10\] and \[9\]"),
        (lambda x: ([x.int()], [x]), TypeError, r"targets\[0\].*int32"),
        (lambda x: ([x], [x.to(torch.complex64)]), TypeError, r"complex64"),
        (lambda x: ([x], ["x"]), TypeError, r"sources\[0\] must be tensors.*str"),
        (lambda x: ([x], [x.to("meta")]), ValueError, r"same device.*cpu and meta"),
    ],
)
def test_refusals(build, kind, message) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(10)
    old = x.clone()
    with pytest.raises(kind, match="ema_update_: .*" + message):
        ema_update_(*build(x), 0.9)
    assert torch.equal(x, old)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
        ema_update_([torch.zeros(1)], [torch.ones(1)], decay)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
        EMA(nn.Linear(1, 1), decay)
    with pytest.raises(TypeError, match="decay must be a number"):
        ema_update_([torch.zeros(1)], [torch.ones(1)], "much")  # type: ignore[arg-type]


def test_empty_lists_and_generators() -> None:
    ema_update_([], [], 0.5)
    t = torch.zeros(2)
    ema_update_((x for x in [t]), (torch.ones(2) for _ in range(1)), 0.5)
    assert (t == 0.5).all()


# ---- Torch ---------------------------------------------------------------------------------------


no_lists_in_graphs = pytest.mark.skipif(
    not WRITES_LISTS, reason="torch 2.4 can't trace an op that writes to a list of tensors"
)


@no_lists_in_graphs
def test_opcheck() -> None:
    op = torch.ops.sslkernels.ema_update_.default
    targets = [torch.randn(5), torch.randn(2, 3).bfloat16(), torch.randn(4, 4).t()]
    sources = [torch.randn(5, requires_grad=True), torch.randn(2, 3), torch.randn(4, 4)]
    torch.library.opcheck(op, (targets, sources, 0.9))
    torch.library.opcheck(op, (targets, sources, 0.9, True, 3, 4))
    torch.library.opcheck(op, ([], [], 0.9))


def test_version_counters_move() -> None:
    w = torch.randn(3, requires_grad=True)
    for _ in range(3):  # op, new plan, kept plan
        t = torch.randn(3)
        product = (w * t).sum()
        ema_update_([t], [torch.ones(3)], 0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    online = nn.Linear(2, 2)
    ema = EMA(online)
    for _ in range(3):
        before = [p._version for p in ema.module.parameters()]
        ema.update(online)
        assert all(p._version > v for p, v in zip(ema.module.parameters(), before, strict=True))


def test_no_gradient_is_recorded() -> None:
    target, source = torch.zeros(3), torch.ones(3, requires_grad=True)
    ema_update_([target], [source * 2], 0.5)
    assert not target.requires_grad and (target == 1).all()


@no_lists_in_graphs
def test_compiles_in_one_graph() -> None:
    def step(t: Tensor, s: Tensor) -> Tensor:
        ema_update_([t], [s * 2], 0.5)
        return t + 1

    t = torch.zeros(4)
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(t, torch.ones(4))
    assert (t == 1).all() and (out == 2).all()


# ---- Stochastic rounding -------------------------------------------------------------------------


def philox_numpy(n: int, seed: int, step: int, tensor: int) -> np.ndarray:
    """Philox4x32-10 as published, in unsigned arithmetic."""
    mask = np.uint64(0xFFFFFFFF)
    i = np.arange(n, dtype=np.uint64) // np.uint64(4)
    c = [i & mask, i >> np.uint64(32), np.full(n, step, np.uint64), np.full(n, tensor, np.uint64)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & mask,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c)[np.arange(n) % 4, np.arange(n)].astype(np.uint32)


def test_philox_known_answer() -> None:
    # Random123's known answer for philox4x32 with 10 rounds: a word each for four elements.
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_numpy(4, 0, 0, 0).tolist() == words
    assert philox_words(4, 0, 0, 0).tolist() == words
    assert philox_words(2, 0, 0, 0, first=2).tolist() == words[2:]
    for seed, step, tensor in [(0, 0, 0), (2**63 + 12345, 7, 3), (2**32 - 1, 2**32 - 1, 2**32 - 1)]:
        want = philox_numpy(1000, seed, step, tensor).astype(np.int64)
        assert np.array_equal(philox_words(1000, seed, step, tensor).numpy(), want)


def neighbours(x: np.ndarray, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two representable numbers around each x, towards zero and away from it, as float64."""
    nearest = torch.from_numpy(x).to(dtype)
    bits = nearest.view(torch.int16)
    beyond = nearest.double().abs() > torch.from_numpy(np.abs(x.astype(np.float64)))
    low = (bits - beyond.to(torch.int16)).view(dtype)
    return low, (low.view(torch.int16) + 1).view(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", engines())
def test_rounding_to_the_bit(dtype: torch.dtype, name: str) -> None:
    # All magnitudes: float16's normal and denormal range, below it, and above.
    x = (torch.randn(4096) * torch.exp2(torch.randint(-45, 18, (4096,)).float())).numpy()
    words = philox_numpy(4096, 99, 4, 1).astype(np.float64)
    low, high = neighbours(x, dtype)
    # float16 ends at 65504: beyond, the neighbour away from zero is 65536, which is stored as inf.
    low64 = low.double().abs().clamp(max=torch.finfo(dtype).max).numpy()
    gap = np.where(np.isinf(high.double().numpy()), 65536.0, high.double().abs().numpy()) - low64
    chance = (np.abs(x.astype(np.float64)) - low64) / gap
    # Up if the fraction plus random bits of the same width carries.  Only 16 (13) bits of the word
    # are looked at where no more bits than that are dropped.
    exponent = np.floor(np.log2(np.abs(x)))
    dropped = np.full(4096, 16.0) if dtype == torch.bfloat16 else 13 + np.maximum(-14 - exponent, 0)
    width = np.exp2(np.minimum(dropped, 32))
    random = np.floor(words / 2.0**32 * width) / width
    up = np.floor(chance * width) / width + random >= 1.0
    beyond_all = np.abs(x) >= 65536.0 if dtype == torch.float16 else np.zeros(4096, bool)
    want = torch.where(torch.from_numpy(up | beyond_all), high, low)
    want = torch.where(
        torch.from_numpy(beyond_all),
        torch.copysign(torch.tensor(torch.inf), torch.from_numpy(x)).to(dtype),
        want,
    )

    target = torch.zeros(4096, dtype=dtype)
    # Decay 0: the mean is the source itself; the first tensor only shifts indices.
    with engine(name):
        ema_update_(
            [torch.zeros(1), target],
            [torch.zeros(1), torch.from_numpy(x)],
            0.0,
            stochastic_rounding=True,
            seed=99,
            step=4,
        )
    assert torch.equal(target.view(torch.int16) & 0x7FFF, want.view(torch.int16) & 0x7FFF)
    twin = round_stochastic(torch.from_numpy(x), philox_words(4096, 99, 4, 1), dtype)
    assert torch.equal(twin.view(torch.int16), target.view(torch.int16))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_is_right_on_average(dtype: torch.dtype) -> None:
    for value in (1.0 + 1 / 3 * torch.finfo(dtype).eps, 0.1, 3e-6, -2.7):
        source = torch.full((200_000,), value)
        target = torch.zeros(200_000, dtype=dtype)
        ema_update_([target], [source], 0.0, stochastic_rounding=True, seed=11)
        seen = target.double().unique()
        assert len(seen) == 2
        gap = float(seen[1] - seen[0])
        error = abs(float(target.double().mean()) - float(source[0]))
        assert error < 5 * gap / 2 / math.sqrt(200_000)  # five standard deviations at the worst


@pytest.mark.slow
def test_bfloat16_average_moves() -> None:
    """The average that stands still when rounded to nearest follows float64 within 1 %."""
    steps, decay = 10_000, 0.999
    online = torch.full((4096,), 1.5)
    rounded, plain = torch.ones(4096).bfloat16(), torch.ones(4096).bfloat16()
    for step in range(steps):
        ema_update_([rounded], [online], decay, stochastic_rounding=True, seed=1, step=step)
        plain.lerp_(online.bfloat16(), 1 - decay)
    truth = 1.5 - 0.5 * decay**steps
    assert (plain == 1.0).all()
    assert abs(float(rounded.double().mean()) - truth) < 0.01 * truth
    assert abs(float(rounded.double().mean()) - truth) < 0.002  # what it really is
