# SPDX-License-Identifier: Apache-2.0
"""Asks pyright whether every public type of sslkernels is complete: ``make typecheck``.

``pyright --verifytypes`` counts what a user of the package sees under strict checking.  Every symbol must be
known.  One thing is let pass: a base class that is not ours and has no types or is not installed, which makes
pyright doubt the drop-ins that derive from it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Their drop-ins are subclasses of the classes of libraries that are not installed here, or have no types.
OF_OTHERS = (
    "sslkernels.integrations.pytorch_metric_learning.",
    "sslkernels.integrations.sentence_transformers.",
)
BASES = ("Type of metaclass unknown", "Type of base class")


def incomplete(symbols: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What is wrong with each symbol of a report that is not complete."""
    found = {}
    for symbol in symbols:
        if symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]:
            continue
        wrong = [d["message"] for d in symbol["diagnostics"] if d["severity"] == "error"]
        if symbol["name"].startswith(OF_OTHERS):
            wrong = [message for message in wrong if not message.startswith(BASES)]
        if wrong:
            found[symbol["name"]] = wrong
    return found


def main() -> int:
    """Run pyright, which must be in this environment, on the Python that is first on the PATH."""
    pyright = Path(sys.executable).parent / "pyright"
    command = [str(pyright), "--verifytypes", "sslkernels", "--ignoreexternal", "--outputjson"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    symbols = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    found = incomplete(symbols)
    for name, messages in found.items():
        print(f"{name}: {'; '.join(messages)}", file=sys.stderr)
    print(f"typecheck: {len(symbols) - len(found)} of {len(symbols)} symbols are complete")
    return 1 if found or not symbols else 0


if __name__ == "__main__":
    sys.exit(main())
