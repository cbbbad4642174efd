# SPDX-License-Identifier: Apache-2.0
"""Which backend serves which device, who decides, and what is said about it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import timeit

import pytest
import torch

import sslkernels as ssl
from sslkernels.backends import chunked
from sslkernels.ops import registry

CPU, MPS = torch.device("cpu"), torch.device("mps")


@pytest.fixture(autouse=True)
def restored():
    """The process-wide choice is put back."""
    before = registry.requested()
    yield
    ssl.set_backend(before)


def test_set_backend_and_context_manager_nest() -> None:
    """The inner block wins, None means outside of any block, exceptions restore."""
    ssl.set_backend(None)
    automatic = registry.resolve(CPU)
    ssl.set_backend("chunked")
    assert registry.resolve(CPU) is chunked
    ssl.set_backend(None)
    with ssl.backend("chunked"):
        assert registry.resolve(CPU) is chunked
        with ssl.backend(None):
            assert registry.resolve(CPU) is automatic
        with pytest.raises(KeyError), ssl.backend(None):
            raise KeyError
        assert registry.resolve(CPU) is chunked
    assert registry.resolve(CPU) is automatic


def test_the_context_manager_holds_in_its_own_thread() -> None:
    """Another thread sees the process-wide choice."""
    ssl.set_backend(None)
    seen = []
    with ssl.backend("chunked"):
        thread = threading.Thread(target=lambda: seen.append(registry.requested()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_other_devices_get_chunked() -> None:
    """No kernels for them yet."""
    ssl.set_backend(None)
    assert registry.resolve(MPS) is chunked


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_an_explicit_backend_never_falls_back(name: str) -> None:
    """It raises with the reason when it can't serve the device."""
    family = "updates" if name == "cuda" else "tiles"
    with ssl.backend(name), pytest.raises(RuntimeError, match=f"'{name}' was asked for but it"):
        registry.resolve(MPS, family)


def test_a_missing_backend_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extension that isn't built: an error when asked for, chunked and a warning otherwise."""
    monkeypatch.setitem(sys.modules, "sslkernels.backends.cpu", None)
    registry._cache.clear()
    with ssl.backend("cpu"), pytest.raises(RuntimeError, match="could not be loaded"):
        ssl.nt_xent_loss(torch.randn(4, 3), torch.randn(4, 3))
    registry._cache.clear()


def test_the_fallback_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At warning level for a CPU without its extension."""
    ssl.set_backend(None)
    monkeypatch.setitem(sys.modules, "sslkernels.backends.cpu", None)
    monkeypatch.setattr(registry, "_logged", set())
    registry._cache.clear()
    with caplog.at_level(logging.INFO, logger="sslkernels"):
        assert registry.resolve(CPU) is chunked
        registry._cache.clear()
        registry.resolve(CPU)
    registry._cache.clear()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "'chunked'" in record.message and "could not be loaded" in record.message


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says how to get it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ssl.backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        registry.resolve(CPU)


def test_families_that_a_backend_lacks_stay_automatic() -> None:
    """Asking for "cuda" decides only what it has."""
    with ssl.backend("cuda"):
        assert registry.resolve(MPS, "tiles") is chunked


def test_unknown_names() -> None:
    """The message lists the known ones."""
    with pytest.raises(ValueError, match=r"set_backend: backend must be one of \['chunked', 'cpu'"):
        ssl.set_backend("gpu")
    with pytest.raises(ValueError, match="got 'gpu'"), ssl.backend("gpu"):
        pass


@pytest.mark.parametrize(
    ("value", "expected"), [("chunked", "chunked"), ("", "None"), ("x", "error")]
)
def test_environment_variable(value: str, expected: str) -> None:
    """SSLKERNELS_BACKEND is read at import."""
    code = "from sslkernels.ops import registry; print(registry.requested())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SSLKERNELS_BACKEND": value},
        capture_output=True,
        text=True,
        check=False,
    )
    if expected == "error":
        assert result.returncode != 0 and "SSLKERNELS_BACKEND: backend must be" in result.stderr
    else:
        assert result.stdout.strip() == expected, result.stderr


def test_the_backward_pass_uses_the_backend_of_the_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the block has ended."""
    calls = []
    original = chunked.pairwise_backward
    monkeypatch.setattr(
        chunked, "pairwise_backward", lambda *a: calls.append(registry.requested()) or original(*a)
    )
    z = torch.randn(4, 3, requires_grad=True)
    with ssl.backend("chunked"):
        loss = ssl.clip_loss(z, torch.randn(4, 3), 2.0)
    loss.backward()
    assert calls == ["chunked"]


def test_resolve_is_cheap() -> None:
    """The cached path: 0.3 to 0.8 µs when measured; an import or a spec look-up would be 100."""
    registry.resolve(CPU)
    best = min(timeit.repeat(lambda: registry.resolve(CPU), number=2000, repeat=5)) / 2000
    assert best < 20e-6


def test_info_says_what_is_active_and_why() -> None:
    """Every device and family, and what was asked for."""
    ssl.set_backend(None)
    with ssl.backend("chunked"):
        asked = ssl.info()
    assert asked.asked_for == "chunked" and asked.backends["cpu/tiles"] == "chunked (asked for)"
    info = ssl.info()
    text = str(info)
    for word in (ssl.__version__, torch.__version__, "ISA", "threads", "triton", "cuda/updates"):
        assert word in text
    assert info.backends["mps/tiles"] == "chunked (no kernels for 'mps' yet)"
    assert info.cpu_extension == (info.isa is not None)
    if info.cpu_extension:
        assert info.isa in info.available_isas and "baseline" in info.available_isas
        assert info.backends["cpu/tiles"] == "cpu (automatic)"
