# SPDX-License-Identifier: Apache-2.0
"""A backend is asked whether it can serve a device: GPUs, drivers and versions that are made up here."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import HANGS_S

import sslkernels as ssl
from sslkernels import backends
from sslkernels.backends import devices
from sslkernels.backends import triton as triton_backend
from sslkernels.ops import registry

ROOT = Path(__file__).resolve().parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OLDEST = ".".join(map(str, triton_backend.OLDEST_TRITON))
A100, H100, T4 = ("A100", "sm_80"), ("H100", "sm_90"), ("Tesla T4", "sm_75")
RTX3090, RTX5090 = ("RTX 3090", "sm_86"), ("RTX 5090", "sm_120")

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Makes up the GPUs of this machine, its Triton, its driver and how ``_cuda`` was built."""
    before = registry.requested()
    ssl.set_backend(None)

    def make_up(
        *gpus: tuple[str, str],
        triton: devices.Triton | None = devices.Triton(OLDEST),  # noqa: B008
        driver: int = 13000,
        runtime: int = 13000,
        archs: tuple[int, ...] = (80, 90, 100),
        current: int = 0,
    ) -> None:
        registry._cache.clear()
        monkeypatch.setattr(registry, "_logged", set())
        monkeypatch.setattr(devices, "no_gpu", lambda: "" if gpus else "no GPU at all")
        monkeypatch.setattr(devices, "count", lambda: len(gpus))
        monkeypatch.setattr(devices, "index_of", lambda d: current if d.index is None else d.index)
        monkeypatch.setattr(devices, "_gpu", lambda index: devices.Gpu(*gpus[index], 100))
        monkeypatch.setattr(devices, "triton", lambda: triton)
        monkeypatch.setattr(devices, "interpreting", lambda: False)
        if gpus and gpus[0][1].startswith("gfx"):
            monkeypatch.setattr(torch.version, "hip", "6.4")
        extension = ModuleType("sslkernels._cuda")
        extension.__spec__ = ModuleSpec("sslkernels._cuda", None)
        vars(extension).update(ARCHS=archs, RUNTIME_VERSION=runtime, driver_version=lambda: driver)
        monkeypatch.setattr(ssl, "_cuda", extension, raising=False)
        monkeypatch.setitem(sys.modules, "sslkernels._cuda", extension)
        monkeypatch.setattr(backends, "cuda", None, raising=False)
        monkeypatch.delitem(sys.modules, "sslkernels.backends.cuda", raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpus[current][0])

    yield make_up
    registry._cache.clear()
    ssl.set_backend(before)


def chosen(device: torch.device | int, family: registry.Family = "tiles") -> str:
    """The last part of the name of the backend."""
    device = torch.device("cuda", device) if isinstance(device, int) else device
    return registry.resolve(device, family).__name__.rpartition(".")[2]


def test_a_gpu_that_fits(machine: Machine) -> None:
    """Nothing to explain: Triton's tiles and the updates of the extension."""
    machine(H100)
    assert (chosen(0), chosen(0, "updates")) == ("triton", "cuda")
    assert ssl.info().backends["cuda/tiles"] == "triton (automatic)"
    ssl.set_backend("triton")
    assert (chosen(0), chosen(0, "updates")) == ("triton", "triton")


def test_too_little_shared_memory(machine: Machine) -> None:
    """Capability 7.5: chunked serves, info says why, and asking for Triton raises with the reason."""
    machine(T4)
    assert (chosen(0), chosen(0, "updates")) == ("chunked", "chunked")
    reason = "compute capability 8.0 or newer, Tesla T4 has 7.5"
    told = ssl.info().backends["cuda/tiles"]
    assert told.startswith("chunked (backend 'triton': ") and reason in told
    with pytest.raises(RuntimeError, match=f"set_backend: 'triton' can serve no device .*{reason}"):
        ssl.set_backend("triton")
    assert registry.requested() is None
    with ssl.backend("triton"), pytest.raises(RuntimeError, match=f"was asked for but .*{reason}"):
        chosen(0)


@pytest.mark.parametrize("order", [(A100, T4), (T4, A100)])
def test_two_gpus_are_asked_apart(machine: Machine, order: tuple) -> None:
    """Whichever comes first, and whichever is the current one."""
    machine(*order)
    good = order.index(A100)
    assert (chosen(good), chosen(1 - good)) == ("triton", "chunked")
    facts = ssl.info().backends
    assert facts[f"cuda:{good}/tiles"] == "triton (automatic)"
    assert "Tesla T4 has 7.5" in facts[f"cuda:{1 - good}/tiles"]
    ssl.set_backend("triton")  # it can serve one of them
    assert chosen(good) == "triton"
    with pytest.raises(RuntimeError, match="Tesla T4 has 7.5"):
        chosen(1 - good)


def test_a_device_without_a_number_is_the_current_one(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the moment: the answer is not kept."""
    machine(A100, T4, current=0)
    assert chosen(CUDA) == "triton"
    monkeypatch.setattr(devices, "index_of", lambda d: 1 if d.index is None else d.index)
    assert chosen(CUDA) == "chunked"


def test_the_reason_is_logged_once_a_device(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine(T4, T4)
    with caplog.at_level(logging.INFO, logger="sslkernels"):
        for index in (0, 1, 0, 1):
            registry._cache.clear()
            chosen(index)
    assert [record.levelno for record in caplog.records] == [logging.INFO] * 2
    assert "tiles on 'cuda:1' tensors use backend 'chunked'" in caplog.records[1].message
    assert "Tesla T4 has 7.5" in caplog.records[1].message


@pytest.mark.parametrize(
    ("gpu", "driver", "runtime", "reason"),
    [
        (H100, 13000, 13000, ""),
        (H100, 14010, 13000, ""),
        (H100, 12080, 13000, r"built with CUDA 13.0, for which this driver \(CUDA 12.8\) is too"),
        (H100, 0, 13000, r"this driver \(CUDA 0.0\) is too old"),
        (H100, 12020, 12080, ""),  # minor versions work together where there is machine code
        (RTX3090, 12020, 12080, ""),  # that of sm_80
        (RTX5090, 12080, 12080, ""),  # compiled by the driver
        (RTX5090, 12020, 12080, r"this driver \(CUDA 12.2\) can't compile that of CUDA 12.8"),
        (T4, 13000, 13000, r"no code for Tesla T4 .*7.5\); build it with SSLKERNELS_CUDA_ARCHS=75"),
    ],
)
def test_the_runtime_of_the_extension(
    machine: Machine, gpu: tuple, driver: int, runtime: int, reason: str
) -> None:
    """A driver must be as new as the CUDA that ``_cuda`` was built with; else Triton updates."""
    machine(gpu, driver=driver, runtime=runtime)
    if not reason:
        assert chosen(0, "updates") == "cuda"
        return
    assert chosen(0, "updates") == ("chunked" if gpu == T4 else "triton")
    with ssl.backend("cuda"), pytest.raises(RuntimeError, match=reason):
        chosen(0, "updates")
    with pytest.raises(RuntimeError, match=reason):
        ssl.set_backend("cuda")


def test_machine_code_of_a_newer_minor_capability(machine: Machine) -> None:
    """sm_86 does not run on 8.0, nor on 9.0, and its intermediate code only on newer ones."""
    machine(A100, H100, RTX3090, archs=(86,))
    assert [chosen(i, "updates") for i in range(3)] == ["triton", "cuda", "cuda"]


@pytest.mark.parametrize("version", ["3.6.0", "3.3.1", "2.3.1", "unknown"])
def test_a_triton_that_is_too_old(
    machine: Machine, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything of it is used: ``triton.knobs`` came with 3.4."""
    machine(H100, triton=devices.Triton(version))
    monkeypatch.delattr(devices, "interpreting")
    assert chosen(0) == "chunked"
    reason = f"need Triton {OLDEST} or newer, installed is {version}"
    assert reason in ssl.info().backends["cuda/tiles"] and ssl.info().triton == version
    with pytest.raises(RuntimeError, match=reason):
        ssl.set_backend("triton")


@pytest.mark.parametrize("version", [OLDEST, f"{OLDEST}.1+gitabc", "3.10.0", "4.0"])
def test_a_triton_that_is_new_enough(machine: Machine, version: str) -> None:
    """By number: 3.10 comes after 3.9."""
    machine(H100, triton=devices.Triton(version))
    assert chosen(0) == "triton"


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, "the package 'triton' is not installed"),
        (devices.Triton("unknown", "OSError: x"), r"triton can't be imported \(OSError: x\)"),
    ],
)
def test_no_triton(machine: Machine, found: devices.Triton | None, reason: str) -> None:
    machine(H100, triton=found)
    assert (chosen(0), chosen(0, "updates")) == ("chunked", "cuda")
    with pytest.raises(RuntimeError, match=reason):
        ssl.set_backend("triton")


@pytest.mark.parametrize(
    ("arch", "served"),
    [
        ("gfx942", True),
        ("gfx90a", True),
        ("gfx906", False),
        ("gfx1030", False),
        ("gfx1100", False),
        ("gfx1201", False),
    ],
)
def test_amd(machine: Machine, arch: str, served: bool) -> None:
    """The tables are for CDNA; RDNA has waves of 32 and no MFMA."""
    machine(("AMD Radeon", arch))
    assert chosen(0) == chosen(0, "updates") == ("triton" if served else "chunked")
    assert "_cuda is for NVIDIA GPUs" in ssl.info().backends["cuda/updates"]
    if not served:
        assert f"AMD Radeon is {arch}" in ssl.info().backends["cuda/tiles"]


@pytest.mark.parametrize(
    ("arch", "served"), [("sm_110", True), ("sm_121", True), ("sm_130", False)]
)
def test_a_capability_without_a_table(machine: Machine, arch: str, served: bool) -> None:
    """Tiles of another architecture might spill or not fit: chunked serves, and info() says why."""
    machine(("GPU of tomorrow", arch))
    assert chosen(0) == ("triton" if served else "chunked")
    told = ssl.info().backends["cuda/tiles"]
    assert served or ("11.0, 12.0, 12.1, GPU of tomorrow has 13.0" in told)


def test_updates_without_the_cuda_extension(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's kernels; plain torch only where Triton is missing too; info() gives the reasons."""
    machine(H100)
    monkeypatch.setitem(sys.modules, "sslkernels.backends.cuda", None)
    assert chosen(0, "updates") == "triton"
    assert ssl.info().backends["cuda/updates"].startswith("triton (backend 'cuda': it could not")
    monkeypatch.setitem(sys.modules, "sslkernels.backends.triton", None)
    registry._cache.clear()
    assert chosen(0, "updates") == "chunked"
    assert ssl.info().backends["cuda/updates"].count("it could not be loaded") == 2


def test_without_a_gpu(machine: Machine) -> None:
    """All that is said is why; the CPU goes on."""
    machine()
    assert chosen(CUDA) == "chunked" and ssl.info().cuda_device is None
    assert "no GPU at all" in ssl.info().backends["cuda/updates"]
    for name in ("triton", "cuda"):
        with pytest.raises(RuntimeError, match="can serve no device here .*no GPU at all"):
            ssl.set_backend(name)
    assert torch.isfinite(ssl.nt_xent_loss(torch.randn(4, 3), torch.randn(4, 3)))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('__version__ = "3.3.1"', f"need Triton {OLDEST} or newer, installed is 3.3.1"),
        ("import no_such_module", "triton can't be imported (ModuleNotFoundError"),
        ("x.y", "triton can't be imported (NameError"),
    ],
)
def test_a_foreign_package_called_triton(source: str, expected: str, tmp_path: Path) -> None:
    """Old or broken ones, for real: no AttributeError, and the CPU is not concerned."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text(source)
    code = """
import torch, sslkernels
from sslkernels.ops import registry
print(sslkernels.nt_xent_loss(torch.eye(4), torch.eye(4)).item() > 0)
print(registry._why_not("triton", torch.device("cuda")))
print(sslkernels.info())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS_S,
    )
    assert done.returncode == 0, done.stderr
    served, why, *facts = done.stdout.splitlines()
    assert served == "True" and expected in why
    assert any(line.startswith("  cuda/tiles      chunked") for line in facts)


def test_the_oldest_triton_is_declared() -> None:
    """One bound: what the code asks for is what ``pip install sslkernels[gpu]`` demands."""
    assert f'gpu = ["triton>={OLDEST}"]' in (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_facts_of_this_machine() -> None:
    """As torch gives them, for every GPU."""
    assert devices.count() == torch.cuda.device_count()
    for index in range(devices.count()):
        gpu = devices.gpu(torch.device("cuda", index))
        assert gpu.multiprocessors > 0 and gpu.name == torch.cuda.get_device_name(index)
        if torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(index)
            assert gpu.capability == 10 * major + minor
