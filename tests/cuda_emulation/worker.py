# SPDX-License-Identifier: Apache-2.0
"""Serves emulated launches over stdin and stdout, in a process of its own.

The address sanitizer must be loaded before the interpreter, and it ends the process on an error; so
the kernels run here and not in the test process.  Run as a script by ``client.Emulator``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import pickle
import sys
from typing import Any

import numpy as np

_CANARY = 0xA5


class Memory:
    """An array copied into memory of its own, ``shift`` bytes off 16, its end at a red zone."""

    def __init__(self, library: ctypes.CDLL, array: np.ndarray, shift: int = 0) -> None:
        """See the class."""
        self._library, self._shift, self.like = library, shift, array
        self.address = library.emulation_allocate(array.nbytes, shift)
        ctypes.memset(self.address - shift, _CANARY, shift)
        data = np.ascontiguousarray(array)
        ctypes.memmove(self.address, data.ctypes.data, data.nbytes)

    def take(self) -> np.ndarray:
        """The contents; checks the bytes in front and frees the memory."""
        out = np.empty(self.like.shape, self.like.dtype)
        ctypes.memmove(out.ctypes.data, self.address, out.nbytes)
        front = ctypes.string_at(self.address - self._shift, self._shift)
        if front != bytes([_CANARY]) * self._shift:
            raise RuntimeError("memory in front of an array was written")
        self._library.emulation_free(self.address, self._shift)
        return out


class Worker:
    """The commands."""

    def __init__(self, path: str) -> None:
        """Load the module at a path."""
        spec = importlib.util.spec_from_file_location("_cuda", path)
        assert spec is not None and spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.library = ctypes.CDLL(path)
        self.library.emulation_allocate.restype = ctypes.c_void_p
        self.library.emulation_allocate.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        self.library.emulation_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.library.emulation_launches.restype = ctypes.c_longlong
        self.library.emulation_launch_stream.restype = ctypes.c_void_p
        self.library.emulation_configure.argtypes = [ctypes.c_ulonglong, ctypes.c_int, ctypes.c_int]

    def configure(self, seed: int, multiprocessors: int, resident_blocks: int) -> None:
        """Schedule and size of the emulated device."""
        self.library.emulation_configure(seed, multiprocessors, resident_blocks)

    def ema(
        self,
        pairs: list[tuple[np.ndarray, int, int, np.ndarray, int, int]],
        decay: float | np.ndarray,
        stochastic: bool,
        seed: int,
        step: int,
        rng_state: np.ndarray | None,
        repeat: int,
    ) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray | None, int]:
        """Targets, sources and random state after ``repeat`` updates, and the number of launches.

        A pair is (target, its dtype code, its shift, source, its dtype code, its shift).
        """
        library = self.library
        targets = [Memory(library, p[0], p[2]) for p in pairs]
        sources = [Memory(library, p[3], p[5]) for p in pairs]
        table_bytes, n_chunks, offset = self.module.build_ema_table(
            [
                (t.address, s.address, p[0].size, p[1], p[4])
                for t, s, p in zip(targets, sources, pairs, strict=True)
            ]
        )
        # Tensors and chunks in memory of their own: reading past either is seen.
        whole = np.frombuffer(table_bytes, np.uint8)
        table = Memory(library, whole[: 40 * len(pairs)]), Memory(library, whole[offset:])
        state = None if rng_state is None else Memory(library, rng_state)
        on_device = Memory(library, decay) if isinstance(decay, np.ndarray) else None
        before = library.emulation_launches()
        for i in range(repeat):
            self.module.ema_update(
                tensors=table[0].address,
                chunks=table[1].address,
                n_chunks=n_chunks,
                decay=0.0 if on_device else decay,
                decay_ptr=on_device.address if on_device else 0,
                decay_dtype=1 if on_device and on_device.like.dtype == np.float64 else 0,
                stochastic=stochastic,
                seed=seed,
                step=step + i,
                rng_state=state.address if state else 0,
                device=0,
                stream=0,
            )
        launches = library.emulation_launches() - before
        for memory in (*table, *([on_device] if on_device else [])):
            if memory.take().tobytes() != np.ascontiguousarray(memory.like).tobytes():
                raise RuntimeError("an input was written")
        return (
            [m.take() for m in targets],
            [m.take() for m in sources],
            state.take() if state else None,
            launches,
        )

    def enqueue(
        self,
        queue: np.ndarray,
        queue_dtype: int,
        queue_ptr: int,
        fill: int,
        batches: list[tuple[np.ndarray, np.ndarray | None]],
        key_dtype: int,
        queue_labels: np.ndarray | None,
        normalize: bool,
        eps: float,
        shift: int,
        key_stride: int | None,
    ) -> dict[str, Any]:
        """The state after every batch was enqueued.  ``shift`` misaligns keys and queue."""
        library = self.library
        K, D = queue.shape
        m_queue = Memory(library, queue, shift)
        m_ptr = Memory(library, np.array([queue_ptr], np.int64))
        m_fill = Memory(library, np.array([fill], np.int64))
        m_labels = None if queue_labels is None else Memory(library, queue_labels)
        before = library.emulation_launches()
        for keys, labels in batches:
            m_keys = Memory(library, keys, shift)
            m_new = None if labels is None else Memory(library, labels)
            self.module.enqueue(
                queue=m_queue.address,
                queue_dtype=queue_dtype,
                keys=m_keys.address,
                key_dtype=key_dtype,
                queue_labels=m_labels.address if m_labels else 0,
                labels=m_new.address if m_new else 0,
                queue_ptr=m_ptr.address,
                fill=m_fill.address,
                N=keys.shape[0],
                D=D,
                K=K,
                key_stride=keys.shape[1] if key_stride is None else key_stride,
                normalize=normalize,
                eps=eps,
                device=0,
                stream=0,
            )
            if m_keys.take().tobytes() != np.ascontiguousarray(keys).tobytes():
                raise RuntimeError("keys were written")
            if m_new is not None:
                m_new.take()
        return {
            "launches": library.emulation_launches() - before,
            "queue": m_queue.take(),
            "queue_ptr": int(m_ptr.take()[0]),
            "fill": int(m_fill.take()[0]),
            "labels": m_labels.take() if m_labels else None,
        }

    def guard(self, current: int, device: int, stream: int) -> tuple[int, int, int]:
        """Device and stream of a launch, and the current device after it."""
        library = self.library
        library.emulation_set_device(current)
        memory = [Memory(library, np.zeros(4, np.float32)) for _ in range(2)]
        counters = [Memory(library, np.zeros(1, np.int64)) for _ in range(2)]
        try:
            self.module.enqueue(
                queue=memory[0].address, queue_dtype=0, keys=memory[1].address, key_dtype=0,
                queue_labels=0, labels=0, queue_ptr=counters[0].address, fill=counters[1].address,
                N=1, D=4, K=1, key_stride=4, normalize=True, eps=1e-12, device=device,
                stream=stream,
            )  # fmt: skip
            launched = library.emulation_launch_device(), library.emulation_launch_stream() or 0
        finally:
            after = library.emulation_device()
            library.emulation_set_device(-1)
        return (*launched, after)


def main() -> None:
    """Answer requests until the input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a print must not mix with the answers
    worker = Worker(sys.argv[1])
    while True:
        try:
            command, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = True, getattr(worker, command)(**arguments)
        except Exception as error:  # handed to the caller, who raises it
            answer = False, f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
