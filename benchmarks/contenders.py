# SPDX-License-Identifier: Apache-2.0
"""Who is measured: a table op -> {provider: factory}.

A factory takes a case and its inputs and returns a :class:`Contender`, or raises :class:`Missing`
with the reason; the reason is part of the results.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels
from benchmarks import generative
from benchmarks.cases import DECAY, LOGIT_BIAS, LOGIT_SCALE, LOSSES, TEMPERATURE, Case
from sslkernels import reference

OURS = "sslkernels"
Inputs = dict[str, Any]


class Missing(Exception):
    """A contender can't run here or at this shape; the text says why."""


@dataclass
class Contender:
    """``step`` is what is timed; ``results`` runs it once and returns what ``Case.truth`` does."""

    step: Callable[[], object]
    results: Callable[[], list[Tensor]]
    tolerance: float | None = None  # relative error; None: that of the inputs' dtype
    leaves: list[Tensor] = field(default_factory=list)  # whose .grad a step leaves behind


Factory = Callable[[Case, Inputs], Contender]


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"import {module}: {error}") from None


def load_lightly(module: str) -> Any:
    """A module of lightly, also where torchvision is not installed.

    lightly's packages import torchvision for other models and losses.  Without it the file of the
    wanted module is executed as it is, around the ``__init__`` files of its packages; of
    ``lightly.models.utils`` it needs only a gather across processes, which a benchmark in one
    process never calls.
    """
    if importlib.util.find_spec("torchvision") is not None or "lightly" in sys.modules:
        return _import(module)
    spec = importlib.util.find_spec("lightly")
    if spec is None or not spec.submodule_search_locations:
        raise Missing("import lightly: it is not installed")
    root = Path(next(iter(spec.submodule_search_locations)))
    for name in ("lightly", "lightly.loss", "lightly.models", "lightly.models.modules"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules.setdefault(name, package)
    utils = types.ModuleType("lightly.models.utils")
    sys.modules.setdefault(utils.__name__, utils)
    sys.modules["lightly.models"].__dict__["utils"] = sys.modules[utils.__name__]
    return _import(module)


# ------------------------------------------------------------------------------------ losses


def _loss(x: Inputs, call: Callable[..., Tensor], tolerance: float | None = None) -> Contender:
    leaves: list[Tensor] = x["leaves"]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss = call(*leaves)
        loss.backward()
        return loss

    def results() -> list[Tensor]:
        loss = step().detach().clone()
        return [loss, *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)]

    return Contender(step, results, tolerance, leaves)


def _library_call(op: str, library: Any, x: Inputs) -> Callable[..., Tensor]:
    """The function of ``sslkernels`` or of ``sslkernels.reference`` with the case's arguments."""
    if op in generative.OPS:
        return generative.library_call(op, library, x)
    if op == "nt_xent":
        return lambda z1, z2: library.nt_xent_loss(z1, z2, TEMPERATURE)
    if op == "moco":
        key, queue = x["key"], x["queue"]

        def moco(query: Tensor) -> Tensor:
            q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
            return library.info_nce_loss(q, k, queue, TEMPERATURE, normalize=False)

        return moco
    if op == "info_nce":
        return lambda query, key: library.info_nce_loss(query, key, temperature=TEMPERATURE)
    if op == "clip":
        return lambda a, b: library.clip_loss(a, b, LOGIT_SCALE)
    if op == "siglip":
        return lambda a, b: library.siglip_loss(a, b, LOGIT_SCALE, LOGIT_BIAS)
    labels = x["labels"]
    if op == "sup_con":
        return lambda z: library.sup_con_loss(z, labels, TEMPERATURE)
    return lambda z: library.triplet_loss(z, labels, normalize=True)


def _ours(case: Case, x: Inputs) -> Contender:
    return _loss(x, _library_call(case.op, sslkernels, x))


def _chunked(case: Case, x: Inputs) -> Contender:
    call = _library_call(case.op, sslkernels, x)

    def chunked(*leaves: Tensor) -> Tensor:
        with sslkernels.backend("chunked"):
            return call(*leaves)

    return _loss(x, chunked)


def _eager(case: Case, x: Inputs) -> Contender:
    return _loss(x, _library_call(case.op, reference, x))


def _compiled(case: Case, x: Inputs) -> Contender:
    torch._dynamo.reset()
    call = torch.compile(_library_call(case.op, reference, x), dynamic=False)
    return _loss(x, call)


def _ours_bfloat16(case: Case, x: Inputs) -> Contender:
    if case.dtype == "float64":
        raise Missing("products in bfloat16 are for float32 and 16-bit inputs")
    if case.device == "cpu" and not importlib.import_module("sslkernels._C").has_bf16():
        raise Missing("the processor, or the instruction set in use, lacks AVX512-BF16")
    loss: Any = sslkernels.nt_xent_loss
    return _loss(
        x, lambda a, b: loss(a, b, TEMPERATURE, compute_dtype=torch.bfloat16), tolerance=2e-2
    )


def _lightly_nt_xent(case: Case, x: Inputs) -> Contender:
    return _loss(x, load_lightly("lightly.loss.ntx_ent_loss").NTXentLoss(TEMPERATURE))


def _pml_nt_xent(case: Case, x: Inputs) -> Contender:
    if case.size > 512:
        raise Missing("memory grows with N^3: 34 GB for one tensor at N = 2048; run to N = 512")
    loss = _import("pytorch_metric_learning.losses").NTXentLoss(TEMPERATURE)
    labels = torch.arange(case.size // 2, device=case.device).repeat(2)
    return _loss(x, lambda z1, z2: loss(torch.cat((z1, z2)), labels))


def _pml_sup_con(case: Case, x: Inputs) -> Contender:
    loss = _import("pytorch_metric_learning.losses").SupConLoss(TEMPERATURE)
    return _loss(x, lambda z: loss(z, x["labels"]))


def _info_nce_pytorch(case: Case, x: Inputs) -> Contender:
    info_nce = _import("info_nce").info_nce
    key, queue = x["key"], x["queue"]
    return _loss(x, lambda query: info_nce(query, key, queue, temperature=TEMPERATURE))


def _info_nce_pytorch_in_batch(case: Case, x: Inputs) -> Contender:
    info_nce = _import("info_nce").info_nce
    return _loss(x, lambda query, key: info_nce(query, key, temperature=TEMPERATURE))


def _linear_cross_entropy(case: Case, x: Inputs) -> Contender:
    """``F.linear_cross_entropy`` in chunks: the other side is the weight, the pair the class.

    It normalises nothing and has one direction: clip calls it twice.
    """
    if not hasattr(F, "linear_cross_entropy"):
        raise Missing("torch.nn.functional.linear_cross_entropy came with torch 2.13")
    target = torch.arange(case.size, device=case.device)
    options: Any = torch.nn.LinearCrossEntropyOptions()

    def one_way(a: Tensor, b: Tensor) -> Tensor:
        loss: Tensor = F.linear_cross_entropy(a, b, target, options=options)
        return loss

    def call(a: Tensor, b: Tensor) -> Tensor:
        if case.op == "clip":
            return (one_way(LOGIT_SCALE * a, b) + one_way(LOGIT_SCALE * b, a)) / 2
        return one_way(F.normalize(a, dim=1) / TEMPERATURE, F.normalize(b, dim=1))

    return _loss(x, call)


def _cached_mnrl(case: Case, x: Inputs) -> Contender:
    """sentence-transformers' cached loss from embeddings on: blocks of rows, each with its backward."""
    module = _import("sentence_transformers.sentence_transformer.losses")
    loss_fn = module.CachedMultipleNegativesRankingLoss(
        torch.nn.Sequential(torch.nn.Identity()), scale=1 / TEMPERATURE, mini_batch_size=256
    )
    leaves: list[Tensor] = x["leaves"]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss: Tensor = loss_fn.calculate_loss([[leaf] for leaf in leaves], with_backward=True)
        return loss

    def results() -> list[Tensor]:
        loss = step().detach().clone()
        return [loss, *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)]

    return Contender(step, results, None, leaves)


def _monai(case: Case, x: Inputs) -> Contender:
    if case.size > 1024:
        raise Missing(
            "it forms N x N x D products: 2 GB for one tensor at N = 2048; run to N = 1024"
        )
    loss = _import("monai.losses").ContrastiveLoss(temperature=TEMPERATURE)
    return _loss(x, lambda z1, z2: loss(z1, z2))


def _open_clip(case: Case, x: Inputs) -> Contender:
    module = _import("open_clip.loss")
    scale = torch.tensor(LOGIT_SCALE, device=case.device)
    if case.op == "clip":
        clip = module.ClipLoss()
        return _loss(x, lambda a, b: clip(a, b, scale))
    siglip, bias = module.SigLipLoss(), torch.tensor(LOGIT_BIAS, device=case.device)
    return _loss(x, lambda a, b: siglip(a, b, scale, bias))


def _moco_official(case: Case, x: Inputs) -> Contender:
    """The layout of the MoCo paper's code: queue [D, K], cloned at every step, logits joined."""
    key, stored = x["key"], x["queue"].T.contiguous()
    target = torch.zeros(case.batch, dtype=torch.int64, device=case.device)

    def call(query: Tensor) -> Tensor:
        q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
        own = (q * k).sum(1, keepdim=True)
        logits = torch.cat((own, q @ stored.clone().detach()), dim=1)
        return F.cross_entropy(logits / TEMPERATURE, target)

    return _loss(x, call)


# -------------------------------------------------------------------------------- generative


def _generative(x: Inputs, timed: generative.Call, checked: generative.Call) -> Contender:
    """checked: the same with our noise, where ``timed`` draws another at every step."""
    leaves: list[Tensor] = x["leaves"]

    def run(call: generative.Call) -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        out = call(*leaves)
        out.backward(x.get("dz"))
        return out

    def results() -> list[Tensor]:
        out = run(checked).detach().clone()
        return [out, *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)]

    return Contender(lambda: run(timed), results, None, leaves)


def _in_torch(write: Callable[..., generative.Call], compiled: bool = False) -> Factory:
    """A formula of ``generative``."""

    def factory(case: Case, x: Inputs) -> Contender:
        timed, checked = write(case.op, x), write(case.op, x, x.get("noise"))
        if compiled:
            torch._dynamo.reset()
            timed = torch.compile(timed, dynamic=False)
            if "noise" not in x:
                checked = timed
        return _generative(x, timed, checked)

    return factory


def _library_generative(backend: str | None = None) -> Factory:
    def factory(case: Case, x: Inputs) -> Contender:
        call = _library_call(case.op, sslkernels, x)

        def here(*leaves: Tensor) -> Tensor:
            with sslkernels.backend(backend):
                return call(*leaves)

        own = call if backend is None else here
        return _generative(x, own, own)

    return factory


# ----------------------------------------------------------------------------------- updates


def _enqueue(case: Case, step: Callable[[], object], written: Callable[[], Tensor]) -> Contender:
    """written: the rows [batch, D] of the newest batch after the first step."""

    def results() -> list[Tensor]:
        step()
        return [written()]

    return Contender(step, results)


def _fits(case: Case) -> None:
    if case.size % case.batch:
        raise Missing("the layout of this code needs a queue size that the batch divides")


def _enqueue_ours(case: Case, x: Inputs) -> Contender:
    queue = sslkernels.KeyQueue(case.size, case.dim, dtype=x["keys"].dtype).to(case.device)
    return _enqueue(
        case, lambda: queue.enqueue(x["keys"]), lambda: queue.queue[: case.batch].clone()
    )


def _enqueue_chunked(case: Case, x: Inputs) -> Contender:
    queue = sslkernels.KeyQueue(case.size, case.dim, dtype=x["keys"].dtype).to(case.device)

    def step() -> None:
        with sslkernels.backend("chunked"):
            queue.enqueue(x["keys"])

    return _enqueue(case, step, lambda: queue.queue[: case.batch].clone())


def _enqueue_columns(case: Case, x: Inputs) -> Contender:
    """MoCo paper's layout: the queue is [D, K] and the pointer a tensor that is read as an int."""
    _fits(case)
    queue = torch.zeros(case.dim, case.size, dtype=x["keys"].dtype, device=case.device)
    pointer = torch.zeros(1, dtype=torch.int64, device=case.device)

    @torch.no_grad()
    def step() -> None:
        at = int(pointer)
        queue[:, at : at + case.batch] = F.normalize(x["keys"], dim=1).T
        pointer[0] = (at + case.batch) % case.size

    return _enqueue(case, step, lambda: queue[:, : case.batch].T.clone())


def _enqueue_rows(case: Case, x: Inputs) -> Contender:
    _fits(case)
    queue = torch.zeros(case.size, case.dim, dtype=x["keys"].dtype, device=case.device)
    at = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal at
        queue[at : at + case.batch] = F.normalize(x["keys"], dim=1)
        at = (at + case.batch) % case.size

    return _enqueue(case, step, lambda: queue[: case.batch].clone())


def _enqueue_lightly(case: Case, x: Inputs) -> Contender:
    module = load_lightly("lightly.models.modules.memory_bank")
    bank = module.MemoryBankModule(size=(case.size, case.dim)).to(case.device)

    def step() -> None:
        bank(F.normalize(x["keys"], dim=1), update=True)

    return _enqueue(case, step, lambda: bank.bank[: case.batch].clone())


def _ema(x: Inputs, update: Callable[[list[Tensor], list[Tensor]], object]) -> Contender:
    targets: list[Tensor] = x["targets"]

    @torch.no_grad()
    def step() -> None:
        update(targets, x["sources"])

    def results() -> list[Tensor]:
        before = [t.clone() for t in targets]
        step()
        after = [t.clone() for t in targets]
        for target, old in zip(targets, before, strict=True):
            target.data.copy_(old)
        return after

    return Contender(step, results)


def _ema_chunked(case: Case, x: Inputs) -> Contender:
    def update(targets: list[Tensor], sources: list[Tensor]) -> None:
        with sslkernels.backend("chunked"):
            sslkernels.ema_update_(targets, sources, DECAY)

    return _ema(x, update)


def _network(tensors: list[Tensor]) -> torch.nn.Module:
    """A module with one layer a tensor, as deep in Python as a network of that many layers."""
    layers = []
    for tensor in tensors:
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(tensor, requires_grad=False)
        layers.append(layer)
    return torch.nn.ModuleList(layers)


def _ema_module(case: Case, x: Inputs) -> Contender:
    online = _network(x["sources"])
    ema = sslkernels.EMA(_network(x["targets"]), DECAY)
    own = {**x, "targets": [p.data for p in ema.module.parameters()]}
    return _ema(own, lambda targets, sources: ema.update(online))


def _ema_state_dict(case: Case, x: Inputs) -> Contender:
    """As timm's ModelEmaV3 does: both state dicts are walked at every step, then one foreach."""
    target, source = _network(x["targets"]), _network(x["sources"])

    def update(targets: list[Tensor], sources: list[Tensor]) -> None:
        pairs = zip(target.state_dict().values(), source.state_dict().values(), strict=True)
        ours, theirs = zip(*((a, b) for a, b in pairs if a.is_floating_point()), strict=True)
        torch._foreach_lerp_(list(ours), list(theirs), 1 - DECAY)

    return _ema(x, update)


def _ema_data_loop(case: Case, x: Inputs) -> Contender:
    """The loop of the MoCo paper's code: three passes, and a new tensor for every parameter."""
    target, source = _network(x["targets"]), _network(x["sources"])
    parameters = list(target.parameters())

    def update(targets: list[Tensor], sources: list[Tensor]) -> None:
        for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
            ours.data = ours.data * DECAY + theirs.data * (1 - DECAY)

    contender = _ema(x, update)

    def results() -> list[Tensor]:
        before = [p.data for p in parameters]
        contender.step()
        after = [p.data for p in parameters]
        for parameter, old in zip(parameters, before, strict=True):
            parameter.data = old
        return after

    return Contender(contender.step, results)


def _ema_in_place_loop(case: Case, x: Inputs) -> Contender:
    def update(targets: list[Tensor], sources: list[Tensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            target.mul_(DECAY).add_(source, alpha=1 - DECAY)

    return _ema(x, update)


_COMMON: dict[str, Factory] = {
    OURS: _ours,
    "chunked": _chunked,
    "eager": _eager,
    "torch.compile": _compiled,
}


def _inf_cl(case: Case, x: Inputs) -> Contender:
    """Both directions of Inf-CL's kernel, as its users call it."""
    if case.device != "cuda":
        raise Missing("Inf-CL needs a GPU")
    module = _import("inf_cl")
    # Its head_dim has to be a power of two that divides D, or results are silently wrong.
    head_dim = math.gcd(case.dim, 256)
    if head_dim < 16:
        raise Missing(f"Inf-CL needs D to be a multiple of 16, got {case.dim}")
    leaves = x["leaves"]
    scale = torch.tensor(LOGIT_SCALE, device=leaves[0].device)

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        a, b = leaves
        there = module.cal_flash_loss(a, b, scale=scale, head_dim=head_dim)
        back = module.cal_flash_loss(b, a, scale=scale, head_dim=head_dim)
        loss = (there.mean() + back.mean()) / 2
        loss.backward()
        return loss

    def results() -> list[Tensor]:
        loss = step().detach().clone()
        return [loss, *(leaf.grad.clone() for leaf in leaves)]

    # It multiplies in TF32 whatever the dtype: the error is in the table, not a reason to leave it out.
    return Contender(step, results, 3e-2, leaves)


CONTENDERS: dict[str, dict[str, Factory]] = {
    **{op: dict(_COMMON) for op in LOSSES},
    **{
        op: {
            OURS: _library_generative(),
            "chunked": _library_generative("chunked"),
            "eager": _in_torch(generative.eager_call),
            "torch.compile": _in_torch(generative.eager_call, compiled=True),
        }
        for op in generative.OPS
    },
    "enqueue": {
        OURS: _enqueue_ours,
        "chunked": _enqueue_chunked,
        "MoCo [D, K]": _enqueue_columns,
        "torch [K, D]": _enqueue_rows,
        "lightly": _enqueue_lightly,
    },
    "ema": {
        OURS: lambda case, x: _ema(x, lambda t, s: sslkernels.ema_update_(t, s, DECAY)),
        "sslkernels EMA module": _ema_module,
        "chunked": _ema_chunked,
        "_foreach_lerp_": lambda case, x: _ema(
            x, lambda t, s: torch._foreach_lerp_(t, s, 1 - DECAY)
        ),
        "timm style": _ema_state_dict,
        "mul_ add_ loop": _ema_in_place_loop,
        "MoCo .data loop": _ema_data_loop,
    },
}
CONTENDERS["nt_xent"] |= {
    "sslkernels bf16": _ours_bfloat16,
    "lightly": _lightly_nt_xent,
    "pytorch-metric-learning": _pml_nt_xent,
    "MONAI": _monai,
}
CONTENDERS["moco"] |= {"MoCo [D, K]": _moco_official, "info-nce-pytorch": _info_nce_pytorch}
CONTENDERS["info_nce"] |= {
    "F.linear_cross_entropy": _linear_cross_entropy,
    "info-nce-pytorch": _info_nce_pytorch_in_batch,
    "sentence-transformers": _cached_mnrl,
}
CONTENDERS["clip"] |= {
    "F.linear_cross_entropy": _linear_cross_entropy,
    "open_clip": _open_clip,
    "inf_cl": _inf_cl,  # on GPUs
}
CONTENDERS["siglip"] |= {"open_clip": _open_clip}
CONTENDERS["sup_con"] |= {"pytorch-metric-learning": _pml_sup_con}
for _op in ("vae", "vae_step", "features", "adversarial"):
    CONTENDERS[_op] |= {"torch.nn.functional": _in_torch(generative.functional_call)}
CONTENDERS["vae"] |= {
    "torch.distributions": _in_torch(lambda op, x, noise=None: generative.distributions_call(x))
}
