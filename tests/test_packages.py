# SPDX-License-Identifier: Apache-2.0
"""What packages promise: old C libraries, a folder for Hugging Face's kernels, complete types."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import HANGS_S
from test_build import LIMITED_API

import sslkernels

ROOT = Path(__file__).resolve().parents[1]
# manylinux_2_28, that of torch's own wheels (auditwheel's policy).
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
PLATFORM = "x86_64-linux"


@pytest.fixture
def ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / ".ci")


def versions(listing: str) -> set[tuple[str, tuple[int, ...]]]:
    """Versions of symbols in what ``objdump -T`` prints."""
    found = re.findall(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)\b", listing)
    return {(name, tuple(map(int, version.split(".")))) for name, version in found}


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="x86-64 Linux"
)
def test_the_module_runs_where_torch_does() -> None:
    """csrc/portable.h and portable.cpp: nothing newer than torch itself asks for."""
    module = Path(sys.modules["sslkernels._C"].__file__ or "")
    done = subprocess.run(["objdump", "-T", module], capture_output=True, text=True, check=True)
    found = versions(done.stdout)
    assert {name for name, _ in found} >= {"GLIBC", "GLIBCXX"}
    newer = [(name, version) for name, version in found if version > NEWEST[name]]
    assert not newer, f"{newer}: csrc/portable.h can name the older version"


def test_versions_are_numbers_not_text() -> None:
    assert versions("0 DF *UND* (GLIBC_2.4) f\n (GLIBCXX_3.4.29) g") == {
        ("GLIBC", (2, 4)),
        ("GLIBCXX", (3, 4, 29)),
    }


@pytest.fixture
def layout(ci: None, tmp_path: Path) -> Path:
    import hf_kernel

    return hf_kernel.from_package(ROOT / "sslkernels", tmp_path, PLATFORM)


def test_every_variant_is_described(layout: Path) -> None:
    idents = set()
    variants = sorted((layout / "build").iterdir())
    assert [v.name for v in variants] == [
        "torch-cpu",
        "torch-cuda",
        "torch-rocm",
        f"torch-stable-abi24-cpu-{PLATFORM}",
    ]
    for folder in variants:
        metadata = json.loads((folder / "metadata.json").read_text("utf-8"))
        assert metadata["backend"]["type"] in folder.name.split("-")
        assert metadata["name"] == "sslkernels" and metadata["license"] == "Apache-2.0"
        assert metadata["id"].isidentifier() and isinstance(metadata["version"], int)
        idents.add(metadata["id"])
        held = {
            p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file()
        }
        del held["metadata.json"]
        digests = {
            n: base64.b64encode(hashlib.sha256(c).digest()).decode() for n, c in held.items()
        }
        assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
        compiled = [name for name in held if name.endswith(".so")]
        assert compiled == (["_C.abi3.so"] if "stable" in folder.name and LIMITED_API else [])
    assert len(idents) == len(variants)


def test_no_variant_imports_an_installed_package(layout: Path) -> None:
    for path in (layout / "build/torch-cpu").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names: list[str | None] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not [n for n in names if n and n.partition(".")[0] == "sslkernels"], path


LOAD = """
import importlib.util, json, sys
from pathlib import Path

# As kernels loads a variant: its id is the name of the module.
def load(folder):
    ident = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(ident, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[ident] = module
    spec.loader.exec_module(module)
    return module

build = Path(sys.argv[1])
first = load(build / sys.argv[2])
assert "sslkernels" not in sys.modules
plain = load(build / "torch-cpu")
import torch, sslkernels
z = torch.randn(12, 8)
values = []
for module in (first, plain, sslkernels):
    x = z.clone().requires_grad_()
    loss = module.nt_xent_loss(x, z.flip(0))
    loss.backward()
    queue = module.KeyQueue(4, 8)
    queue.enqueue(z[:3])
    module.ema_update_([torch.zeros(3)], [torch.ones(3)], 0.5)
    values.append((loss.detach(), x.grad))
    with module.backend("chunked"):
        module.nt_xent_loss(z, z)
for loss, grad in values[1:]:
    torch.testing.assert_close(loss, values[0][0])
    torch.testing.assert_close(grad, values[0][1])
facts = [m.info() for m in (first, plain)]
print(facts[0].cpu_extension, facts[1].cpu_extension, first.EMA.__module__ != sslkernels.EMA.__module__)
"""


def test_a_variant_loads_beside_another_and_the_installed_package(layout: Path) -> None:
    """The documented steps; `make wheel ARGS=--kernels` loads it with that package itself."""
    command = [sys.executable, "-W", "ignore", "-c", LOAD, str(layout / "build")]
    done = subprocess.run(
        [*command, f"torch-stable-abi24-cpu-{PLATFORM}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(LIMITED_API), "False", "True"], done.stdout


def test_a_kernel_is_named_in_code_and_not_in_text(ci: None) -> None:
    import hf_kernel

    source = '"""See sslkernels."""\nfrom sslkernels.ops import ema\nx = torch.ops.sslkernels.f\n'
    assert hf_kernel.renamed(source, "_k1") == (
        '"""See sslkernels."""\nfrom _k1.ops import ema\nx = torch.ops._k1.f\n'
    )


def test_incomplete_types_are_reported(ci: None) -> None:
    import typecheck

    def symbol(name: str, *messages: str, known: bool = False) -> dict[str, object]:
        wrong = [{"severity": "error", "message": message} for message in messages]
        return {"name": name, "isTypeKnown": known, "isTypeAmbiguous": False, "diagnostics": wrong}

    other = "sslkernels.integrations.pytorch_metric_learning.NTXentLoss"
    found = typecheck.incomplete(
        [
            symbol("sslkernels.f", known=True),
            symbol("sslkernels.g", "Return type is unknown"),
            symbol(other, "Type of base class unknown"),
            symbol(other + ".forward", "Return type is unknown"),
            symbol("sslkernels.losses.A", "Type of base class unknown"),
        ]
    )
    assert sorted(found) == ["sslkernels.g", other + ".forward", "sslkernels.losses.A"]


def test_outcomes_of_other_libraries_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/peers/suites.py: a test that passes with their class must pass with ours."""
    monkeypatch.syspath_prepend(ROOT / "tests/peers")
    import suites

    report = """<testsuites><testsuite>
      <testcase classname="a.B" name="good"/>
      <testcase classname="a.B" name="parts"/><testcase classname="a.B" name="parts"><failure/></testcase>
      <testcase classname="a.B" name="odd"><skipped/></testcase>
      <testcase classname="a.B" name="broken"><error/></testcase>
    </testsuite></testsuites>"""
    found = suites.outcomes(report)
    assert found == {
        "a.B::good": "passed",
        "a.B::parts": "failed",
        "a.B::odd": "skipped",
        "a.B::broken": "failed",
    }
    before = dict.fromkeys(found, "passed") | {"a.B::broken": "failed", "a.B::gone": "passed"}
    assert suites.broken(before, found) == ["a.B::parts", "a.B::odd", "a.B::gone"]
    for name in suites.SUITES:
        assert set(suites.SUITES[name].patch) <= set(sslkernels.integrations._patching.PEERS)
    assert set(suites.KNOWN) <= set(suites.SUITES)


def test_losses_of_scripts_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/peers/scripts.py: differences in units of the loss, and one line for each script."""
    monkeypatch.syspath_prepend(ROOT / "tests/peers")
    import scripts

    assert scripts.difference([4.0, 0.1], [4.0, 0.1]) == 0
    assert scripts.difference([4.0, 0.1], [4.1, 0.1]) == pytest.approx(0.025)
    assert scripts.difference([4.0, 0.1], [4.0, 0.3]) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="longer|shorter"):
        scripts.difference([4.0], [4.0, 1.0])
    seen = {"losses": [4.0], "seconds": 2.0, "peak_bytes": 3 * 2**20}
    alone = {**seen, "loss_ms": 1.5, "loss_bytes": 2048, "rows": 64}
    assert scripts.row("a", [seen, seen], [alone, alone]).endswith(
        "| 0.0e+00 | 64 | 1.50 → 1.50 | 2 → 2 | 2.0 → 2.0 | 3 → 3 |"
    )
    assert "| – | – | – | 2.0 → 2.0 |" in scripts.row("a", [seen, seen], [seen, seen])
    for chosen in scripts.SCRIPTS.values():
        for script in chosen:
            assert set(script.patch) <= set(sslkernels.integrations._patching.PEERS)


def test_an_interpreter_that_does_not_run_is_passed_over(ci: None, tmp_path: Path) -> None:
    """pyenv has names for versions that are not chosen: they exist and fail."""
    import wheel

    shim = tmp_path / "python3.99"
    shim.write_text("#!/bin/sh\nexit 127\n", "utf-8")
    shim.chmod(0o755)
    assert wheel.usable(sys.executable)
    assert not wheel.usable(str(shim)) and not wheel.usable(str(tmp_path / "none"))


def test_the_version_is_written_once(ci: None) -> None:
    import requirements

    project = requirements.project_table()
    assert "version" not in project and "version" in project["dynamic"]
    for name in ("setup.py", "CITATION.cff", "Makefile", ".ci/wheel.py", ".ci/hf_kernel.py"):
        assert sslkernels.__version__ not in ROOT.joinpath(name).read_text("utf-8"), name


def test_the_citation_is_complete() -> None:
    """The keys that the format requires."""
    citation = yaml.safe_load(ROOT.joinpath("CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)


def test_tools_are_pinned() -> None:
    lines = ROOT.joinpath(".ci/tools.txt").read_text("utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted and all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in wanted)
