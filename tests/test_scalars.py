# SPDX-License-Identifier: Apache-2.0
"""Numbers as people have them: NumPy's, ints for floats, tensors of shape [] or [1], arrays for tensors."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import check_loss
from loss_cases import CASES, Case, labels_for, views
from torch import Tensor, nn

import sslkernels as ssl
from sslkernels import metrics, reference

WITH_SCALARS = [c for c in CASES if any(x.ndim == 0 for x in c.make(4, 4))]
A, B, C, D = views(12, 6, 4)
LABELS = torch.arange(12) % 4
SAME = torch.arange(12) % 3 == 0


# ---------------------------------------------------------------------- tensors of shape [] and [1]


@pytest.mark.parametrize("case", WITH_SCALARS, ids=lambda c: c.name)
def test_one_element_is_as_good_as_none(on_engine: str, case: Case) -> None:
    """The same bits, and a gradient of the shape that was given."""
    results = []
    for shape in ((), (1,)):
        leaves = [x.reshape(shape) if x.ndim == 0 else x for x in case.make(9, 6)]
        leaves = [x.clone().requires_grad_() for x in leaves]
        loss = case.call(ssl, leaves)
        results.append((loss, torch.autograd.grad(loss.sum(), leaves)))
        assert all(g.shape == x.shape for g, x in zip(results[-1][1], leaves, strict=True))
    (loss, grads), (loss_1, grads_1) = results
    assert torch.equal(loss, loss_1)
    for g, g_1 in zip(grads, grads_1, strict=True):
        assert torch.equal(g.flatten(), g_1.flatten())


MARGINS: dict[str, Callable] = {
    **{
        f"triplet {mining} {distance} {reduction}": (
            lambda m, z, margin, mining=mining, distance=distance, reduction=reduction: (
                m.triplet_loss(
                    z,
                    labels_for(len(z)),
                    margin,
                    mining=mining,
                    distance=distance,
                    reduction=reduction,
                )
            )
        )
        for mining in ("hard", "semihard", "all")
        for distance in ("euclidean", "cosine")
        for reduction in ("mean", "sum", "mean_nonzero")
    },
    "margin relative": lambda m, z, margin: m.margin_loss(*z.tensor_split(4), margin),
    "margin floor": lambda m, z, margin: m.margin_loss(
        *z.tensor_split(4), margin, form="floor", eps=0.3
    ),
    "contrastive": lambda m, z, margin: m.contrastive_loss(
        *z.tensor_split(2), torch.arange(len(z) // 2) % 3 == 0, margin * 4
    ),
}


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("name", MARGINS)
def test_margin_as_a_tensor(name: str, shape: tuple[int, ...]) -> None:
    """Loss and gradients, that of the margin too, and the loss of the same number."""
    call = MARGINS[name]
    z, margin = views(24, 6)[0] / 2, torch.full(shape, 0.4)
    check_loss(
        lambda z, m: call(ssl, z, m),
        lambda z, m: call(reference, z, m),
        [z, margin],
        slack=5e-6,
        name=name,
    )
    torch.testing.assert_close(call(ssl, z, margin), call(ssl, z, 0.4))
    leaf = margin.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(ssl, z, leaf), leaf)
    assert gradient.shape == shape and gradient.abs() > 0


@pytest.mark.parametrize("name", MARGINS)
def test_forward_mode_of_a_margin(name: str) -> None:
    """The tangent of the margin is its gradient."""
    call = MARGINS[name]
    z, margin = views(24, 6)[0] / 2, torch.tensor([0.4])
    ours, truth = (
        torch.func.jvp(lambda x, m=m: call(m, z, x), (margin,), (torch.ones(1),))
        for m in (ssl, reference)
    )
    torch.testing.assert_close(ours, truth)
    assert ours[1].abs().max() > 0


def test_scalars_of_one_element_compile() -> None:
    """In a full graph."""
    torch.compiler.reset()
    scale = torch.tensor([2.0], requires_grad=True)

    def model(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        mined = ssl.triplet_loss(x, LABELS, s, mining="all")
        return ssl.nt_xent_loss(x, y, s) + ssl.siglip_loss(x, y, s, s) + mined

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(A, B, scale), scale)
    (expected,) = torch.autograd.grad(model(A, B, scale), scale)
    torch.testing.assert_close(got, expected)


# ------------------------------------------------------------------------------- numbers of any kind

# Every number of the public API: a callable of the number.  2 and 0.5 are exact in every type.
NUMBERS: dict[str, tuple[float, Callable]] = {
    "nt_xent temperature": (0.5, lambda x: ssl.nt_xent_loss(A, B, x)),
    "nt_xent views temperature": (0.5, lambda x: ssl.nt_xent_loss([A, B, C], temperature=x)),
    "info_nce temperature": (0.5, lambda x: ssl.info_nce_loss(A, B, C, x)),
    "clip scale": (2, lambda x: ssl.clip_loss(A, B, x)),
    "siglip scale": (2, lambda x: ssl.siglip_loss(A, B, x, 0.0)),
    "siglip bias": (2, lambda x: ssl.siglip_loss(A, B, 1.0, x)),
    "sup_con temperature": (0.5, lambda x: ssl.sup_con_loss(A, LABELS, x)),
    "dcl temperature": (0.5, lambda x: ssl.dcl_loss(A, B, x)),
    "dcl sigma": (0.5, lambda x: ssl.dcl_loss(A, B, sigma=x)),
    "triplet margin": (2, lambda x: ssl.triplet_loss(A, LABELS, x)),
    "triplet all margin": (2, lambda x: ssl.triplet_loss(A, LABELS, x, mining="all")),
    "margin margin": (2, lambda x: ssl.margin_loss(A, B, C, D, x)),
    "margin floor": (2, lambda x: ssl.margin_loss(A, B, C, D, x, form="floor")),
    "margin eps": (2, lambda x: ssl.margin_loss(A, B, C, D, form="floor", eps=x)),
    "contrastive margin": (2, lambda x: ssl.contrastive_loss(A, B, SAME, x)),
    "alignment alpha": (3, lambda x: ssl.alignment_loss(A, B, x)),
    "uniformity t": (3, lambda x: ssl.uniformity_loss(A, x)),
    "uniformity raw t": (0.5, lambda x: ssl.uniformity_loss(A, x, normalize=False)),
    "metrics alignment": (3, lambda x: metrics.alignment(A, B, x)),
    "metrics uniformity": (3, lambda x: metrics.uniformity(A, x)),
    "NTXentLoss": (0.5, lambda x: ssl.NTXentLoss(x)(A, B)),
    "InfoNCELoss": (0.5, lambda x: ssl.InfoNCELoss(x)(A, B)),
    "SupConLoss": (0.5, lambda x: ssl.SupConLoss(x)(A, LABELS)),
    "DCLLoss": (0.5, lambda x: ssl.DCLLoss(x, sigma=x)(A, B)),
    "TripletLoss": (2, lambda x: ssl.TripletLoss(x)(A, LABELS)),
    "ContrastiveLoss": (2, lambda x: ssl.ContrastiveLoss(x)(A, B, SAME)),
    "MoCoLoss": (0.5, lambda x: _moco(x)),
    "ema_update_ decay": (0.5, lambda x: _ema_update(x)),
    "EMA decay": (0.5, lambda x: _ema(x)),
    "EMA callable": (0.5, lambda x: _ema(lambda step: x)),
    "cosine_decay": (0.5, lambda x: torch.tensor(ssl.cosine_decay(x, 10, x)(3))),
}
INTEGERS: dict[str, tuple[int, Callable]] = {
    "KeyQueue": (6, lambda x: _filled(ssl.KeyQueue(x, x))),
    "MoCoLoss": (6, lambda x: _filled(ssl.MoCoLoss(x, x).queue)),
    "cached_step": (4, lambda x: _cached(x)),
    "accuracy": (2, lambda x: metrics.contrastive_accuracy(A, A + B, (x,))[0]),
    "cosine_decay": (10, lambda x: torch.tensor(ssl.cosine_decay(0.5, x)(4))),
    "ema_update_ seed": (7, lambda x: _ema_update(0.9, stochastic_rounding=True, seed=x, step=x)),
    "EMA step": (7, lambda x: _ema(lambda step: step / 10, step=x)),
}
FLAGS: dict[str, Callable] = {
    "nt_xent": lambda x: ssl.nt_xent_loss(A, B, normalize=x),
    "nt_xent views": lambda x: ssl.nt_xent_loss([A, B, C], normalize=x),
    "nt_xent metrics": lambda x: _first(ssl.nt_xent_loss(A, B, return_metrics=x), x),
    "info_nce": lambda x: ssl.info_nce_loss(A, B, C, normalize=x),
    "info_nce metrics": lambda x: _first(ssl.info_nce_loss(A, B, C, return_metrics=x), x),
    "clip": lambda x: ssl.clip_loss(A, B, 1.0, normalize=x),
    "clip metrics": lambda x: _first(ssl.clip_loss(A, B, 1.0, return_metrics=x), x),
    "siglip": lambda x: ssl.siglip_loss(A, B, 1.0, 0.0, normalize=x),
    "sup_con": lambda x: ssl.sup_con_loss(A, LABELS, normalize=x),
    "dcl": lambda x: ssl.dcl_loss(A, B, normalize=x),
    "triplet": lambda x: ssl.triplet_loss(A, LABELS, normalize=x),
    "alignment": lambda x: ssl.alignment_loss(A, B, normalize=x),
    "uniformity": lambda x: ssl.uniformity_loss(A, normalize=x),
    "accuracy": lambda x: metrics.contrastive_accuracy(A, B, normalize=x)[0],
    "feature_std": lambda x: metrics.feature_std(A, normalize=x),
    "effective_rank": lambda x: metrics.effective_rank(A + 3, center=x),
    "NTXentLoss": lambda x: ssl.NTXentLoss(normalize=x)(A, B),
    "KeyQueue": lambda x: _filled(ssl.KeyQueue(12, 6, normalize=x)),
    "KeyQueue labels": lambda x: ssl.KeyQueue(12, 6, labels=x).labels,
    "MoCoLoss": lambda x: _first(ssl.MoCoLoss(12, 6, return_metrics=x)(A, B), x),
    "ema_update_": lambda x: _ema_update(0.99, stochastic_rounding=x, seed=1),
}


def _first(result: Tensor | tuple, pair: bool) -> Tensor:
    assert isinstance(result, tuple) == bool(pair)
    return result[0] if isinstance(result, tuple) else result


def _moco(temperature: float) -> Tensor:
    loss = ssl.MoCoLoss(12, 6, temperature)
    loss.queue.enqueue(C)
    return loss(A, B)


def _filled(queue: ssl.KeyQueue) -> Tensor:
    assert type(queue.size) is int and type(queue.normalize) is bool
    queue.enqueue(A)
    return queue.keys


def _cached(micro_batch: int) -> Tensor:
    encoder = nn.Linear(6, 3, bias=False)
    nn.init.constant_(encoder.weight, 0.5)
    return ssl.cached_step(encoder, [A, B], ssl.nt_xent_loss, micro_batch)


def _ema_update(decay: float, **keywords) -> Tensor:
    target = A.bfloat16()
    ssl.ema_update_([target], [B], decay, **keywords)
    return target


def _ema(decay, step: int | None = None) -> Tensor:
    online = nn.Linear(3, 3)
    nn.init.constant_(online.weight, 1.0)
    ema = ssl.EMA(online, decay)
    nn.init.constant_(online.weight, 2.0)
    ema.update(online, step)
    assert type(ema.step) is int
    return ema.module.weight


def same(got: Tensor | None, expected: Tensor | None) -> bool:
    return got is expected if got is None or expected is None else torch.equal(got, expected)


FLOAT_KINDS = [np.float16, np.float32, np.float64, np.array, lambda x: np.array(x, np.float32)]
INTEGER_KINDS = [np.int8, np.int32, np.int64, np.uint8, np.array]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    """NumPy's floats and arrays of no dimension; whole numbers as ints; nothing else."""
    value, call = NUMBERS[name]
    expected = call(float(value))
    for kind in FLOAT_KINDS:
        assert same(call(kind(float(value))), expected), kind
    if value == int(value):
        for kind in (int, *INTEGER_KINDS):
            assert same(call(kind(value)), expected), kind
    for bad in ("0.1", True, np.True_, np.array([0.5]), np.array([0.5, 0.5]), [0.5], 1j):
        with pytest.raises(TypeError, match="must be a number"):
            call(bad)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    """NumPy's integers; no floats, no bools."""
    value, call = INTEGERS[name]
    expected = call(value)
    for kind in INTEGER_KINDS:
        assert same(call(kind(value)), expected), kind
    for bad in (2.0, np.float32(2), "2", True, np.True_, np.array([2])):
        with pytest.raises(TypeError, match="must be an integer"):
            call(bad)


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str) -> None:
    """NumPy's bools, which are not Python's."""
    call = FLAGS[name]
    for value in (True, False):
        assert same(call(np.bool_(value)), call(value))
        assert same(call(np.array(value)), call(value))
    for bad in ("yes", 1, None, np.array([True])):
        with pytest.raises(TypeError, match="must be True or False"):
            call(bad)


def test_numpy_numbers_compile() -> None:
    """A module has made a float of it; inside a graph it is an array, and the graph breaks there."""
    torch.compiler.reset()
    expected = ssl.nt_xent_loss(A, B, 0.5)
    loss = torch.compile(ssl.NTXentLoss(np.float32(0.5)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss(A, B), expected)
    broken = torch.compile(lambda x: ssl.nt_xent_loss(x, B, np.float32(0.5)), backend="aot_eager")
    torch.testing.assert_close(broken(A), expected)


# ------------------------------------------------------------------------------------ in modules

MODULES: dict[str, Callable] = {
    "NTXentLoss": lambda x: (ssl.NTXentLoss(x), (A, B)),
    "InfoNCELoss": lambda x: (ssl.InfoNCELoss(x), (A, B)),
    "SupConLoss": lambda x: (ssl.SupConLoss(x), (A, LABELS)),
    "DCLLoss": lambda x: (ssl.DCLLoss(x), (A, B)),
    "TripletLoss": lambda x: (ssl.TripletLoss(x), (A, LABELS)),
    "ContrastiveLoss": lambda x: (ssl.ContrastiveLoss(x), (A, B, SAME)),
    "MoCoLoss": lambda x: (ssl.MoCoLoss(12, 6, x), (A, B)),
}


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("learnt", [False, True], ids=["tensor", "parameter"])
@pytest.mark.parametrize("name", MODULES)
def test_a_tensor_belongs_to_its_module(name: str, learnt: bool, shape: tuple[int, ...]) -> None:
    """It moves, is saved and loaded, copied and pickled; a number leaves no trace."""
    tensor = torch.full(shape, 0.5)
    module, inputs = MODULES[name](nn.Parameter(tensor) if learnt else tensor)
    entry = "margin" if name in ("TripletLoss", "ContrastiveLoss") else "temperature"
    assert [n for n, _ in module.named_parameters()] == ([entry] if learnt else [])
    module.eval()  # a queue stays as it is
    expected = module(*inputs)
    assert torch.equal(expected, MODULES[name](0.5)[0].eval()(*inputs))
    assert entry in repr(module)

    state = module.state_dict()
    assert torch.equal(state[entry], tensor)
    other, _ = MODULES[name](torch.full(shape, 0.9))
    other.load_state_dict(state)
    assert torch.equal(other.eval()(*inputs), expected)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(*inputs), expected)
        assert getattr(twin, entry) is not getattr(module, entry)

    assert getattr(module.double(), entry).dtype == torch.float64
    if learnt:
        module(*inputs).backward() if name != "MoCoLoss" else None
        assert name == "MoCoLoss" or getattr(module, entry).grad.shape == shape
    assert getattr(module.to("meta"), entry).is_meta
    assert entry not in MODULES[name](0.5)[0].state_dict()


def test_the_parameter_is_the_users_own() -> None:
    """An optimiser that holds it goes on to learn it."""
    temperature = nn.Parameter(torch.tensor([0.5]))
    loss = ssl.MoCoLoss(12, 6, temperature)
    assert loss.temperature is temperature
    loss.queue.enqueue(C)
    loss(A, B).backward()
    assert temperature.grad is not None and temperature.grad.abs() > 0


@pytest.mark.parametrize("name", MODULES)
def test_modules_refuse_other_shapes(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: .* shape \[\] or \[1\], got shape \[2\]"):
        MODULES[name](torch.ones(2))


# --------------------------------------------------------------------------- arrays for tensors

X = A.numpy()
ARRAYS: list[tuple[Callable, str]] = [
    (lambda: ssl.nt_xent_loss(X, X), "nt_xent_loss: z1"),
    (lambda: ssl.nt_xent_loss(X), "nt_xent_loss: z2 must be a tensor, got None"),
    (lambda: ssl.nt_xent_loss(A, X), "nt_xent_loss: z2"),
    (lambda: ssl.nt_xent_loss([A, A, X]), r"nt_xent_loss: views\[2\]"),
    (lambda: ssl.nt_xent_loss(3), "nt_xent_loss: z1 must be a tensor or a sequence of tensors"),
    (lambda: ssl.nt_xent_loss({"a": A}), "nt_xent_loss: z1 must be a tensor or a sequence"),
    (lambda: ssl.info_nce_loss(X, X), "info_nce_loss: query"),
    (lambda: ssl.info_nce_loss(A, A, X), "info_nce_loss: negative_keys"),
    (lambda: ssl.info_nce_loss(A, A, query_ids=np.arange(12)), "info_nce_loss: query_ids"),
    (lambda: ssl.info_nce_loss(A, A, temperature=np.ones(2)), "info_nce_loss: temperature"),
    (lambda: ssl.clip_loss(A, X, 1.0), "clip_loss: text_features"),
    (lambda: ssl.clip_loss(A, A, np.ones(2)), "clip_loss: logit_scale"),
    (lambda: ssl.siglip_loss(X, A, 1.0, 0.0), "siglip_loss: image_features"),
    (lambda: ssl.siglip_loss(A, A, 1.0, np.ones(1)), "siglip_loss: logit_bias"),
    (lambda: ssl.sup_con_loss(X, LABELS), "sup_con_loss: z"),
    (lambda: ssl.sup_con_loss(A, LABELS.numpy()), "sup_con_loss: labels"),
    (lambda: ssl.dcl_loss(X, A), "dcl_loss: z1"),
    (lambda: ssl.byol_loss(X, A), "byol_loss: prediction"),
    (lambda: ssl.byol_loss(A, X), "byol_loss: target"),
    (lambda: ssl.byol_loss_symmetric(A, A, X, A), "byol_loss: prediction"),
    (lambda: ssl.simsiam_loss(A, A, A, X), "simsiam_loss: z_1"),
    (lambda: ssl.triplet_loss(X, LABELS), "triplet_loss: z"),
    (lambda: ssl.triplet_loss(A, LABELS, np.ones(2)), "triplet_loss: margin"),
    (lambda: ssl.margin_loss(A, A, X, A), "margin_loss: z_k"),
    (lambda: ssl.contrastive_loss(X, A, SAME), "contrastive_loss: a"),
    (lambda: ssl.contrastive_loss(A, A, SAME.numpy()), "contrastive_loss: same"),
    (lambda: ssl.alignment_loss(A, X), "alignment_loss: z2"),
    (lambda: ssl.uniformity_loss(X), "uniformity_loss: z"),
    (lambda: ssl.vae_loss(X, A, A, A), "vae_loss: reconstruction"),
    (lambda: ssl.vae_loss(A, A, A, X), "vae_loss: log_variance"),
    (lambda: ssl.vae_loss(A, A, A, A, beta=np.ones(2)), "vae_loss: beta"),
    (lambda: ssl.reparameterize(X, A, 1), "reparameterize: mean"),
    (lambda: ssl.feature_reconstruction_loss(X, A), "feature_reconstruction_loss: features"),
    (lambda: ssl.feature_reconstruction_loss(A, [X]), r"targets\[0\]"),
    (lambda: metrics.contrastive_accuracy(X, A), "contrastive_accuracy: query"),
    (lambda: metrics.feature_std(X), "feature_std: z"),
    (lambda: metrics.effective_rank(X), "effective_rank: z"),
    (lambda: ssl.KeyQueue(4, 6).enqueue(X), "enqueue: keys"),
    (lambda: ssl.KeyQueue(4, 6, labels=True).enqueue(A, np.arange(12)), "enqueue: labels"),
    (lambda: ssl.MoCoLoss(4, 6)(A, X), "MoCoLoss: key"),
    (lambda: ssl.ema_update_(A, B, 0.5), "ema_update_: targets must be a list of tensors"),
    (lambda: ssl.ema_update_(X, X, 0.5), "ema_update_: targets must be a list of tensors"),
    (lambda: ssl.ema_update_([A], [X], 0.5), r"ema_update_: .*sources\[0\] must be tensors"),
    (
        lambda: ssl.cached_step(nn.Linear(6, 2), [A, X], ssl.nt_xent_loss, 4),
        r"cached_step: views\[1\]",
    ),
]


@pytest.mark.parametrize(("call", "message"), ARRAYS, ids=[m for _, m in ARRAYS])
def test_arrays_for_tensors(call: Callable, message: str) -> None:
    """The op, the argument, and what to do."""
    with pytest.raises(TypeError, match=message) as error:
        call()
    if "must be" not in message:
        assert "got numpy.ndarray; use torch.from_numpy" in str(error.value)
