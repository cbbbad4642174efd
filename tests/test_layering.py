# SPDX-License-Identifier: Apache-2.0
"""The layers of the project, read from its sources, and the rules of the house."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {".venv", "build", "dist", ".git", "runs", "__pycache__", "node_modules"}

# Layers from the lowest; a module may import its own and those below.  The longest prefix counts.
LAYERS = {
    "sslkernels._types": 0,
    "sslkernels._numbers": 0,
    "sslkernels._subinterpreters": 0,
    "sslkernels._version": 0,
    "sslkernels._C": 0,
    "sslkernels._cuda": 0,
    "sslkernels.backends": 1,
    "sslkernels.ops": 2,
    "sslkernels": 3,  # functional, losses, queue, ema, metrics, ...
    "sslkernels.integrations": 4,
    "ssltrain": 5,
}
# Beyond the order of layers.  Only ops choose a backend; chunked's helpers are plain torch for all.
FORBIDDEN = {
    "sslkernels.reference": ("sslkernels.ops", "sslkernels.backends", "sslkernels.functional"),
    "sslkernels.functional": (
        "sslkernels.losses",
        "sslkernels.backends.cpu",
        "sslkernels.backends.cuda",
        "sslkernels.backends.triton",
    ),
    "ssltrain": ("sslkernels.ops", "sslkernels.backends", "sslkernels._C", "sslkernels._cuda"),
}


def files(*patterns: str) -> list[Path]:
    """Files of the working tree that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        found = [ROOT / line for line in listed.stdout.splitlines()]
    else:  # an unpacked archive
        found = [p for pattern in patterns for p in ROOT.rglob(pattern)]
    return sorted(p for p in found if p.is_file() and not SKIPPED & set(p.relative_to(ROOT).parts))


def modules() -> Iterator[tuple[str, Path]]:
    for path in files("*.py"):
        relative = path.relative_to(ROOT)
        parts = relative.parts[1:] if relative.parts[0] == "python" else relative.parts
        if parts[0] in ("sslkernels", "ssltrain"):
            name = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
            yield name, path


def imports(name: str, path: Path) -> set[str]:
    """Names of everything of ours that a module imports, at any depth, TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {f for f in found if f.split(".")[0] in ("sslkernels", "ssltrain")}


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer(name: str) -> int:
    return LAYERS[max((p for p in LAYERS if within(name, p)), key=len)]


def violations(name: str, imported: set[str]) -> list[str]:
    bad = [f"{name} imports {i}" for i in imported if layer(i) > layer(name)]
    for prefix, targets in FORBIDDEN.items():
        if within(name, prefix):
            bad += [f"{name} imports {i}" for i in imported for t in targets if within(i, t)]
    return bad


def test_a_layer_uses_only_those_below() -> None:
    known = list(modules())
    assert {"sslkernels.ema", "sslkernels.ops.ema", "ssltrain.cli"} <= {name for name, _ in known}
    bad = [line for name, path in known for line in violations(name, imports(name, path))]
    # The package's own __init__ gathers what is public.
    assert not [line for line in bad if not line.startswith("sslkernels imports")]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("sslkernels.backends.cpu", "from sslkernels.ops import registry"),
        ("sslkernels.ops.ema", "def f():\n    import sslkernels.losses"),
        ("sslkernels.reference", "from sslkernels.ops.rows import x"),
        ("sslkernels.losses", "from ssltrain import cli"),
        ("ssltrain.trainer", "from sslkernels import _C"),
    ],
)
def test_the_rule_finds_a_breach(name: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert violations(name, imports(name, path))


def test_csrc_is_free_of_torch() -> None:
    sources = files("csrc/*.cpp", "csrc/*.h", "csrc/*.cu", "csrc/*.cuh")
    assert len(sources) > 10
    header = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2)\b')
    assert not [p.name for p in sources if header.search(p.read_text("utf-8"))]


def test_kernel_files_use_no_standard_templates() -> None:
    """An inline template of an AVX-512 unit could be linked into the baseline: SIGILL elsewhere."""
    allowed = {"cstdint", "cmath", "cstring", "cstdlib", "cstddef", "new", "immintrin.h"}
    allowed.add("utility")  # for std::integer_sequence, a type without code
    bad = []
    for path in files("csrc/cpu/*.cpp", "csrc/cpu/*.h"):
        for included in re.findall(r"#\s*include\s*<([^>]+)>", path.read_text("utf-8")):
            if included not in allowed:
                bad.append(f"{path.name} includes <{included}>")
    assert not bad


def test_files_can_be_read_in_one_sitting() -> None:
    sources = files("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
    long = {p.relative_to(ROOT).as_posix(): len(p.read_text("utf-8").splitlines()) for p in sources}
    assert not {name: n for name, n in long.items() if n > 600 and not name.startswith("tests/")}
    assert not {name: n for name, n in long.items() if n > 900}


def test_every_source_names_its_licence() -> None:
    for path in files("*.py", "*.pyi", "*.cpp", "*.h", "*.cu", "*.cuh"):
        lines = path.read_text("utf-8").splitlines()[:2]
        mark = "#" if path.suffix in (".py", ".pyi") else "//"
        assert f"{mark} SPDX-License-Identifier: Apache-2.0" in lines, path


def test_nothing_is_left_unfinished_or_points_outside() -> None:
    marks = ["TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK"]
    hosts = [
        "pypi" + ".org",
        "download" + ".pytorch",
        "index" + "-url",
        "/" + "work/",
        "/" + "tmp/env",
    ]
    unfinished = re.compile(r"\b(" + "|".join(marks) + r")\b")
    bad = []
    for path in files(
        "*.py",
        "*.pyi",
        "*.cpp",
        "*.h",
        "*.cu",
        "*.cuh",
        "*.md",
        "*.toml",
        "*.txt",
        "Makefile",
        ".ci/*",
    ):
        text = path.read_text("utf-8")
        found = unfinished.findall(text) + [host for host in hosts if host in text]
        bad += [f"{path.relative_to(ROOT)}: {f}" for f in found]
    assert not bad


def test_no_user_error_is_an_assertion() -> None:
    """`assert` vanishes under -O."""
    bad = []
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Assert):
                bad.append(f"{name}:{node.lineno}")
    assert not bad
