# SPDX-License-Identifier: Apache-2.0
"""Docstrings are written for a terminal; this says to the site what in them is code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


def prepared(text: str) -> str:
    """A docstring whose doctests are highlighted and whose <a, b> is no HTML tag."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    lines = []
    for line in text.splitlines():
        is_code = ">>>" in line or line.startswith("    ") and "`" not in line and "<" not in line
        parts = [line] if is_code else re.split(r"(`[^`]*`)", line)
        lines.append(
            "".join(p if p.startswith("`") else re.sub(r"<(?=\w)", "&lt;", p) for p in parts)
        )
    return "\n".join(lines)


class Docstrings(Extension):
    """Prepares the docstring of every object."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for each object it has read."""
        if obj.docstring is None:
            return
        if obj.name == "__init__" and obj.docstring.value.startswith("See "):
            obj.docstring = None  # it refers to what it would be shown below
        else:
            obj.docstring.value = prepared(obj.docstring.value)
