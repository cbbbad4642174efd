# SPDX-License-Identifier: Apache-2.0
"""The test's side of the worker process: start it, send arrays, notice that it died."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from cuda_emulation import toolchain


class EmulationError(AssertionError):
    """The worker refused a request, or a sanitizer or the emulator ended it."""


class Emulator:
    """A worker process with one build of the kernels; a context manager."""

    def __init__(self, module: Path) -> None:
        """Start a worker on a module built by ``toolchain.build_module``."""
        environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
        if "sanitized" in module.name:
            environment["LD_PRELOAD"] = toolchain.sanitizer_library() or ""
            environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
            environment["UBSAN_OPTIONS"] = "print_stacktrace=0"
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, str(toolchain.HERE / "worker.py"), str(module)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )

    def __enter__(self) -> Emulator:
        """The emulator."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the worker."""
        self.close()

    def close(self) -> None:
        """End the worker."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass
        self._process.wait(timeout=3600)
        self._errors.close()

    def call(self, command: str, **arguments: Any) -> Any:
        """What the worker's method returns.

        Raises:
            EmulationError: The method raised, or the process ended; with what it wrote to stderr.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            pickle.dump((command, arguments), stdin)
            stdin.flush()
            fine, answer = pickle.load(stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            self._process.wait(timeout=3600)
            self._errors.seek(0)
            text = self._errors.read().decode(errors="replace")
            raise EmulationError(
                f"the emulated kernel was stopped (exit {self._process.returncode}):\n{text[:4000]}"
            ) from None
        if not fine:
            raise EmulationError(answer)
        return answer
