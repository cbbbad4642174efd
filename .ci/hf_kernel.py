# SPDX-License-Identifier: Apache-2.0
"""Lays sslkernels out as Hugging Face's ``kernels`` loads it from a folder: ``hf_kernel.py WHEEL FOLDER``.

    FOLDER/sslkernels/build/torch-stable-abi24-cpu-x86_64-linux/  with the compiled module; torch 2.4 or newer
    FOLDER/sslkernels/build/torch-cpu/                            plain torch, for any machine
    FOLDER/sslkernels/build/torch-cuda/, torch-rocm/              Triton kernels, compiled where they run

    kernels.get_local_kernel(Path("FOLDER/sslkernels"), backend="cpu").nt_xent_loss(...)

``kernels`` wants to load several versions into one process, beside an installed sslkernels.  So each variant
has an id of its own, from its contents: as the name of its package and of its ops.  "stable-abi24" is how a
variant says that it serves torch 2.4 and every newer one; the module uses nothing of torch's binaries.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

# Where the package's own name is more than text: imports, and the names of modules and ops in strings.
NAMES = [
    re.compile(r"^(\s*(?:from|import) )sslkernels\b", re.MULTILINE),
    re.compile(r"(\btorch\.ops\.)sslkernels\b"),
    re.compile(r"(\bLibrary\(\")sslkernels(?=\")"),
    re.compile(r"(\")sslkernels(?=::)"),
    re.compile(r"((?:import_module|_spec_exists|startswith)\(f?\")sslkernels(?=\.)"),
    re.compile(r"(__name__ == \")sslkernels(?=\.)"),
    re.compile(r"(name != \")sslkernels(?=\")"),
]
# kernels counts versions of the interface from 0, which is what may still change.
INTERFACE = 0


def renamed(source: str, name: str) -> str:
    """A module of sslkernels as one of the package ``name``."""
    for pattern in NAMES:
        source = pattern.sub(lambda match: match[1] + name, source)
    return source


def digest(content: bytes) -> str:
    """As metadata.json has it."""
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def variant(files: Mapping[str, bytes], folder: Path, backend: str) -> str:
    """Write one build variant, without what is compiled if ``files`` lacks it, and return its id."""
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(name.encode() + b"\0" + files[name])
    ident = f"_sslkernels_{backend}_{whole.hexdigest()[:7]}"
    written = {
        name: renamed(content.decode("utf-8"), ident).encode() if name.endswith(".py") else content
        for name, content in files.items()
    }
    # Older versions of kernels look for a package of the kernel's name inside.
    written["sslkernels/__init__.py"] = (
        "# SPDX-License-Identifier: Apache-2.0\n"
        "import importlib.util\nimport sys\nfrom pathlib import Path\n\n"
        f"if {ident!r} not in sys.modules:\n"
        "    _spec = importlib.util.spec_from_file_location(\n"
        f"        {ident!r}, Path(__file__).parents[1] / '__init__.py'\n    )\n"
        f"    sys.modules[{ident!r}] = importlib.util.module_from_spec(_spec)\n"
        f"    _spec.loader.exec_module(sys.modules[{ident!r}])\n"
        f"from {ident} import *  # noqa: F403\n"
    ).encode()
    for name, content in written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    metadata = {
        "name": "sslkernels",
        "id": ident,
        "version": INTERFACE,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {n: digest(c) for n, c in sorted(written.items())},
        },
    }
    folder.joinpath("metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
    return ident


def lay_out(files: Mapping[str, bytes], folder: Path, platform: str) -> Path:
    """Write every variant of a package.

    Args:
        files: Contents by path within the package, the compiled module among them.
        folder: Where the folder "sslkernels" goes; what was in it is deleted.
        platform: Of the compiled module, for example "x86_64-linux".

    Returns:
        The folder for ``get_local_kernel``.
    """
    kernel = folder / "sslkernels"
    shutil.rmtree(kernel, ignore_errors=True)
    plain = {name: content for name, content in files.items() if not name.endswith(".so")}
    variant(files, kernel / "build" / f"torch-stable-abi24-cpu-{platform}", "cpu")
    for backend in ("cpu", "cuda", "rocm"):
        variant(plain, kernel / "build" / f"torch-{backend}", backend)
    return kernel


def from_package(package: Path, folder: Path, platform: str) -> Path:
    """:func:`lay_out` of a package in a folder: its Python, its types, the module for every Python."""
    wanted = [
        p
        for p in package.rglob("*")
        if p.suffix in (".py", ".pyi") or p.name in ("py.typed", "_C.abi3.so")
    ]
    files = {p.relative_to(package).as_posix(): p.read_bytes() for p in wanted}
    return lay_out(files, folder, platform)


def from_wheel(wheel: Path, folder: Path) -> Path:
    """:func:`lay_out` of a wheel."""
    machine = re.search(r"-(?:many)?linux_(?:\d+_\d+_)?(\w+)\.whl$", wheel.name)
    if machine is None:
        raise SystemExit(f"hf_kernel: the wheel must be one for Linux, got {wheel.name}")
    with tempfile.TemporaryDirectory() as name:
        zipfile.ZipFile(wheel).extractall(name)
        return from_package(Path(name, "sslkernels"), folder, f"{machine[1]}-linux")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    print(from_wheel(Path(sys.argv[1]), Path(sys.argv[2])))
