# SPDX-License-Identifier: Apache-2.0
"""csrc/cuda/*.cu run on the CPU: every kernel and dtype pair, edges, schedules, sanitizers on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
from cuda_emulation import checks, toolchain, twin
from cuda_emulation.client import EmulationError, Emulator

pytestmark = [
    pytest.mark.skipif(toolchain.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(
        toolchain.sanitizer_library() is None, reason="the compiler has no address sanitizer"
    ),
]

PAIRS = [(t, s) for t in range(4) for s in range(4)]
CHUNK = checks.CHUNK


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    """A worker with the sanitized build."""
    with Emulator(toolchain.build_module("sanitized")) as worker:
        yield worker


@pytest.fixture(scope="module")
def fast() -> Iterator[Emulator]:
    """A worker with the optimised build, for thousands of launches."""
    with Emulator(toolchain.build_module("fast")) as worker:
        yield worker


def pair_id(pair: tuple[int, int]) -> str:
    """target<-source"""
    return f"{twin.NAMES[pair[0]]}<-{twin.NAMES[pair[1]]}"


# ---- The emulator itself -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leave_out", "complaint"),
    [
        (0, ""),
        (1, "wrong"),  # the barrier before reading what others wrote
        (2, "wrong"),  # the barrier before the array is used again
        (3, "different barriers"),
        (4, "mask leaves out the caller"),
        (5, "heap-buffer-overflow"),  # shared memory
        (6, "misaligned address"),
        (7, "wrong"),  # an atomic
    ],
)
def test_emulator_notices(leave_out: int, complaint: str) -> None:
    program = toolchain.build_program(
        toolchain.HERE / "selftest.cu", "sanitized", [f"-DLEAVE_OUT={leave_out}"]
    )
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == (leave_out == 0), output
    assert complaint in output


# ---- Twins -------------------------------------------------------------------------------------


def test_philox_known_answers() -> None:
    """Random123's kat_vectors for philox4x32-10: a counter gives words to four elements."""
    got = twin.philox_words(4, seed=0, step=0, tensor=0)
    assert got.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    got = twin.philox_words(4, seed=2**64 - 1, step=ones, tensor=ones, first=4 * (2**64 - 1))
    assert got.tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = 0x85A308D3243F6A88  # counter words 0 and 1, low first
    got = twin.philox_words(
        4, seed=0x299F31D0A4093822, step=0x13198A2E, tensor=0x03707344, first=4 * pi
    )
    assert got.tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("dtype", [twin.BFLOAT16, twin.FLOAT16], ids=["bfloat16", "float16"])
def test_stochastic_rounding_is_right_on_average(dtype: int) -> None:
    """One of the two neighbours, and a mean within five standard errors, subnormals included."""
    words = twin.philox_words(4000, seed=5, step=1, tensor=2)
    for value in (1.001, -3.14159, 6.1e-5, 2.3e-6, -4.4e-8, 1e-9, 65503.0):
        x = np.full(words.shape, value, np.float32)
        rounded = twin.widen(twin.round_stochastic(x, words, dtype), dtype)
        exact = float(x[0])
        neighbours = np.unique(rounded)
        assert 1 <= len(neighbours) <= 2
        below, above = neighbours[0], neighbours[-1]
        assert below <= exact <= above or len(neighbours) == 1
        error = 5 * (above - below) * 0.5 / np.sqrt(len(words)) + 2.0**-24 * (exact == 1e-9)
        assert abs(rounded.mean() - exact) <= error + 1e-12 or len(neighbours) == 1


# ---- EMA ---------------------------------------------------------------------------------------

# 2^k and 2^k +- 1 around a thread's vector, a warp, a block, a chunk; primes; nothing.
SIZES = [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 127, 255, 256, 257, 1021, 2047, 2049, CHUNK - 1, CHUNK,
         CHUNK + 1, 2 * CHUNK + 3]  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
def test_ema_sizes(emulator: Emulator, pair: tuple[int, int]) -> None:
    checks.check_ema(emulator, SIZES, [pair])


@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
def test_ema_misaligned(emulator: Emulator, pair: tuple[int, int]) -> None:
    """Every start off 16 bytes that the element sizes allow, alike and different on both sides."""
    widths = [8 if d == twin.FLOAT64 else 4 if d == twin.FLOAT32 else 2 for d in pair]
    starts = [range(0, 16, w) for w in widths]
    shifts = [(t, s) for t in starts[0] for s in starts[1]]
    chosen = (
        shifts
        if len(shifts) <= 16
        else shifts[:: len(shifts) // 16 + 1] + [(max(widths), max(widths))]
    )
    checks.check_ema(emulator, [300 + i for i in range(len(chosen))], [pair], shifts=chosen)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("schedule", [0, 1, 2, 5])
def test_ema_mixed_list_in_one_launch(emulator: Emulator, stochastic: bool, schedule: int) -> None:
    """All pairs of dtypes at once, with several chunks a block; one launch is asserted inside."""
    sizes = [1 + (i * 577) % 3000 for i in range(30)] + [5 * CHUNK + 1]
    checks.check_ema(
        emulator,
        sizes,
        PAIRS,
        shifts=[(0, 0), (8, 8), (8, 0)],
        stochastic=stochastic,
        device_state=stochastic,
        schedule=schedule,
    )


def test_ema_many_tiny_and_one_huge(emulator: Emulator) -> None:
    checks.check_ema(emulator, [i % 6 for i in range(400)], [(0, 0), (2, 2)], multiprocessors=3)
    checks.check_ema(emulator, [150_001], [(0, 0)], multiprocessors=2)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0]], ids=str)
def test_ema_nothing_to_do(emulator: Emulator, sizes: list[int]) -> None:
    """No launch (asserted inside) and no error."""
    checks.check_ema(emulator, sizes, [(0, 0)], stochastic=True, device_state=True)


@pytest.mark.parametrize("decay", [0.0, 1.0, 0.5, 0.9999])
@pytest.mark.parametrize("where", ["host", "float32", "float64"])
def test_ema_decay(emulator: Emulator, decay: float, where: str) -> None:
    """From the host, and read on the device: 1 - decay is formed in float64 in either case."""
    value = decay if where == "host" else np.array(decay, dtype=where)
    checks.check_ema(emulator, [513, 70], [(0, 0), (1, 1), (2, 0)], decay=value)


def test_ema_does_not_depend_on_the_device(emulator: Emulator) -> None:
    """Same bits for any number of multiprocessors and any order of blocks and threads."""
    generator = np.random.default_rng(3)
    arrays = [checks.random_array(generator, n, d) for n, d in ((9000, 2), (5000, 0))]
    pairs = [
        (arrays[0], 2, 0, checks.random_array(generator, 9000, 0), 0, 0),
        (arrays[1], 0, 0, checks.random_array(generator, 5000, 3), 3, 0),
    ]
    results = []
    for schedule, multiprocessors in ((0, 1), (1, 2), (2, 7)):
        emulator.call(
            "configure", seed=schedule, multiprocessors=multiprocessors, resident_blocks=3
        )
        targets, *_ = emulator.call(
            "ema",
            pairs=pairs,
            decay=0.99,
            stochastic=True,
            seed=1,
            step=2,
            rng_state=None,
            repeat=1,
        )
        results.append(b"".join(t.tobytes() for t in targets))
    assert results[0] == results[1] == results[2]


def test_ema_special_values(emulator: Emulator) -> None:
    """decay 0 stores the source: what each format makes of limits, subnormals, inf and NaN."""
    values = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 65504.0, 65519.9, 65520.0, 65535.9, 65536.0, -1e6,
         3.3895e38, 3.4028e38, 6.1035e-5, 6.0e-5, -5.9605e-8, 2.9802e-8, 2.98e-8, 1e-12, 1e-40],
        np.float32,
    )  # fmt: skip
    for stochastic in (False, True):
        for dtype in (twin.FLOAT32, twin.BFLOAT16, twin.FLOAT16):
            target = np.zeros(len(values), twin.STORAGE[dtype])
            emulator.call("configure", seed=2, multiprocessors=1, resident_blocks=2)
            (got,), *_ = emulator.call(
                "ema",
                pairs=[(target, dtype, 0, values, 0, 0)],
                decay=0.0,
                stochastic=stochastic,
                seed=9,
                step=9,
                rng_state=None,
                repeat=1,
            )
            words = twin.philox_words(len(values), 9, 9, 0) if stochastic else None
            expected = twin.ema(target, dtype, values, 0, 0.0, words)
            ours, truth = twin.widen(got, dtype), twin.widen(expected, dtype)
            np.testing.assert_array_equal(ours, truth)  # NaN equals NaN here
            assert np.isnan(ours[4]) and np.isnan(ours).sum() == 1
            assert np.isposinf(ours[2]) and np.isneginf(ours[3])


def test_ema_step_counter_wraps(emulator: Emulator) -> None:
    """The step is a word of 32 bits; the seed beside it is only read."""
    target = np.zeros(9, np.uint16)
    pairs = [(target, 2, 0, np.ones(9, np.float32), 0, 0)]
    emulator.call("configure", seed=2, multiprocessors=1, resident_blocks=2)
    *_, state, _ = emulator.call(
        "ema",
        pairs=pairs,
        decay=0.5,
        stochastic=True,
        seed=0,
        step=0,
        rng_state=np.array([2**64 - 1, 2**32 - 1], np.uint64),
        repeat=3,
    )
    assert state.tolist() == [2**64 - 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [twin.BFLOAT16, twin.FLOAT16], ids=["bfloat16", "float16"])
def test_ema_stochastic_moves_as_float32_does(fast: Emulator, dtype: int) -> None:
    """10,000 steps at decay .999 from 1 towards 1.5: the mean within 1 % of the float64 answer."""
    n, steps, decay = 4096, 10_000, 0.999
    start = twin.narrow(np.ones(n), dtype)
    pairs = [(start, dtype, 0, np.full(n, 1.5, np.float32), 0, 0)]
    fast.call("configure", seed=2, multiprocessors=1, resident_blocks=2)
    (moved,), _, state, launches = fast.call(
        "ema",
        pairs=pairs,
        decay=decay,
        stochastic=True,
        seed=0,
        step=0,
        rng_state=np.array([77, 0], np.uint64),
        repeat=steps,
    )
    (still,), *_ = fast.call(
        "ema",
        pairs=pairs,
        decay=decay,
        stochastic=False,
        seed=0,
        step=0,
        rng_state=None,
        repeat=50,
    )
    truth = 1.5 - 0.5 * decay**steps
    assert launches == steps and state.tolist() == [77, steps]
    assert abs(twin.widen(moved, dtype).mean() - truth) < 0.01 * truth
    # Without stochastic rounding bfloat16 stays at 1: a step is less than half a unit.
    assert (twin.widen(still, dtype) == 1.0).all() == (dtype == twin.BFLOAT16)


def test_ema_stochastic_halfway(fast: Emulator) -> None:
    """The same after 500 steps, where the answer is not yet the source: the drift is right."""
    n, steps, decay = 4096, 500, 0.999
    start = twin.narrow(np.ones(n), twin.BFLOAT16)
    pairs = [(start, 2, 0, np.full(n, 1.5, np.float32), 0, 0)]
    fast.call("configure", seed=2, multiprocessors=1, resident_blocks=2)
    (moved,), *_ = fast.call(
        "ema",
        pairs=pairs,
        decay=decay,
        stochastic=True,
        seed=3,
        step=0,
        rng_state=None,
        repeat=steps,
    )
    truth = 1.5 - 0.5 * decay**steps
    # Steps of 2^-8 with probability about .1 each: standard error of the mean below 1e-3.
    assert abs(twin.widen(moved, twin.BFLOAT16).mean() - truth) < 5e-3


# ---- Queue -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{twin.NAMES[p[0]]}->{twin.NAMES[p[1]]}")
def test_enqueue_dtypes(emulator: Emulator, pair: tuple[int, int]) -> None:
    for normalize in (True, False):
        checks.check_enqueue(
            emulator,
            40,
            24,
            [17, 17, 17],
            key_dtype=pair[0],
            queue_dtype=pair[1],
            normalize=normalize,
        )
    checks.check_enqueue(emulator, 9, 37, [5, 7], key_dtype=pair[0], queue_dtype=pair[1])


@pytest.mark.parametrize("D", [1, 3, 4, 8, 24, 100, 127, 128, 129, 768])
@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_enqueue_widths(emulator: Emulator, D: int, schedule: int) -> None:
    checks.check_enqueue(emulator, 11, D, [6, 6], schedule=schedule)


@pytest.mark.parametrize("N", [1, 2, 3, 63, 64, 65, 127, 130])
@pytest.mark.parametrize("K", [1, 2, 64, 97])
def test_enqueue_batches(emulator: Emulator, N: int, K: int) -> None:
    """Exact fit, wrap, K no multiple of N, and more keys than rows: the newest K stay."""
    checks.check_enqueue(emulator, K, 8, [N, N, 0, N], ptr=K - 1, fill=K // 2)


@pytest.mark.parametrize("shift", [2, 4, 8, 14])
def test_enqueue_misaligned(emulator: Emulator, shift: int) -> None:
    checks.check_enqueue(
        emulator, 21, 64, [10, 20], key_dtype=2, queue_dtype=3, shift=shift, with_labels=False
    )


def enqueue_once(emulator: Emulator, keys: np.ndarray, K: int, **options: object) -> dict:
    """float32 keys into an empty float32 queue."""
    arguments = {
        "queue": np.zeros((K, keys.shape[1]), np.float32),
        "queue_dtype": 0,
        "queue_ptr": 0,
        "fill": 0,
        "batches": [(keys, None)],
        "key_dtype": 0,
        "queue_labels": None,
        "normalize": True,
        "eps": 1e-12,
        "shift": 0,
        "key_stride": None,
        **options,
    }
    return emulator.call("enqueue", **arguments)


def test_enqueue_zero_nan_and_tiny_rows(emulator: Emulator) -> None:
    """A zero row stays zero, a NaN spoils its own row only, and eps bounds the division."""
    keys = np.ones((4, 10), np.float32)
    keys[0], keys[1, 3], keys[2] = 0, np.nan, 1e-14
    got = enqueue_once(emulator, keys, 6)["queue"]
    assert (got[0] == 0).all()
    assert np.isnan(got[1]).all()
    np.testing.assert_allclose(got[2], 1e-14 / 1e-12, rtol=1e-6)
    np.testing.assert_allclose(got[3], 10**-0.5, rtol=1e-6)
    assert (got[4:] == 0).all()
    wide = enqueue_once(emulator, keys, 6, eps=100.0)["queue"]
    np.testing.assert_allclose(wide[3], 0.01, rtol=1e-6)


def test_enqueue_expanded_and_strided_keys(emulator: Emulator) -> None:
    """Rows apart by another stride than D, and one row for all (stride 0)."""
    keys = np.arange(1, 41, dtype=np.float32).reshape(5, 8)
    got = enqueue_once(
        emulator, keys, 5, queue=np.zeros((5, 6), np.float32), key_stride=8, normalize=False
    )
    np.testing.assert_array_equal(got["queue"], keys[:, :6])
    got = enqueue_once(
        emulator, keys, 5, queue=np.zeros((5, 8), np.float32), key_stride=0, normalize=False
    )
    np.testing.assert_array_equal(got["queue"], np.tile(keys[0], (5, 1)))


def test_enqueue_bad_pointer_stays_inside(emulator: Emulator) -> None:
    """A pointer beyond the ring is taken modulo K: no memory outside is written."""
    keys = np.eye(3, 4, dtype=np.float32)
    got = enqueue_once(emulator, keys, 5, queue_ptr=5 * 7 + 4)
    assert got["queue_ptr"] == 2 and got["fill"] == 3
    np.testing.assert_array_equal(got["queue"][[4, 0, 1]], keys)


def test_enqueue_does_not_depend_on_the_schedule(emulator: Emulator) -> None:
    keys = checks.random_array(np.random.default_rng(0), (33, 130), 0)
    results = []
    for schedule in range(6):
        emulator.call("configure", seed=schedule, multiprocessors=1, resident_blocks=1 + schedule)
        results.append(enqueue_once(emulator, keys, 40)["queue"].tobytes())
    assert len(set(results)) == 1


# ---- Launcher ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("current", [-1, 0, 1])
def test_launch_on_device_and_stream(emulator: Emulator, current: int, device: int) -> None:
    """The launch goes to the device and stream asked for, and the caller's context comes back.

    ``current`` is the device whose context torch has made current, -1 on a thread without one.  The module
    asks the driver: its own CUDA runtime need not know what torch's did (``torch.cuda.set_device(1)``).
    """
    assert emulator.call("guard", current=current, device=device, stream=0x40) == (
        device,
        0x40,
        current,
    )


def test_launch_error_is_raised(emulator: Emulator) -> None:
    with pytest.raises(EmulationError, match=r"enqueue_: CUDA error 101: invalid device ordinal"):
        emulator.call("guard", current=1, device=5, stream=0)
