# SPDX-License-Identifier: Apache-2.0
"""What the site adds to the pages: formulas without a script, tables and plots from other folders.

A fence named ``math`` becomes MathML, which browsers draw themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PLOTS = "../benchmarks/results/"  # as pages link them, for readers of the repository


def formula(source: str, *_: Any, **__: Any) -> str:
    """One formula, in the interface of custom fences."""
    return f'<div class="formula">{convert(source, display="block")}</div>'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the fence, and let pages include files of the project from any folder."""
    fence = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    config.mdx_configs["pymdownx.snippets"] = {"base_path": [str(ROOT)], "check_paths": True}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the plots of the benchmarks along."""
    folder = ROOT / "benchmarks/results"
    for path in folder.rglob("*.svg"):
        place = f"assets/results/{path.relative_to(folder).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Link the plots where they are in the site."""
    return markdown.replace(f"({PLOTS}", "(assets/results/")
