# SPDX-License-Identifier: Apache-2.0
"""``python tests/sanitize/bindings.py MODULE.so``: calls of the functions of ``_C`` that are wrong somehow.

    --examples N    calls (20,000)
    --seed S        other calls than those of seed 0
    --only K        example K alone, which is printed
    --bytes FILE    the calls that the fuzzer (fuzz.py) read from these bytes, which are printed

A process that dies leaves the number of its last example in the folder of temporary files
(sslkernels-bindings-PID).

Names are left out and added; values are of other types, negative, too large; addresses are null; a handle is
that of another function; sizes, strides, codes and layouts do not belong together.  Every call must return or
raise an exception.  What a binding can't see, and these calls therefore do not have, is an address of less
memory than the sizes say: all memory is as large as any of these sizes allows.

Neither torch nor the package is imported, so that a crash is the module's own.
"""

from __future__ import annotations

import argparse
import ast
import collections
import ctypes
import importlib.util
import math
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

STUB = Path(__file__).resolve().parents[2] / "sslkernels" / "_C.pyi"
DTYPES = ("float32", "float64", "bfloat16", "float16")
WORDS = {
    "kind": ("lse", "softplus"),
    "layout": ("joint", "cross", "both", "bank", "decoupled", "sigmoid", "classes"),
    "reduction": ("none", "mean", "sum"),
    "likelihood": ("bernoulli", "gaussian"),
}
HANDLES = ("tiles", "contrastive", "regression", "paired", "triplet", "vae")
MOST = 12  # rows and columns
FILLED = 16 << 10  # bytes of an array: MOST rows of MOST rows of MOST doubles
LARGE = 1 << 20
T = TypeVar("T")
REFUSED = (TypeError, ValueError, MemoryError, OverflowError, RuntimeError)
JUNK: tuple[Any, ...] = (
    None,
    "x",
    b"x",
    1.5,
    math.nan,
    [],
    {},
    (),
    object,
    True,
    -1,
    2**70,
    "\ud800",
)
# Beyond what memory can hold, or no size at all.
NO_SIZES = (-1, -5, -(2**63), 2**47 + 1, 2**62, 2**63 - 1, 2**63, 2**70)
VAST = 2**40  # a size, but not twice


def load(path: str) -> ModuleType:
    """The module alone; its OpenMP symbols come from libgomp, unless it has its own."""
    try:
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        pass
    spec = importlib.util.spec_from_file_location("sslkernels._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def signatures() -> dict[str, ast.arguments]:
    """Arguments of functions, of constructors as Class, and of methods as Class.method."""
    found = {}
    for node in ast.parse(STUB.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node.args
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                assert isinstance(method, ast.FunctionDef)
                name = node.name if method.name == "__init__" else f"{node.name}.{method.name}"
                found[name] = method.args
    return found


class Bytes:
    """Choices that are read from bytes: what a call needs of random.Random.  After the last: 255."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    @property
    def ended(self) -> bool:
        return self.at >= len(self.data)

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 255

    def random(self) -> float:
        return self._byte() / 256

    def randrange(self, stop: int) -> int:
        return self._byte() % stop

    def choice(self, values: Sequence[T]) -> T:
        return values[self._byte() % len(values)]

    def shuffle(self, values: list[Any]) -> None:
        first = self._byte() % max(1, len(values))
        values[:] = values[first:] + values[:first]


def contents() -> list[bytes]:
    """What arrays are filled with: zeros, anything at all, small and large integers, floats."""
    source = random.Random(0)
    floats = (ctypes.c_float * (FILLED // 4))(*(source.gauss(0, 1) for _ in range(FILLED // 4)))
    doubles = (ctypes.c_double * (FILLED // 8))(*(source.gauss(0, 1) for _ in range(FILLED // 8)))
    integers = [source.randrange(4).to_bytes(8, "little") for _ in range(FILLED // 8)]
    return [
        bytes(FILLED),
        source.randbytes(FILLED),
        b"".join(integers),
        b"".join(reversed([bytes(4) + x[:4] for x in integers])),
        bytes(floats),
        bytes(doubles),
        b"\xff" * FILLED,
    ]


class Caller:
    """Makes one wrong call after the other.

    Args:
        module: ``_C``.
        vast: Sizes too, of which two are more than memory; a sanitizer's allocator ends there.
        slow: What takes 10 ms and more, now and then.
    """

    def __init__(self, module: ModuleType, vast: bool = True, slow: bool = True) -> None:
        self.module = module
        self.signatures = signatures()
        # The kept tiles of a loss are whole blocks; nothing else is as large.
        self.large = ctypes.create_string_buffer(LARGE + 64)
        self.arrays = [ctypes.create_string_buffer(FILLED + 128) for _ in range(32)]
        self.contents = contents()
        self.isas = module.available_isas()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.vast_share, self.slow = 0.03 if vast else 0.0, slow

    def example(self, seed: int, number: int, show: bool = False) -> None:
        """The call with this number, and those that make its handle or object."""
        self.one(random.Random(seed * 1_000_003 + number), show)

    def from_bytes(self, data: bytes, show: bool = False) -> None:
        """Calls as long as there are bytes, at most four."""
        source = Bytes(data)
        for _ in range(4):
            if not source.ended:
                self.one(source, show)

    def one(self, source: random.Random | Bytes, show: bool) -> None:
        self.random: Any = source
        self.show, self.taken = show, 0
        # A call that is right but for one thing reaches further than one that is wrong everywhere.
        self.wrong = self.random.choice((0.0, 0.0, 0.02, 0.02, 0.1))
        self.may_be_vast, self.vast = self.random.random() < self.vast_share, False
        self.length = self.random.randrange(4)
        self.module.set_isa(self.random.choice(self.isas))
        name = self.random.choice(list(self.signatures))
        if name == "peak_flops" and not (self.slow and self.random.random() < 0.02):
            return
        try:
            self.call(name)
        except REFUSED as error:
            assert str(error) or isinstance(error, MemoryError), f"{name}: an error without words"
            self.outcomes[f"{type(error).__name__} from {name}"] += 1
        else:
            self.outcomes[f"result from {name}"] += 1

    def call(self, name: str) -> Any:
        owner, _, method = name.partition(".")
        if method:
            function = getattr(self.call(owner), method)
        else:
            function = getattr(self.module, owner)
        arguments = self.signatures[name]
        self.vast = (
            self.may_be_vast and name in HANDLES
        )  # rows and columns: no memory is their product
        positional = [a for a in (*arguments.posonlyargs, *arguments.args) if a.arg != "self"]
        values = [self.positional(a) for a in positional]
        named = {}
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            if default is not None and self.random.random() < 0.3:
                continue
            assert argument.annotation is not None
            named[argument.arg] = self.value(argument.arg, ast.unparse(argument.annotation))
        if self.lucky():
            self.random.choice(
                (
                    lambda: named.pop(self.random.choice(sorted(named)), None) if named else None,
                    lambda: named.update({self.random.choice(("unknown", "", "\u00e4")): 1}),
                    lambda: values.append(1),
                    lambda: values.clear(),
                )
            )()
        if self.show:
            print(f"{name}(*{values!r}, **{named!r})", flush=True)
        items = list(named.items())
        self.random.shuffle(items)
        return function(*values, **dict(items))

    def lucky(self) -> bool:
        return self.random.random() < self.wrong

    def positional(self, argument: ast.arg) -> Any:
        kind = ast.unparse(argument.annotation) if argument.annotation else ""
        if self.lucky():
            return self.random.choice(JUNK)
        if kind.startswith("_"):  # a handle: of the function of that name, or of another
            return self.call(self.random.choice(HANDLES) if self.lucky() else kind[1:].lower())
        if argument.arg == "name":
            return self.random.choice(["auto", "none", *self.isas])
        return [self.random.choice(JUNK) for _ in range(self.random.randrange(3))]

    def value(self, name: str, kind: str) -> Any:
        if self.lucky():
            return self.random.choice(JUNK)
        if kind.startswith("list["):
            length = self.random.randrange(4) if self.lucky() else self.length
            inner = (
                "address" if name in ("features", "targets", "sources", "gradients") else kind[5:-1]
            )
            return [self.value(name, inner) for _ in range(length)]
        if kind == "_Address" or kind == "address":
            return self.address(name)
        if kind == "str":
            return self.random.choice(WORDS.get(name, DTYPES))
        if kind == "bool":
            return self.random.random() < 0.5
        if kind == "float":
            numbers = (0.0, 0.5, 1.0, -1.0, 1e-300, 1e300, math.inf, math.nan)
            return self.random.choice(numbers)
        if kind.startswith("dict"):
            return {"a": object()}
        if kind == "Tensor":
            return object()
        if name in ("data_ptr", "numel", "dtype", "dim", "strides"):
            return 0  # functions of torch: an address of anything else would be called
        return self.number(name)

    def address(self, name: str) -> int | None:
        if self.random.random() < self.wrong * 2:
            return self.random.choice((None, 0))
        array = self.large if name == "tiles" else self.arrays[self.taken % len(self.arrays)]
        self.taken += 1
        start = ctypes.addressof(array)
        start += -start % 64 + 8 * self.random.randrange(4)
        ctypes.memmove(start, self.random.choice(self.contents), FILLED)
        return start

    def number(self, name: str) -> int:
        if name == "n_threads":
            return self.random.choice(
                (1, 1, 2, 3, -1 if self.lucky() else 1, 0 if self.lucky() else 2)
            )
        if name in ("seed", "step"):
            return self.random.choice((0, 1, 2**32, 2**63, 2**64 - 1))
        if self.lucky():
            return self.random.choice(NO_SIZES)
        if self.vast:
            return VAST
        if name.endswith("stride"):
            return self.random.choice((0, 1, MOST, self.random.randrange(40)))
        if name == "m" and self.random.random() < 0.2:
            return -1
        return self.random.choice((0, 1, 2, self.random.randrange(MOST + 1), MOST))


def main() -> int:
    parser = argparse.ArgumentParser(prog="bindings", description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--bytes", type=Path, nargs="+", default=[])
    parser.add_argument("--sanitized", action="store_true", help="no sizes beyond all memory")
    options = parser.parse_args()
    caller = Caller(load(options.module), vast=not options.sanitized)
    for path in options.bytes:
        caller.from_bytes(path.read_bytes(), show=True)
    if options.bytes:
        print(dict(caller.outcomes))
        return 0
    if options.only is not None:
        caller.example(options.seed, options.only, show=True)
        print(dict(caller.outcomes))
        return 0
    with open(Path(tempfile.gettempdir(), f"sslkernels-bindings-{os.getpid()}"), "w") as last:
        for number in range(options.examples):
            os.pwrite(last.fileno(), f"{number:12d}".encode(), 0)
            caller.example(options.seed, number)
    os.unlink(last.name)
    results = sum(n for what, n in caller.outcomes.items() if what.startswith("result"))
    reached = {what.split(" from ")[1] for what in caller.outcomes if what.startswith("result")}
    for what, n in sorted(caller.outcomes.items()):
        print(f"{n:8d}  {what}")
    print(
        f"{options.examples} calls, {results} with a result; results from {len(reached)} functions"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
