# SPDX-License-Identifier: Apache-2.0
"""Compile the tile kernels for a named architecture, without a device, and read what they use.

``compile_kernel`` builds the same specialisation that a launch with the same flags would build
(pointers and feature strides divisible by 16, unit feature stride) and parses the binary: registers,
stack and spill bytes, shared and tensor memory, tensor-core instructions, 64-bit divisions.
"""

from __future__ import annotations

import ast
import hashlib
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import (
    autoencoders,
    configs,
    features,
    kernels,
    kernels_backward,
    kernels_contrastive,
    kernels_rows,
    pairs,
    tiles,
    updates,
)
from .configs import Config, chunks, compiler_options, limits
from .variants import (
    DIVISIBLE,
    DIVISIONS,
    FLOAT32,
    INT32,
    INT64,
    OPERANDS,
    SMALL,
    VARIANTS,
    Types,
)

TRITON_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses on one architecture."""

    registers: int
    spill_bytes: int  # NVIDIA: stores + loads as ptxas counts them; AMD: scratch or 4 a register
    shared_bytes: int
    shared_limit: int
    tensor_memory: int  # columns of 512; 0 where the architecture has none
    tensor_core: str  # the instruction family found, or ""
    wide_divisions: int  # 64-bit divisions or remainders by a run-time value
    stores: bool = True  # whether it writes to global memory at all
    in_turn: bool = True  # whether it waits for the launches before it, where they may still run

    def problems(self, dtype: str, variant: str = "") -> list[str]:
        """The budget: reasons why this kernel must not ship, empty if it may."""
        found = []
        if self.spill_bytes:
            found.append(f"{self.spill_bytes} bytes spilled")
        if self.shared_bytes > self.shared_limit:
            found.append(f"shared memory {self.shared_bytes} > {self.shared_limit} bytes")
        if dtype != "float32" and not self.tensor_core and variant not in SMALL:
            found.append("no tensor-core instruction")
        if not self.stores:  # Triton 3.7.1 did that to a kernel with too many chunks
            found.append("writes nothing: compiled to a kernel without a body")
        if not self.in_turn:
            found.append("reads or writes before the launches before it have ended")
        if self.wide_divisions > DIVISIONS.get(variant, 0 if variant in SMALL else 4):
            found.append(f"{self.wide_divisions} 64-bit divisions")
        return found


def target_of(arch: str) -> GPUTarget:
    """Triton's target of an architecture such as "sm_90" or "gfx942"."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def source(
    fn: Any, dtype: str, D: int, constants: dict[str, Any], types: dict[str, Types] | None = None
) -> ASTSource:
    """What Triton compiles for a launch, without one.

    Args:
        fn: The kernel.
        dtype: Of the operands.
        D: Features.
        constants: Compile-time arguments by name.
        types: Types of arguments whose names do not say them.
    """
    signature: dict[str, Types] = {}
    constexprs: dict[tuple[int], Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    # As a launch would: see ``tiles.kernel``.
    unaligned = {p.name for p in fn.params if p.do_not_specialize_on_alignment}
    for position, name in enumerate(fn.arg_names):
        given = None if types is None else types.get(name)
        if isinstance(given, tuple):
            # A tuple is specialised member by member, whatever the kernel asks for.
            signature[name] = tuple(t.replace("T", TRITON_DTYPES[dtype]) for t in given)
            attrs |= {(position, i): [["tt.divisibility", 16]] for i in range(len(given))}
            continue
        if given is not None:
            kind = given.replace("T", TRITON_DTYPES[dtype])
        elif name in constants:
            kind = "constexpr"
            constexprs[(position,)] = constants[name]
        elif name == "eps":
            kind = "fp32"
        elif name in OPERANDS:
            kind = "*" + TRITON_DTYPES[dtype]
        elif name in FLOAT32:
            kind = "*fp32" if name.endswith("_ptr") else "fp32"
        elif name in INT32:
            kind = "*i32"
        elif name in INT64:
            kind = "*i64"
        elif name in ("stride_xd", "stride_gd", "stride_d"):
            kind = "constexpr"
            constexprs[(position,)] = 1
        else:
            kind = "i32"
        signature[name] = kind
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            divisible = name not in unaligned
        else:
            aligned = name in DIVISIBLE or (name == "D" and D % 16 == 0)
            divisible = aligned and not fn.params[position].do_not_specialize
        if divisible:
            attrs[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn, signature, constexprs=constexprs, attrs=attrs)


def compile_kernel(
    variant: str,
    arch: str,
    dtype: str,
    D: int,
    config: Config,
    precision: str = "ieee",
) -> tuple[Usage, Any]:
    """Compile one variant for one architecture.

    Args:
        variant: a key of ``VARIANTS``.
        arch: "sm_80", "sm_90", "sm_100", "gfx942" or another one that Triton knows.
        dtype: "float32", "bfloat16" or "float16".
        D: feature dimension, 1 to 1024.
        config: tile sizes and launch options.
        precision: ``input_precision`` of the dot products.

    Returns:
        The usage and Triton's compiled kernel (its ``asm`` dict has every stage).
    """
    fn, _, flags = VARIANTS[variant]
    D = configs.packed_width(D, getattr(torch, dtype))
    block_d, num_d = chunks(config, D)
    constants: dict[str, Any] = {
        **flags,
        "HAS_LIFT": dtype == "float16",
        "ONLINE": dtype == "float16",
        "STRIDE_X": D,
        "STRIDE_Y": D,
        "D": D,
        "HOLD_X": config.hold_x,
        "PREFETCH": config.prefetch,
        "FOLD": configs.folds(arch),
        "PRECISION": precision,
        "NUM_D": num_d if config.hold_x else 1,
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "BLOCK_D": block_d,
    }
    target = target_of(arch)
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **compiler_options(arch),
    }
    compiled = triton.compile(source(fn, dtype, D, constants), target=target, options=options)
    return usage_of(compiled, arch), compiled


def compile_small(
    name: str, arch: str, dtype: str, other_types: dict[str, Types] | None = None
) -> tuple[Usage, Any]:
    """Compile one of ``SMALL``.

    Args:
        name: A key of ``SMALL``.
        arch: As in ``compile_kernel``.
        dtype: That of its operands, and of EMA's targets.
        other_types: Types of arguments that differ from those of ``SMALL``, like "*bf16".

    Returns:
        As ``compile_kernel``.
    """
    fn, constants, types = SMALL[name]
    types = {**types, **(other_types or {})}
    constants = {
        k: getattr(triton.language, dtype) if v == "T" else v for k, v in constants.items()
    }
    target = target_of(arch)
    options = {"num_warps": constants.pop("num_warps", 4), **compiler_options(arch)}
    made = source(fn, dtype, 128, constants, types)
    compiled = triton.compile(made, target=target, options=options)
    return usage_of(compiled, arch), compiled


def _wide_divisions(llir: str) -> int:
    """64-bit divisions whose divisor is a run-time value (a constant becomes shifts)."""
    return len(re.findall(r"\b[su](?:div|rem) (?:exact )?i64 [^,]+, %", llir))


def _run(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


_GLOBAL = re.compile(r"\b(?:(?:ld|st|atom|red)\.[\w.:]*global|cp\.(?:async|reduce))")


def waits_first(ptx: str) -> bool:
    """Whether griddepcontrol.wait stands before everything that reads or writes global memory."""
    wait, access = ptx.find("griddepcontrol.wait"), _GLOBAL.search(ptx)
    return wait >= 0 and (access is None or wait < access.start())


def usage_of(compiled: Any, arch: str) -> Usage:
    """What a compiled kernel takes of a device."""
    if target_of(arch).backend == "cuda":
        return _nvidia_usage(compiled, arch)
    return _amd_usage(compiled, arch)


def _nvidia_usage(compiled: Any, arch: str) -> Usage:
    nvidia = triton.knobs.nvidia
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = _run(nvidia.cuobjdump.path, "-res-usage", str(cubin))
        found = re.search(r"REG:(\d+) STACK:(\d+) ", text)
        if found is None:
            raise RuntimeError(f"aot: cuobjdump printed no resource usage for {arch}: {text!r}")
        spilled = 0
        if int(found[2]):
            # A stack frame may hold spills or variables; only ptxas says which.
            source = Path(folder) / "kernel.ptx"
            source.write_text(ptx)
            number = int(arch[3:])
            # Before 3.6 Triton had one assembler for all.
            blackwell = getattr(nvidia, "ptxas_blackwell", nvidia.ptxas)
            tool = nvidia.ptxas if number < 90 else blackwell
            name = arch if number < 90 else arch + "a"
            text = _run(
                tool.path, "-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={name}",
                str(source), "-o", str(cubin),
            )  # fmt: skip
            spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
    families = [w for w in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if w in ptx]
    return Usage(
        registers=int(found[1]),
        spill_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        shared_limit=limits(arch).shared_bytes,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        tensor_core="+".join(w.split(".")[0] for w in families),
        wide_divisions=_wide_divisions(compiled.asm["llir"]),
        stores="st.global" in ptx,
        in_turn=not compiled.metadata.launch_pdl or waits_first(ptx),
    )


def _amd_usage(compiled: Any, arch: str) -> Usage:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        if found is None:
            raise RuntimeError(f"aot: the assembly for {arch} has no .{key}")
        return int(found[1])

    scratch = number("private_segment_fixed_size")
    spilled = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    return Usage(
        registers=number("vgpr_count"),
        spill_bytes=max(scratch, spilled),
        shared_bytes=compiled.metadata.shared,
        shared_limit=limits(arch).shared_bytes,
        tensor_memory=0,
        tensor_core="mfma" if "v_mfma" in text else ("wmma" if "v_wmma" in text else ""),
        wide_divisions=_wide_divisions(compiled.asm["llir"]),
        stores=re.search(r"\b(global|buffer)_store", text) is not None,
    )


# ---- the grid ------------------------------------------------------------------------------------

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
REPORTED = ("sm_90",)  # docs/gpu.md has their figures; tests hold all of them to the budgets
DIMS = (64, 128, 256, 512, 1024)
# A sample of the rest: read as they are in rows of whole 8 (100) and 16 bytes (200).  Beyond 256, and in
# float32, operands are filled up to whole chunks.
RAGGED = (100, 200)


@dataclass(frozen=True)
class Case:
    """One kernel to compile, with the configuration a launch would choose (None: one of ``SMALL``)."""

    variant: str
    arch: str
    dtype: str
    D: int
    config: Config | None


def cases(
    archs: Iterable[str] = ARCHS,
    dims: Iterable[int] = DIMS,
    dtypes: Iterable[str] = tuple(TRITON_DTYPES),
    variants: Iterable[str] = tuple(VARIANTS),
) -> list[Case]:
    """Every kernel that a launch could choose; panels only where the fused kernels do not fit."""
    found = []
    dims, dtypes, variants = tuple(dims), tuple(dtypes), tuple(variants)
    for arch in archs:
        for dtype in dtypes:
            torch_dtype = getattr(torch, dtype)
            for D in dims:
                fused = configs.lookup("fused", arch, D, torch_dtype) is not None
                for variant in variants:
                    table = VARIANTS[variant][1]
                    config = configs.lookup(table, arch, D, torch_dtype)
                    if config is not None and not (fused and table in ("panel", "product")):
                        found.append(Case(variant, arch, dtype, D, config))
    return found


def grid(archs: Iterable[str] = REPORTED) -> list[Case]:
    """What ``make gpu-report`` compiles: every kernel in bfloat16, the other dtypes where their code differs.

    Halves stream beyond D = 768 and float32 beyond D = 64, with the same code for every D.
    """
    found = []
    for arch in archs:
        found += cases((arch,), DIMS[1:], ("bfloat16",))
        found += cases((arch,), RAGGED[1:], ("float16",))
        found += cases((arch,), DIMS[1:2], ("float32",))
        found += small_cases((arch,), ("bfloat16",))
    return found


def small_cases(
    archs: Iterable[str] = ARCHS, dtypes: Iterable[str] = tuple(TRITON_DTYPES)
) -> list[Case]:
    """The kernels around the tiles; those that know no dtype once."""
    typed = [name for name, (*_, types) in SMALL.items() if "*T" in types.values()] + ["EMA"]
    dtypes = tuple(dtypes)
    return [
        Case(name, arch, dtype, 0, None)
        for arch in archs
        for name in SMALL
        for dtype in (dtypes if name in typed else dtypes[:1])
    ]


@dataclass(frozen=True)
class Result:
    """What compiling a case gave."""

    case: Case
    usage: Usage | None
    problems: tuple[str, ...]
    seconds: float


def compile_case(case: Case) -> Result:
    """Compile one case; a failure of the compiler is a problem like any other."""
    begin = time.perf_counter()
    try:
        if case.config is None:
            usage, _ = compile_small(case.variant, case.arch, case.dtype)
        else:
            usage, _ = compile_kernel(case.variant, case.arch, case.dtype, case.D, case.config)
    except Exception as error:  # every way of failing belongs into the table
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Result(case, None, (reason,), time.perf_counter() - begin)
    problems = tuple(usage.problems(case.dtype, case.variant))
    return Result(case, usage, problems, time.perf_counter() - begin)


def compile_cases(
    todo: list[Case], jobs: int = 2, progress: Callable[[Result], None] | None = None
) -> list[Result]:
    """Compile cases in several processes, in order."""
    results = []
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for result in pool.imap(compile_case, todo, chunksize=4):
            if progress is not None:
                progress(result)
            results.append(result)
    return results


def fingerprint() -> str:
    """Changes when the code of a tile kernel or an entry of the configuration table does."""
    digest = hashlib.sha256()
    modules = (
        tiles, pairs, kernels, kernels_backward, kernels_contrastive, kernels_rows, updates,
        autoencoders, features,
    )  # fmt: skip
    for module in modules:
        tree = ast.parse(Path(module.__file__ or "").read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator).startswith(("triton.jit", "kernel"))
                for decorator in node.decorator_list
            ):
                if ast.get_docstring(node):
                    node.body = node.body[1:]
            elif not isinstance(node, ast.Assign):  # constants that kernels use
                continue  # imports, and launchers, of which nothing is compiled
            digest.update(ast.dump(node).encode())
    digest.update(repr(sorted(configs.TABLE.items(), key=repr)).encode())
    return digest.hexdigest()[:16]
