# SPDX-License-Identifier: Apache-2.0
"""pytorch-metric-learning's classes and ours side by side."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import check_budget
from side_by_side import check_same, check_same_error, check_signature, check_state, peer
from torch import Tensor, nn

import sslkernels

losses = peer("pytorch_metric_learning.losses")
miners = peer("pytorch_metric_learning.miners")
distances = peer("pytorch_metric_learning.distances")
reducers = peer("pytorch_metric_learning.reducers")
regularizers = peer("pytorch_metric_learning.regularizers")
ours: Any = peer("sslkernels.integrations.pytorch_metric_learning")

THEIRS: dict[str, Any] = {
    **{
        name: getattr(losses, name)
        for name in (
            "NTXentLoss",
            "SupConLoss",
            "ContrastiveLoss",
            "TripletMarginLoss",
            "SelfSupervisedLoss",
            "CrossBatchMemory",
        )
    },
    "BatchHardMiner": miners.BatchHardMiner,
}
PAIR_LOSSES = ("NTXentLoss", "SupConLoss", "ContrastiveLoss")
SIZES = [
    (2, 4, 1),
    (7, 8, 3),
    (40, 16, 8),
    (64, 16, 2),
    (33, 5, 33),
    (30, 6, 1),
]  # rows, D, classes


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs of the same arguments."""
    return getattr(ours, name)(*args, **kwargs), THEIRS[name](*args, **copy.deepcopy(kwargs))


def batch(n: int, dim: int, classes: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    labels = torch.randint(classes, (n,))
    return torch.randn(classes, dim)[labels] + spread * torch.randn(n, dim), labels


def said(caplog: pytest.LogCaptureFixture, call: Callable[[], Any]) -> str:
    """What is logged of handing over."""
    from sslkernels.integrations import _glue

    _glue.say.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sslkernels.integrations"):
        call()
    return caplog.text


@pytest.mark.parametrize("name", THEIRS)
def test_signatures(name: str) -> None:
    check_signature(getattr(ours, name), THEIRS[name])


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("size", SIZES)
def test_all_pairs(name: str, size: tuple[int, int, int], caplog: pytest.LogCaptureFixture) -> None:
    z, labels = batch(*size)
    arguments: list[dict[str, Any]] = [{}, {"distance": distances.DotProductSimilarity()}]
    if name == "ContrastiveLoss":
        arguments = [
            {},
            {"pos_margin": 0.3, "neg_margin": 1.3},
            {"distance": distances.LpDistance(normalize_embeddings=False)},
            {"neg_margin": 0},
        ]
    else:
        arguments += [{"temperature": 0.5}, {"temperature": -1.0}]
        raw = distances.DotProductSimilarity(normalize_embeddings=False)
        arguments += [{"distance": raw, "temperature": 5.0}]
        arguments += [{"reducer": reducers.MeanReducer()}, {"reducer": reducers.SumReducer()}]
        arguments += [{"reducer": reducers.AvgNonZeroReducer()}]
    arguments += [{"embedding_regularizer": regularizers.LpRegularizer()}]
    for keywords in arguments:
        mine, other = pair(name, **keywords)
        text = said(caplog, lambda m=mine: m(z, labels))
        assert "handed over" not in text, (keywords, text)
        check_same(
            lambda x, m=mine: m(x, labels),
            lambda x, m=other: m(x, labels),
            [z],
            slack=1e-5,  # float32 sums of the library's regularizers and reducers
        )


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_references(name: str) -> None:
    z, labels = batch(20, 8, 4)
    refs, ref_labels = batch(31, 8, 5)
    mine, other = pair(name)
    for a, b in ((ref_labels, labels), (labels.clone(), labels)):
        r = refs if a is ref_labels else z + 0.1
        check_same(
            lambda x, y, a=a, b=b: mine(x, b, ref_emb=y, ref_labels=a),
            lambda x, y, a=a, b=b: other(x, b, ref_emb=y, ref_labels=a),
            [z, r],
            slack=1e-5,
        )
    # The same tensor of labels: a row is then no pair with its own reference.
    check_same(
        lambda x, y: mine(x, labels, ref_emb=y, ref_labels=labels),
        lambda x, y: other(x, labels, ref_emb=y, ref_labels=labels),
        [z, z + 0.1],
        slack=1e-5,
    )


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_labels_of_any_dtype(name: str) -> None:
    z, labels = batch(20, 8, 4)
    mine, other = pair(name)
    for dtype in (torch.int32, torch.uint8, torch.float32, torch.bool):
        kind = labels.to(dtype)
        check_same(lambda x, k=kind: mine(x, k), lambda x, k=kind: other(x, k), [z], slack=1e-5)
    shifted = labels * 1000 - 7
    torch.testing.assert_close(mine(z, shifted), mine(z, labels))


@pytest.mark.parametrize("name", [*PAIR_LOSSES, "TripletMarginLoss"])
def test_what_is_handed_over(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """It gives what theirs gives, and is said once for each reason."""
    z, labels = batch(12, 6, 3)
    mined = miners.MultiSimilarityMiner()(z, labels)
    cases: list[tuple[dict[str, Any], tuple[Any, ...], str]] = [
        ({"distance": distances.SNRDistance()}, (), "SNRDistance"),
        ({"distance": distances.LpDistance(p=1)}, (), "p=1" if name[0] in "CT" else "LpDistance"),
    ]
    if name == "TripletMarginLoss":
        cases += [
            ({"swap": True}, (), "swap"),
            ({"smooth_loss": True}, (), "smooth_loss"),
            ({"triplets_per_anchor": "all", "swap": True}, (mined,), "swap"),
            ({}, (mined,), "pairs"),
            ({"reducer": reducers.ThresholdReducer(low=0.1)}, (), "ThresholdReducer"),
        ]
    if name == "ContrastiveLoss":
        cases += [({"reducer": reducers.MeanReducer()}, (), "MeanReducer")]
    for keywords, more, reason in cases:
        mine, other = pair(name, **keywords)
        text = said(caplog, lambda m=mine, a=more: (m(z, labels, *a), m(z, labels, *a)))
        assert text.count("handed over") == 1 and reason in text
        torch.testing.assert_close(mine(z, labels, *more), other(z, labels, *more))


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize(
    "size", SIZES[:3]
)  # theirs takes gigabytes for a few dozen rows of two classes
def test_given_pairs(name: str, size: tuple[int, int, int]) -> None:
    """From miners of pairs and of triplets, with repeated pairs, and against references."""
    z, labels = batch(*size)
    refs, ref_labels = batch(25, size[1], 3)
    keywords: list[dict[str, Any]] = [{}, {"reducer": reducers.MeanReducer()}]
    if name != "ContrastiveLoss":
        keywords += [{"temperature": 0.5, "reducer": reducers.AvgNonZeroReducer()}]
    for miner in (miners.PairMarginMiner(0.2, 1.2), miners.TripletMarginMiner(0.5)):
        for side in ((), (refs, ref_labels)):
            indices = miner(z, labels, *side)
            rest = side[1:]
            doubled = indices
            if len(indices) == 4 and name != "SupConLoss":
                doubled = tuple(torch.cat((i, i[: len(i) // 2])) for i in indices)
            for chosen in (indices, doubled):
                for k in keywords:
                    mine, other = pair(name, **k)
                    check_same(
                        lambda x, *y, m=mine, c=chosen, r=rest: m(x, labels, c, *y, *r),
                        lambda x, *y, m=other, c=chosen, r=rest: m(x, labels, c, *y, *r),
                        [z, *side[:1]],
                        slack=1e-5,
                    )
    mine, other = pair(name)
    torch.testing.assert_close(mine(z, None, indices, refs), other(z, None, indices, refs))


def test_a_subclass_keeps_what_it_changes() -> None:
    z, labels = batch(12, 6, 3)

    class Mine(ours.NTXentLoss):
        def _compute_loss(self, *args: Any) -> Any:
            return self.zero_losses()

    class Other(ours.ContrastiveLoss):
        def neg_calc(self, distance: Any, margin: Any) -> Any:
            return 0 * distance + 1

    class Theirs(losses.ContrastiveLoss):
        def neg_calc(self, distance: Any, margin: Any) -> Any:
            return 0 * distance + 1

    assert Mine()(z, labels) == 0
    torch.testing.assert_close(Other()(z, labels), Theirs()(z, labels))


@pytest.mark.parametrize("size", SIZES)
def test_triplets(size: tuple[int, int, int], caplog: pytest.LogCaptureFixture) -> None:
    z, labels = batch(*size)
    for keywords in (
        {},
        {"margin": 0.4},
        {"distance": distances.CosineSimilarity()},
        {"distance": distances.LpDistance(normalize_embeddings=False)},
        {"reducer": reducers.MeanReducer()},
        {"reducer": reducers.SumReducer()},
    ):
        mine, other = pair("TripletMarginLoss", **keywords)
        assert "handed over" not in said(caplog, lambda m=mine: m(z, labels))
        check_same(lambda x, m=mine: m(x, labels), lambda x, m=other: m(x, labels), [z], slack=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("distance", ["LpDistance", "CosineSimilarity", "unnormalised"])
def test_batch_hard(size: tuple[int, int, int], distance: str) -> None:
    """Miner and loss together, as they are used."""
    z, labels = batch(*size)
    if distance == "unnormalised":
        make = lambda: distances.LpDistance(normalize_embeddings=False)  # noqa: E731
    else:
        make = getattr(distances, distance)
    mine, other = ours.BatchHardMiner(distance=make()), miners.BatchHardMiner(distance=make())
    found, expected = mine(z.double(), labels), other(z.double(), labels)
    assert mine.num_triplets == other.num_triplets
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    refs, ref_labels = batch(25, size[1], 3)
    for a, b in zip(
        mine(z.double(), labels, refs.double(), ref_labels),
        other(z.double(), labels, refs.double(), ref_labels),
        strict=True,
    ):
        assert torch.equal(a, b)
    check_same(
        lambda x: ours.TripletMarginLoss(0.2)(x, labels, expected),
        lambda x: losses.TripletMarginLoss(0.2)(x, labels, expected),
        [z],
        slack=1e-5,
    )


def test_many_pairs_are_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More positive pairs than a chunk holds: the same value and gradients."""
    monkeypatch.setattr(ours.ops, "PAIRS_AT_ONCE", 1)
    z, labels = batch(30, 4, 2)
    assert int((labels[:, None] == labels).sum()) > 5 * 30
    for name in PAIR_LOSSES:
        mine, other = pair(name)
        check_same(lambda x, m=mine: m(x, labels), lambda x, m=other: m(x, labels), [z], slack=1e-5)


@pytest.mark.parametrize("name", [*PAIR_LOSSES, "TripletMarginLoss"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised(name: str, symmetric: bool) -> None:
    for n in (1, 2, 9, 40):
        a = torch.randn(n, 8)
        b = a + 0.5 * torch.randn(n, 8)
        mine = ours.SelfSupervisedLoss(getattr(ours, name)(), symmetric)
        other = losses.SelfSupervisedLoss(THEIRS[name](), symmetric)
        check_same(mine, other, [a, b], slack=1e-5)
    check_same(
        ours.SelfSupervisedLoss(ours.NTXentLoss(0.5, reducer=reducers.SumReducer())),
        losses.SelfSupervisedLoss(losses.NTXentLoss(0.5, reducer=reducers.SumReducer())),
        [a, b],
    )
    with pytest.raises(Exception, match="not supported for"):
        ours.SelfSupervisedLoss(nn.Linear(2, 2))


@pytest.mark.parametrize("name", [*PAIR_LOSSES, "TripletMarginLoss"])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_batch_memory(name: str, masked: bool) -> None:
    """Several laps round a memory that the batch does not divide."""
    memory = [
        ours.CrossBatchMemory(getattr(ours, name)(), 6, memory_size=25),
        losses.CrossBatchMemory(THEIRS[name](), 6, memory_size=25),
        losses.CrossBatchMemory(THEIRS[name](), 6, memory_size=25).double(),
    ]
    for step in range(8):
        z, labels = batch(10, 6, 3, spread=0.5)
        mask = torch.arange(10) % 2 == step % 2 if masked else None
        results = []
        for i, loss in enumerate(memory):
            x = (z.double() if i == 2 else z.clone()).requires_grad_()
            value = loss(x, labels, enqueue_mask=mask)
            results.append((value, *torch.autograd.grad(value, x)))
        for what, m, t, d in zip(("loss", "gradient"), *results, strict=True):
            check_budget(m, t, d, 1e-5, f"{what} of step {step}")
        for attribute in ("queue_idx", "has_been_filled"):
            assert getattr(memory[0], attribute) == getattr(memory[1], attribute)
        assert torch.equal(memory[0].embedding_memory, memory[1].embedding_memory)
        assert torch.equal(memory[0].label_memory, memory[1].label_memory)
    memory[0].reset_queue()
    assert memory[0].queue_idx == 0 and not memory[0].has_been_filled


def test_cross_batch_memory_with_a_miner() -> None:
    mine = ours.CrossBatchMemory(ours.TripletMarginLoss(), 6, 40, ours.BatchHardMiner())
    other = losses.CrossBatchMemory(losses.TripletMarginLoss(), 6, 40, miners.BatchHardMiner())
    for _ in range(6):
        z, labels = batch(10, 6, 3)
        torch.testing.assert_close(mine(z, labels), other(z, labels))
        given = miners.BatchHardMiner()(z, labels)
        torch.testing.assert_close(mine(z, labels, given), other(z, labels, given))


def test_states() -> None:
    for name in (*PAIR_LOSSES, "TripletMarginLoss"):
        check_state(*pair(name))
    check_state(*pair("CrossBatchMemory", losses.NTXentLoss(), 6, 20))


def test_a_resumed_memory_knows_where_it_is() -> None:
    """Better than theirs: there the pointer is lost, and a full memory counts as empty."""
    for steps in (0, 2, 3, 5):  # empty, partly filled, just full, in its second lap
        loss = ours.CrossBatchMemory(ours.NTXentLoss(), 6, 30)
        plain = losses.CrossBatchMemory(losses.NTXentLoss(), 6, 30)
        for _ in range(steps):
            z, labels = batch(10, 6, 3)
            loss(z, labels), plain(z, labels)
        resumed = ours.CrossBatchMemory(ours.NTXentLoss(), 6, 30)
        resumed.load_state_dict(copy.deepcopy(loss.state_dict()))
        lost = losses.CrossBatchMemory(losses.NTXentLoss(), 6, 30)
        lost.load_state_dict(copy.deepcopy(plain.state_dict()))
        assert resumed.has_been_filled == loss.has_been_filled == (steps >= 3)
        for _ in range(3):
            z, labels = batch(10, 6, 3)
            expected = loss(z, labels)
            torch.testing.assert_close(resumed(z, labels), expected)
            torch.testing.assert_close(plain(z, labels), expected)
            if steps >= 3 and _ == 0:
                assert abs(lost(z, labels) - expected) > 1e-3
        # A checkpoint of theirs says as much as its rows do.
        resumed.load_state_dict(plain.state_dict())
        assert resumed.has_been_filled == plain.has_been_filled


def test_a_batch_that_enqueues_nothing_fills_nothing() -> None:
    """Better than theirs, which then takes the whole memory, zeros and all, for filled."""
    z, labels = batch(6, 4, 2)
    nothing = torch.zeros(6, dtype=torch.bool)
    mine, other = pair("CrossBatchMemory", losses.NTXentLoss(), 4, 20)
    for loss in (mine, other):
        loss(z, labels)
        loss(z, labels, enqueue_mask=nothing)
    assert not mine.has_been_filled and mine.queue_idx == 6
    assert other.has_been_filled and other.queue_idx == 6


def test_hard_positives_keep_their_gradient() -> None:
    """Better than theirs, whose quotient underflows: log(0 + tiny) is a constant."""
    anchor = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.9, 0.1], [1.0, 0.1]])
    labels = torch.tensor([0, 0, 1, 1])  # the first two are opposite positives
    results = {}
    for loss in pair("NTXentLoss", 0.01):
        x = anchor.clone().requires_grad_()
        value = loss(x, labels)
        value.backward()
        results[type(loss)] = value.item(), x.grad
    (mine, gradient), (other, lost) = results.values()
    x = anchor.double().requires_grad_()
    truth = sslkernels.reference.sup_con_loss(x, labels, 0.01, reduction="none")
    assert mine == pytest.approx(truth.mean().item(), rel=1e-5)  # one positive each: the same loss
    truth.mean().backward()
    assert other < 0.8 * mine
    torch.testing.assert_close(gradient.double(), x.grad, rtol=1e-4, atol=1e-4)
    assert (lost - x.grad).abs().max() > 0.5 * x.grad.abs().max()


def test_memory_does_not_grow_with_pairs_times_pairs() -> None:
    """600 rows of 20 classes: theirs would need 18k x 340k floats, 24 GB."""
    z, labels = batch(600, 8, 20)
    assert ours.NTXentLoss()(z.requires_grad_(), labels).isfinite()


def test_half_precision() -> None:
    """Accumulated in float32, rounded for the reducer; the dtype is theirs."""
    z, labels = batch(20, 8, 4)
    for dtype, near in ((torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        for name in PAIR_LOSSES:
            mine, other = pair(name)
            narrow = z.to(dtype)
            truth = other(narrow.double(), labels)
            loss = mine(narrow, labels)
            assert loss.dtype == dtype and abs(loss - truth) < near * truth


def test_errors() -> None:
    z, labels = batch(8, 4, 2)
    for name in (*PAIR_LOSSES, "TripletMarginLoss"):
        mine, other = pair(name)
        for arguments in ((z, labels[:5]), (z, labels[:, None]), (z,), (z[0], labels[:4])):
            check_same_error(partial(mine, *arguments), partial(other, *arguments))
    mine, other = pair("CrossBatchMemory", losses.NTXentLoss(), 4, 20)
    wrong = {"indices_tuple": (labels,), "enqueue_mask": labels > 0}
    check_same_error(partial(mine, z, labels, **wrong), partial(other, z, labels, **wrong))
    mine, other = pair("CrossBatchMemory", losses.NTXentLoss(), 4, 6)
    check_same_error(lambda: mine(z, labels), lambda: other(z, labels))
    check_same_error(
        lambda: ours.CrossBatchMemory(losses.ArcFaceLoss(2, 4), 4),
        lambda: losses.CrossBatchMemory(losses.ArcFaceLoss(2, 4), 4),
    )


def test_patch() -> None:
    with sslkernels.patch("pytorch_metric_learning"):
        import pytorch_metric_learning as pml

        assert pml.losses.NTXentLoss is ours.NTXentLoss
        assert pml.miners.BatchHardMiner is ours.BatchHardMiner
        assert isinstance(pml.losses.NTXentLoss(), THEIRS["NTXentLoss"])
        assert type(pml.losses.NTXentLoss()).__name__ == "NTXentLoss"
    assert pml.losses.NTXentLoss is THEIRS["NTXentLoss"]
