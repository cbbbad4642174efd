# SPDX-License-Identifier: Apache-2.0
"""Drop-ins without their peers: conventions from our reference, and ``patch`` on a made-up peer."""

from __future__ import annotations

import copy
import importlib
import logging
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import check_loss
from torch import nn

import sslkernels
from sslkernels import integrations, reference
from sslkernels.integrations import (
    _glue,
    _patching,
    info_nce,
    lightly,
    moco,
    open_clip,
    solo_learn,
)

# ------------------------------------------------------------------------------------- patching


class Ours:
    pass


def our_function() -> str:
    return "ours"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """An installed library ``fakepeer``, a user's module that has imported from it, and a spec."""

    class Theirs:
        pass

    def function() -> str:
        return "theirs"

    package, losses, user = (
        types.ModuleType(name) for name in ("fakepeer", "fakepeer.losses", "a_user_of_fakepeer")
    )
    package.__version__ = "1.2.0"  # type: ignore[attr-defined]
    losses.Theirs, losses.function = Theirs, function  # type: ignore[attr-defined]
    package.Theirs, user.Renamed, user.function = Theirs, Theirs, function  # type: ignore[attr-defined]
    spec = types.ModuleType("sslkernels.integrations.fakepeer")
    peer = _patching.Peer(
        name="fakepeer",
        package="fakepeer",
        distribution=None,
        tested=("1.2.0",),
        swaps={"fakepeer.losses.Theirs": Ours, "fakepeer.losses.function": our_function},
    )
    spec.PEER = peer  # type: ignore[attr-defined]
    for module in (package, losses, user, spec):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(_patching.PEERS, "fakepeer", "fakepeer")
    for variable in ("SSLKERNELS_DISABLE", "SSLKERNELS_PATCH_FORCE"):
        monkeypatch.delenv(variable, raising=False)
    yield types.SimpleNamespace(
        package=package, losses=losses, user=user, spec=spec, Theirs=Theirs, function=function
    )
    integrations.unpatch()


def test_every_reference_is_replaced_and_put_back(
    fake: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sslkernels.integrations"):
        sslkernels.patch("fakepeer")
        sslkernels.patch("fakepeer")
    assert fake.losses.Theirs is fake.package.Theirs is fake.user.Renamed is Ours
    assert fake.user.function() == "ours"
    said = [r.getMessage() for r in caplog.records]
    assert said == ["sslkernels.patch: fakepeer 1.2.0: Theirs, function replaced in 3 modules"]
    assert integrations.patched() == {
        "fakepeer": ("fakepeer.losses.Theirs", "fakepeer.losses.function")
    }
    # The original is still to be had for what is handed over.
    assert _patching.original("fakepeer.losses.Theirs") is fake.Theirs
    fake.package.later = fake.losses.Theirs  # imported while it was patched
    sslkernels.unpatch("fakepeer")
    assert fake.losses.Theirs is fake.package.Theirs is fake.user.Renamed is fake.Theirs
    assert fake.package.later is fake.Theirs and fake.user.function() == "theirs"
    assert integrations.patched() == {}
    sslkernels.unpatch("fakepeer")  # nothing to do


def test_what_a_user_took_from_us_stays(fake: Any) -> None:
    fake.user.on_purpose = Ours
    with sslkernels.patch("fakepeer"):
        pass
    assert fake.user.on_purpose is Ours and fake.user.Renamed is fake.Theirs


def test_context_manager_undoes_only_its_own_patch(fake: Any) -> None:
    with sslkernels.patch("fakepeer"):
        assert fake.user.Renamed is Ours
    assert fake.user.Renamed is fake.Theirs
    with pytest.raises(KeyError), sslkernels.patch("fakepeer"):
        raise KeyError
    assert fake.user.Renamed is fake.Theirs
    outer = sslkernels.patch("fakepeer")
    with sslkernels.patch("fakepeer"):
        pass
    assert fake.user.Renamed is Ours
    outer.undo()
    outer.undo()
    assert fake.user.Renamed is fake.Theirs


def test_a_name_bound_again_by_the_user_is_left_alone(fake: Any) -> None:
    sslkernels.patch("fakepeer")
    fake.user.Renamed = int
    sslkernels.unpatch()
    assert fake.user.Renamed is int


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_kill_switch(
    fake: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    monkeypatch.setenv("SSLKERNELS_DISABLE", value)
    with sslkernels.patch("fakepeer"):
        assert fake.user.Renamed is fake.Theirs
    assert "SSLKERNELS_DISABLE" in caplog.text and integrations.patched() == {}
    monkeypatch.setenv("SSLKERNELS_DISABLE", "0")
    with sslkernels.patch("fakepeer"):
        assert fake.user.Renamed is Ours


def test_unknown_version(
    fake: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake.package.__version__ = "2.0"
    with pytest.raises(RuntimeError, match=r"fakepeer 2.0 has not been tested \(tested: 1.2.0\)"):
        sslkernels.patch("fakepeer")
    assert fake.user.Renamed is fake.Theirs
    with sslkernels.patch("fakepeer", force=True):
        assert fake.user.Renamed is Ours
    monkeypatch.setenv("SSLKERNELS_PATCH_FORCE", "1")
    with sslkernels.patch("fakepeer"):
        assert fake.user.Renamed is Ours
    with pytest.raises(RuntimeError, match="has not been tested"):
        sslkernels.patch("fakepeer", force=False)
    del fake.losses.function  # an untested version may lack something
    caplog.clear()
    with sslkernels.patch("fakepeer"):
        assert fake.user.Renamed is Ours and "has no fakepeer.losses.function" in caplog.text
    fake.package.__version__ = "1.2.0+local"
    with pytest.raises(RuntimeError, match="must have fakepeer.losses.function"):
        sslkernels.patch("fakepeer", force=False)
    assert fake.user.Renamed is fake.Theirs


def test_a_peer_without_versions_is_known_by_its_arguments(fake: Any) -> None:
    del fake.package.__version__
    with pytest.raises(RuntimeError, match="of unknown version has not been tested"):
        sslkernels.patch("fakepeer")
    swaps = {"fakepeer.losses.function": our_function}
    fake.spec.PEER = _patching.Peer("fakepeer", "fakepeer", None, (), swaps, unversioned=True)
    with sslkernels.patch("fakepeer"):
        assert fake.user.function() == "ours"
    fake.losses.function = lambda argument: argument
    with pytest.raises(RuntimeError, match=r"must take \[\], got \['argument'\]"):
        sslkernels.patch("fakepeer")
    with sslkernels.patch("fakepeer", force=True):
        assert fake.losses.function is our_function


def test_all_or_nothing(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One library that is refused leaves the others alone."""
    monkeypatch.setitem(_patching.PEERS, "missing", "missing")
    spec = types.ModuleType("sslkernels.integrations.missing")
    spec.PEER = _patching.Peer("missing", "no_such_package", None, (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, spec.__name__, spec)
    with pytest.raises(ModuleNotFoundError, match=r"'no_such_package' is not installed.*\[missing"):
        sslkernels.patch("fakepeer", "missing")
    assert fake.user.Renamed is fake.Theirs
    with pytest.raises(ValueError, match="one of .*lightly.*got 'lightning'"):
        sslkernels.patch("fakepeer", "lightning")
    with pytest.raises(ValueError, match=r"sslkernels\.unpatch"):
        sslkernels.unpatch("lightning")
    with pytest.raises(TypeError, match="name at least one"):
        sslkernels.patch()
    assert fake.user.Renamed is fake.Theirs


def test_a_package_that_fails_to_import_says_why(
    fake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Its own missing dependency is not taken for the package."""
    (tmp_path / "brokenpeer.py").write_text("import a_dependency_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    fake.spec.PEER = _patching.Peer("fakepeer", "brokenpeer", None, (), {})
    with pytest.raises(ModuleNotFoundError, match="a_dependency_that_is_missing"):
        sslkernels.patch("fakepeer")


def test_subclasses_made_before_are_named(fake: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Mine(fake.Theirs):  # type: ignore[name-defined, misc]
        pass

    with caplog.at_level(logging.INFO, "sslkernels.integrations"), sslkernels.patch("fakepeer"):
        assert issubclass(Mine, fake.Theirs) and "Mine" in caplog.text


def test_importing_the_package_imports_no_peer() -> None:
    """Nor torch's own modules beyond what sslkernels needs: the drop-ins come one by one."""
    code = (
        "import sys, sslkernels\n"
        "assert callable(sslkernels.patch)\n"
        "peers = {'lightly', 'pytorch_metric_learning', 'open_clip', 'timm', 'info_nce', 'solo',\n"
        "         'sentence_transformers'}\n"
        "loaded = {n.split('.')[0] for n in sys.modules} & peers\n"
        "assert not loaded, loaded\n"
        "ours = [n for n in sys.modules if n.startswith('sslkernels.integrations.')]\n"
        "assert ours == ['sslkernels.integrations._patching'], ours\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(_patching.PEERS))
def test_every_peer_is_described(name: str) -> None:
    """Drop-ins pickle, are documented, and the extra pins a version that was tested."""
    try:
        module = importlib.import_module(f"sslkernels.integrations.{_patching.PEERS[name]}")
    except ModuleNotFoundError as error:
        assert name in ("pytorch_metric_learning", "sentence_transformers")
        assert f"sslkernels[{name}]" in str(error)
        return  # subclasses of the library's: the others need no library to be imported
    peer = module.PEER
    assert peer.name == name and (peer.tested or peer.unversioned)
    for exported in module.__all__:
        found = getattr(module, exported)
        assert found.__doc__ and found.__module__ == module.__name__
        assert pickle.loads(pickle.dumps(found)) is found


# ------------------------------------------------------------------------- handing over, errors


def test_handing_over_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _glue.say.cache_clear()
    for _ in range(2):
        assert _glue.hand_over("torch.nn.functional.normalize", "a reason") is (
            torch.nn.functional.normalize
        )
    _glue.hand_over("torch.nn.functional.normalize", "another")
    assert caplog.text.count("handed over to the original") == 2
    with pytest.raises(ModuleNotFoundError, match="X: a reason needs the original of no_such"):
        _glue.hand_over("no_such_package.losses.X", "a reason")


def test_errors_are_caught_like_those_of_torch() -> None:
    x = torch.randn(4, 8)
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match="nt_xent_loss: z1 and z2"):
            lightly.NTXentLoss()(x, x[:3])
    for kind in (TypeError, RuntimeError):
        with pytest.raises(kind, match="nt_xent_loss: z2 must be"):
            lightly.NTXentLoss()(x, x.long())


# ---------------------------------------------------------------------------------- conventions


def test_lightly_conventions() -> None:
    z = [torch.randn(9, 6), torch.randn(9, 6)]
    check_loss(lightly.NTXentLoss(), lambda a, b: reference.nt_xent_loss(a, b, temperature=0.5), z)
    check_loss(lightly.DCLLoss(), lambda a, b: reference.dcl_loss(a, b, 0.1), z)
    check_loss(lightly.DCLWLoss(), lambda a, b: reference.dcl_loss(a, b, 0.1, sigma=0.5), z)
    check_loss(
        lightly.NegativeCosineSimilarity(),
        lambda a, b: -torch.nn.functional.cosine_similarity(a, b).mean(),
        z,
    )
    loss = lightly.NTXentLoss(0.2, memory_bank_size=(20, 6))
    assert not loss.state_dict()
    bank = loss.memory_bank.bank.clone()
    check_loss(
        lambda a, b: lightly.NTXentLoss.forward(_with_bank(loss, bank), a, b),
        lambda a, b: reference.info_nce_loss(a, b, bank.to(a), 0.2),
        z,
    )
    assert torch.equal(loss.memory_bank.bank[:9], torch.nn.functional.normalize(z[1]))


def _with_bank(loss: lightly.NTXentLoss, bank: torch.Tensor) -> lightly.NTXentLoss:
    loss.memory_bank.bank.copy_(bank)
    loss.memory_bank.bank_ptr.zero_()
    return loss


def test_lightly_memory_bank_is_a_ring() -> None:
    bank = lightly.MemoryBankModule((5, 2), feature_dim_first=False)
    rows = torch.arange(14.0).view(7, 2)
    bank(rows[:3], update=True)
    bank(rows[3:], update=True)
    assert torch.equal(bank.bank, torch.cat((rows[5:], rows[2:5]))) and int(bank.bank_ptr) == 2


def test_lightly_bank_may_be_enqueued_before_backward() -> None:
    """The forward pass has finished the gradient: nothing of the bank is read later."""
    loss = lightly.NTXentLoss(0.1, memory_bank_size=(8, 6))
    a, b = torch.randn(8, 6, requires_grad=True), torch.randn(8, 6)
    bank = loss.memory_bank.bank.clone()
    loss(a, b).backward()
    expected = a.detach().clone().requires_grad_()
    reference.info_nce_loss(expected, b, bank, 0.1).backward()
    torch.testing.assert_close(a.grad, expected.grad)
    assert not torch.equal(loss.memory_bank.bank, bank)


def test_lightly_refuses_what_it_can_not_mean() -> None:
    for size in (-1, (3, -1), 7, (1, 2, 3), (4,)):
        with pytest.raises(ValueError, match="size"):
            lightly.MemoryBankModule(size)
    with pytest.raises(ValueError, match="temperature"):
        lightly.NTXentLoss(1e-9)


def test_lightly_update_momentum() -> None:
    online, average = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = [
        0.9 * a + 0.1 * o for a, o in zip(*(m.parameters() for m in (average, online)), strict=True)
    ]
    lightly.update_momentum(online, average, 0.9)
    for mine, want in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, want)


def test_open_clip_conventions() -> None:
    x, y = (torch.nn.functional.normalize(torch.randn(9, 6), dim=1) for _ in range(2))
    scale, bias = torch.tensor(5.0), torch.tensor(-3.0)
    check_loss(open_clip.ClipLoss(), reference.clip_loss, [x, y, scale])
    check_loss(open_clip.SigLipLoss(), reference.siglip_loss, [x, y, scale, bias])
    check_loss(
        lambda *a: open_clip.SigLipLoss()._loss(*a, negative_only=True),
        lambda a, b, s, t: torch.nn.functional.softplus(s * a @ b.T + t).sum() / len(a),
        [x, torch.cat((y, y)), scale, bias],
    )
    assert open_clip.ClipLoss()(x, y, scale, output_dict=True).keys() == {"contrastive_loss"}


def test_info_nce_conventions() -> None:
    q, k, negatives = torch.randn(9, 6), torch.randn(9, 6), torch.randn(14, 6)
    check_loss(info_nce.InfoNCE(), lambda a, b: reference.info_nce_loss(a, b), [q, k])
    check_loss(
        info_nce.InfoNCE(0.2), lambda *a: reference.info_nce_loss(*a, 0.2), [q, k, negatives]
    )


def test_solo_learn_conventions() -> None:
    a, b = torch.randn(9, 6), torch.randn(9, 6)
    indexes = torch.arange(9).repeat(2)
    check_loss(
        lambda x, y: solo_learn.simclr_loss_func(torch.cat((x, y)), indexes, 0.2),
        lambda x, y: reference.nt_xent_loss(x, y, 0.2),
        [a, b],
    )
    check_loss(
        solo_learn.mocov3_loss_func,
        lambda x, y: 0.4 * reference.info_nce_loss(x, y, None, 0.2),
        [a, b],
    )
    check_loss(
        lambda x: solo_learn.byol_loss_func(x, b.to(x)),
        lambda x: reference.byol_loss(x, b.to(x)),
        [a],
    )
    queue = torch.randn(6, 20)
    check_loss(
        lambda x, y: solo_learn.mocov2plus_loss_func(x, y, queue.to(x)),
        lambda x, y: reference.info_nce_loss(x, y, queue.t().to(x), 0.1, normalize=False),
        [a, b],
    )


class _Tiny(nn.Module):
    """An encoder as torchvision's: its last layer is ``fc``."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(5, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


@pytest.mark.parametrize("mlp", [False, True])
def test_moco_loss_is_the_cross_entropy_of_its_logits(mlp: bool) -> None:
    """Three laps round a queue that the batch does not divide; both ways leave the same state."""
    torch.manual_seed(0)
    first = moco.MoCo(_Tiny, dim=6, K=10, m=0.9, T=0.2, mlp=mlp)
    second = copy.deepcopy(first)
    assert first.queue.shape == (6, 10) and first.queue.t().is_contiguous()
    for _ in range(8):
        with torch.no_grad():  # what an optimiser would do
            for pair in zip(*(m.encoder_q.parameters() for m in (first, second)), strict=True):
                step = torch.randn_like(pair[0])
                for parameter in pair:
                    parameter.add_(step)
        x, y = torch.randn(4, 5), torch.randn(4, 5)
        logits, labels = first(x, y)
        expected = torch.nn.functional.cross_entropy(logits, labels)
        loss, metrics = second.loss(x, y, return_metrics=True)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(metrics.top1, (logits.argmax(1) == 0).float().mean())
        gradients = [
            torch.autograd.grad(value, list(model.encoder_q.parameters()))
            for value, model in ((expected, first), (loss, second))
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b)
    assert int(first.queue_ptr) == 32 % 10
    assert not any(p.requires_grad for p in first.encoder_k.parameters())


def test_moco_checkpoints_both_ways() -> None:
    model = moco.MoCo(_Tiny, dim=6, K=10)
    model._dequeue_and_enqueue(torch.randn(3, 6))
    queue = moco.from_moco(
        {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}
    )
    assert torch.equal(queue.keys, model.queue.t()) and int(queue.queue_ptr) == 3
    back = moco.to_moco(queue, "module.")
    assert torch.equal(back["module.queue"], model.queue) and int(back["module.queue_ptr"]) == 3
    partly = sslkernels.KeyQueue(8, 6)
    partly.enqueue(torch.randn(5, 6))
    stored = moco.to_moco(partly)["queue"]
    assert torch.equal(stored[:, :5], partly.keys.t())
    torch.testing.assert_close(stored.norm(dim=0), torch.ones(8))
    other = moco.MoCo(_Tiny, dim=6, K=10)
    plain = {k: v.contiguous() for k, v in model.state_dict().items()}  # as the official code saves
    for assign in (False, True):
        other.load_state_dict(plain, assign=assign)
        other._dequeue_and_enqueue(torch.randn(9, 6))
        assert other.queue.t().is_contiguous() and int(other.queue_ptr) == 2
