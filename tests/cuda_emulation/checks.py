# SPDX-License-Identifier: Apache-2.0
"""What an emulated kernel must fulfil: used by the tests, and by the mutants, which must fail it.

Arrays end against a red zone, so that one element too many stops the worker; memory in front of a
misaligned array is watched; the result is compared with float64 truth within the error budget.
"""

from __future__ import annotations

import numpy as np

from cuda_emulation import twin
from cuda_emulation.client import Emulator

CHUNK = 4096  # kEmaChunk of csrc/cuda/launchers.h

# Units in the last place of the stored dtype that the budget leaves beside the eager result.
_EPSILON = {
    twin.FLOAT32: 2.0**-23,
    twin.FLOAT64: 2.0**-52,
    twin.BFLOAT16: 2.0**-7,
    twin.FLOAT16: 2.0**-10,
}


def random_array(
    generator: np.random.Generator, shape: int | tuple[int, ...], dtype: int
) -> np.ndarray:
    """Normal values over a few orders of magnitude, in the storage of a dtype."""
    values = generator.standard_normal(shape) * 2.0 ** generator.integers(-3, 4, shape)
    return twin.narrow(values, dtype)


def check_within_budget(
    ours: np.ndarray,
    eager: np.ndarray,
    truth: np.ndarray,
    dtype: int,
    what: str,
    size: np.ndarray | None = None,
    units: float = 1.0,
) -> None:
    """|ours - truth| <= |eager - truth| + units in the last place; all arrays are float64.

    ``size`` is what the unit is taken of, where terms cancel; by default |truth|.
    """
    error, eager_error = np.abs(ours - truth), np.abs(eager - truth)
    slack = units * _EPSILON[dtype] * np.maximum(np.abs(truth) if size is None else size, 2.0**-14)
    bad = ~(error <= eager_error + slack)  # not "error > ...": NaN must fail
    assert not bad.any(), (
        f"{what}: {bad.sum()} of {bad.size} elements out of budget, first at {np.argmax(bad)}, "
        f"largest error {np.nanmax(error):.3e}, eager {np.nanmax(eager_error):.3e}"
    )


def check_ema(
    emulator: Emulator,
    sizes: list[int],
    dtypes: list[tuple[int, int]],
    *,
    shifts: list[tuple[int, int]] | None = None,
    decay: float | np.ndarray = 0.97,
    stochastic: bool = False,
    device_state: bool = False,
    schedule: int = 2,
    multiprocessors: int = 1,
) -> None:
    """One update of a list of tensors against the twin (bits) and float64 truth (budget).

    ``sizes``, ``dtypes`` (target, source) and ``shifts`` (bytes off 16, target and source) go
    round.
    """
    generator = np.random.default_rng(len(sizes) + 7 * schedule)
    pairs = []
    for i, n in enumerate(sizes):
        target_dtype, source_dtype = dtypes[i % len(dtypes)]
        shift = (0, 0) if shifts is None else shifts[i % len(shifts)]
        pairs.append(
            (
                random_array(generator, n, target_dtype),
                target_dtype,
                shift[0],
                random_array(generator, n, source_dtype),
                source_dtype,
                shift[1],
            )
        )
    seed, step = 0x1234_5678_9ABC_DEF0, 41
    state = np.array([seed, step], np.uint64) if device_state else None
    emulator.call("configure", seed=schedule, multiprocessors=multiprocessors, resident_blocks=3)
    targets, sources, state_after, launches = emulator.call(
        "ema",
        pairs=pairs,
        decay=decay,
        stochastic=stochastic,
        seed=0 if device_state else seed,
        step=0 if device_state else step,
        rng_state=state,
        repeat=1,
    )
    keep = float(decay)
    assert launches == (1 if any(sizes) else 0), f"{launches} launches"
    for i, (target, target_dtype, _, source, source_dtype, _) in enumerate(pairs):
        what = (
            f"ema_update_ {twin.NAMES[target_dtype]} <- {twin.NAMES[source_dtype]}, "
            f"tensor {i} of {sizes[i]} elements"
        )
        assert sources[i].tobytes() == source.tobytes(), f"{what}: the source was written"
        words = twin.philox_words(len(target), seed, step, i) if stochastic else None
        expected = twin.ema(target, target_dtype, source, source_dtype, keep, words)
        ours = twin.widen(targets[i], target_dtype)
        if twin.FLOAT64 not in (target_dtype, source_dtype):
            wrong = np.flatnonzero(targets[i] != expected)
            assert not wrong.size, (
                f"{what}: {wrong.size} elements differ from the twin, first at {wrong[0]}: "
                f"{ours[wrong[0]]} for {twin.widen(expected, target_dtype)[wrong[0]]}"
            )
        t, s = twin.widen(target, target_dtype), twin.widen(source, source_dtype)
        truth = keep * t + (1.0 - keep) * s
        acc = np.float64 if twin.FLOAT64 in (target_dtype, source_dtype) else np.float32
        eager = acc(keep) * t.astype(acc) + acc(1.0 - keep) * s.astype(acc)
        eager = twin.widen(twin.narrow(eager, target_dtype), target_dtype)
        size = keep * np.abs(t) + (1.0 - keep) * np.abs(s)
        check_within_budget(ours, eager, truth, target_dtype, what, size)
    if device_state:
        assert state_after is not None
        expected_state = [seed, (step + 1) & 0xFFFFFFFF] if any(sizes) else [seed, step]
        assert state_after.tolist() == expected_state, (
            f"random state is {state_after.tolist()}, must be {expected_state}"
        )


def check_enqueue(
    emulator: Emulator,
    K: int,
    D: int,
    batches: list[int],
    *,
    ptr: int = 0,
    fill: int = 0,
    key_dtype: int = twin.FLOAT32,
    queue_dtype: int = twin.FLOAT32,
    normalize: bool = True,
    with_labels: bool = True,
    shift: int = 0,
    schedule: int = 2,
) -> None:
    """Batches one after another against the definition in float64."""
    generator = np.random.default_rng(K + 31 * D + schedule)
    wide = twin.FLOAT64 in (key_dtype, queue_dtype)
    acc = np.float64 if wide else np.float32
    queue = random_array(generator, (K, D), queue_dtype)
    labels = generator.integers(1000, 2000, K)
    steps = [
        (random_array(generator, (n, D), key_dtype), generator.integers(0, 1000, n))
        for n in batches
    ]
    emulator.call("configure", seed=schedule, multiprocessors=1, resident_blocks=3)
    got = emulator.call(
        "enqueue",
        queue=queue,
        queue_dtype=queue_dtype,
        queue_ptr=ptr,
        fill=fill,
        batches=[(k, new if with_labels else None) for k, new in steps],
        key_dtype=key_dtype,
        queue_labels=labels if with_labels else None,
        normalize=normalize,
        eps=1e-12,
        shift=shift,
        key_stride=None,
    )
    what = (
        f"enqueue_ {twin.NAMES[key_dtype]} -> {twin.NAMES[queue_dtype]}, K {K}, D {D}, "
        f"batches {batches}"
    )
    truth, eager = twin.widen(queue, queue_dtype), twin.widen(queue, queue_dtype)
    truth_labels = labels.copy()
    at, valid = ptr, fill
    for keys, new in steps:
        values = twin.widen(keys, key_dtype)
        twin.enqueue(eager, truth_labels, at, valid, values.astype(acc), new, normalize, 1e-12)
        at, valid = twin.enqueue(truth, truth_labels, at, valid, values, new, normalize, 1e-12)
    eager = twin.widen(twin.narrow(eager, queue_dtype), queue_dtype)
    assert got["launches"] == sum(n > 0 for n in batches), f"{what}: {got['launches']} launches"
    assert got["queue_ptr"] == at, f"{what}: queue_ptr is {got['queue_ptr']}, must be {at}"
    assert got["fill"] == valid, f"{what}: fill is {got['fill']}, must be {valid}"
    if with_labels:
        assert np.array_equal(got["labels"], truth_labels), f"{what}: wrong labels"
    ours = twin.widen(got["queue"], queue_dtype)
    # The norm is a sum over D / 32 terms a lane and five levels above, a root and a division.
    check_within_budget(
        ours.ravel(), eager.ravel(), truth.ravel(), queue_dtype, what, units=3 if normalize else 1
    )


# What the mutants are put through: small, and with a case for every part that can be left out.


def check_ema_small(emulator: Emulator) -> None:
    """Edges, alignment, several chunks a block, random state on the device, three schedules."""
    pairs = [
        (twin.FLOAT32, twin.FLOAT32),
        (twin.BFLOAT16, twin.FLOAT32),
        (twin.FLOAT32, twin.FLOAT16),
    ]
    sizes = [CHUNK + 5, 0, 1, 3, 17, 1023, CHUNK - 1, 2 * CHUNK + 64, 2, 33]
    # Few elements at every kind of start: alike, a vector apart, and never aligned together.
    starts = [(0, 0), (4, 4), (4, 0), (8, 4), (12, 12)]
    few = [n for n in (1, 2, 3, 4, 17) for _ in starts]
    for schedule in (0, 1, 2):
        check_ema(emulator, sizes, pairs, shifts=[(0, 0), (4, 8)], schedule=schedule)
        check_ema(emulator, few, [(0, 0)], shifts=starts, schedule=schedule)
        check_ema(
            emulator,
            [CHUNK * 6, 9],
            [(twin.BFLOAT16, twin.BFLOAT16)],
            shifts=[(0, 0), (2, 2)],
            stochastic=True,
            device_state=True,
            schedule=schedule,
        )


def check_enqueue_small(emulator: Emulator) -> None:
    """Wrap, odd widths, batches below and above K, three schedules."""
    for schedule in (0, 1, 2):
        check_enqueue(emulator, 12, 9, [5, 5, 5], ptr=10, fill=7, schedule=schedule)
        check_enqueue(emulator, 12, 8, [4, 30, 3], ptr=3, fill=12, schedule=schedule)
        check_enqueue(emulator, 64, 130, [50, 21], schedule=schedule)
