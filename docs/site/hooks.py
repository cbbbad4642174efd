# SPDX-License-Identifier: Apache-2.0
"""Formulas without a script: a fence named ``math`` becomes MathML, which browsers draw themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).resolve().parents[2]


def formula(source: str, *_: Any, **__: Any) -> str:
    """One formula, in the interface of custom fences."""
    return f'<div class="formula">{convert(source, display="block")}</div>'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the fence, and let pages include files of the project from any folder."""
    fence = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    config.mdx_configs["pymdownx.snippets"] = {"base_path": [str(ROOT)], "check_paths": True}
    return config
