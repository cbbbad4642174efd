# SPDX-License-Identifier: Apache-2.0
"""Who is measured: a table op -> {provider: factory}.

A factory takes a case and its inputs and returns a :class:`Contender`, or raises :class:`Missing`
with the reason; the reason is part of the results.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels
from benchmarks import generative, gpu_contenders
from benchmarks.cases import DECAY, LOGIT_BIAS, LOGIT_SCALE, LOSSES, Case
from benchmarks.contender import (
    Contender,
    Factory,
    Inputs,
    Missing,
    import_module,
    load_lightly,
    loss_contender,
)
from sslkernels import reference

OURS = "sslkernels"


# ------------------------------------------------------------------------------------ losses


def _library_call(case: Case, library: Any, x: Inputs) -> Callable[..., Tensor]:
    """The function of ``sslkernels`` or of ``sslkernels.reference`` with the case's arguments."""
    op = case.op
    if op in generative.OPS:
        return generative.library_call(op, library, x)
    if op == "nt_xent":
        return lambda z1, z2: library.nt_xent_loss(z1, z2, case.temperature)
    if op == "moco":
        key, queue = x["key"], x["queue"]

        def moco(query: Tensor) -> Tensor:
            q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
            return library.info_nce_loss(q, k, queue, case.temperature, normalize=False)

        return moco
    if op == "info_nce":
        return lambda query, key: library.info_nce_loss(query, key, temperature=case.temperature)
    if op == "clip":
        return lambda a, b: library.clip_loss(a, b, LOGIT_SCALE)
    if op == "siglip":
        return lambda a, b: library.siglip_loss(a, b, LOGIT_SCALE, LOGIT_BIAS)
    labels = x["labels"]
    if op == "sup_con":
        return lambda z: library.sup_con_loss(z, labels, case.temperature)
    return lambda z: library.triplet_loss(z, labels, normalize=True)


def _ours(case: Case, x: Inputs) -> Contender:
    return loss_contender(x, _library_call(case, sslkernels, x))


def _chunked(case: Case, x: Inputs) -> Contender:
    call = _library_call(case, sslkernels, x)

    def chunked(*leaves: Tensor) -> Tensor:
        with sslkernels.backend("chunked"):
            return call(*leaves)

    return loss_contender(x, chunked)


def _eager(case: Case, x: Inputs) -> Contender:
    return loss_contender(x, _library_call(case, reference, x))


def _compiled(case: Case, x: Inputs) -> Contender:
    torch._dynamo.reset()
    call = torch.compile(_library_call(case, reference, x), dynamic=False)
    return loss_contender(x, call)


def _ours_bfloat16(case: Case, x: Inputs) -> Contender:
    if case.dtype == "float64":
        raise Missing("products in bfloat16 are for float32 and 16-bit inputs")
    if case.device == "cpu" and not importlib.import_module("sslkernels._C").has_bf16():
        raise Missing("the processor, or the instruction set in use, lacks AVX512-BF16")
    loss: Any = sslkernels.nt_xent_loss
    return loss_contender(
        x, lambda a, b: loss(a, b, case.temperature, compute_dtype=torch.bfloat16), tolerance=2e-2
    )


def _lightly_nt_xent(case: Case, x: Inputs) -> Contender:
    return loss_contender(x, load_lightly("lightly.loss.ntx_ent_loss").NTXentLoss(case.temperature))


def _pml_nt_xent(case: Case, x: Inputs) -> Contender:
    if case.size > 512:
        raise Missing("memory grows with N^3: 34 GB for one tensor at N = 2048; run to N = 512")
    loss = import_module("pytorch_metric_learning.losses").NTXentLoss(case.temperature)
    labels = torch.arange(case.size // 2, device=case.device).repeat(2)
    return loss_contender(x, lambda z1, z2: loss(torch.cat((z1, z2)), labels))


def _pml_sup_con(case: Case, x: Inputs) -> Contender:
    loss = import_module("pytorch_metric_learning.losses").SupConLoss(case.temperature)
    return loss_contender(x, lambda z: loss(z, x["labels"]))


def _info_nce_pytorch(case: Case, x: Inputs) -> Contender:
    info_nce = import_module("info_nce").info_nce
    key, queue = x["key"], x["queue"]
    return loss_contender(
        x, lambda query: info_nce(query, key, queue, temperature=case.temperature)
    )


def _info_nce_pytorch_in_batch(case: Case, x: Inputs) -> Contender:
    info_nce = import_module("info_nce").info_nce
    return loss_contender(x, lambda query, key: info_nce(query, key, temperature=case.temperature))


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
        return one_way(F.normalize(a, dim=1) / case.temperature, F.normalize(b, dim=1))

    return loss_contender(x, call)


def _cached_mnrl(case: Case, x: Inputs) -> Contender:
    """sentence-transformers' cached loss from embeddings on: blocks of rows, each with its backward."""
    module = import_module("sentence_transformers.sentence_transformer.losses")
    loss_fn = module.CachedMultipleNegativesRankingLoss(
        torch.nn.Sequential(torch.nn.Identity()), scale=1 / case.temperature, mini_batch_size=256
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
    loss = import_module("monai.losses").ContrastiveLoss(temperature=case.temperature)
    return loss_contender(x, lambda z1, z2: loss(z1, z2))


def _open_clip(case: Case, x: Inputs) -> Contender:
    module = import_module("open_clip.loss")
    scale = torch.tensor(LOGIT_SCALE, device=case.device)
    if case.op == "clip":
        clip = module.ClipLoss()
        return loss_contender(x, lambda a, b: clip(a, b, scale))
    siglip, bias = module.SigLipLoss(), torch.tensor(LOGIT_BIAS, device=case.device)
    return loss_contender(x, lambda a, b: siglip(a, b, scale, bias))


def _moco_official(case: Case, x: Inputs) -> Contender:
    """The layout of the MoCo paper's code: queue [D, K], cloned at every step, logits joined."""
    key, stored = x["key"], x["queue"].T.contiguous()
    target = torch.zeros(case.batch, dtype=torch.int64, device=case.device)

    def call(query: Tensor) -> Tensor:
        q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
        own = (q * k).sum(1, keepdim=True)
        logits = torch.cat((own, q @ stored.clone().detach()), dim=1)
        return F.cross_entropy(logits / case.temperature, target)

    return loss_contender(x, call)


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

    return Contender(lambda: run(timed), results, None, leaves, lambda: timed(*leaves))


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
        call = _library_call(case, sslkernels, x)

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
}
CONTENDERS["siglip"] |= {"open_clip": _open_clip}
CONTENDERS["sup_con"] |= {"pytorch-metric-learning": _pml_sup_con}
for _op, _table in gpu_contenders.CONTENDERS.items():
    CONTENDERS[_op] |= _table
for _op in ("vae", "vae_step", "features", "adversarial"):
    CONTENDERS[_op] |= {"torch.nn.functional": _in_torch(generative.functional_call)}
CONTENDERS["vae"] |= {
    "torch.distributions": _in_torch(lambda op, x, noise=None: generative.distributions_call(x))
}
