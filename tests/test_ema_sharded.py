# SPDX-License-Identifier: Apache-2.0
"""EMA of sharded networks: FSDP2 and other DTensors, FSDP1, and checkpoints on another number of ranks.

Two gloo processes are started once.  Each scenario runs in both and hands back a traceback or nothing.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import HANGS_S, leave_group
from torch import Tensor, nn

from sslkernels import EMA

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
fsdp2 = pytest.importorskip("torch.distributed.fsdp", reason="torch without distributed")
if not hasattr(fsdp2, "fully_shard"):
    pytest.skip("torch without fully_shard", allow_module_level=True)

WORLD = 2
SCENARIOS: dict[str, Callable[[int, str], None]] = {}


def scenario(function: Callable[..., None], *arguments: Any) -> Callable[..., None]:
    name = " ".join([function.__name__, *map(str, arguments)]).replace("_", " ")
    SCENARIOS[name] = functools.partial(function, *arguments)
    return function


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Rows that don't divide by two, a tensor with fewer rows than ranks, BatchNorm."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 7), nn.Linear(7, 1), nn.Linear(1, 4)
    )
    return net.to(dtype)


def shard(net: nn.Sequential, how: str) -> nn.Sequential:
    """ "whole": every parameter, in two groups; "mixed": BatchNorm and the last layer stay whole."""
    if how == "mixed":
        for layer in (net[0], net[2], net[3]):
            fsdp2.fully_shard(layer)
        return net
    fsdp2.fully_shard(net[2])
    fsdp2.fully_shard(net)
    return net


def whole(x: Tensor) -> Tensor:
    x = x.detach()
    return x.full_tensor() if hasattr(x, "full_tensor") else x.clone()


def wholes(net: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, gathered."""
    for module in net.modules():
        if isinstance(module, fsdp2.FSDPModule):
            module.reshard()
    return {n: whole(x) for n, x in (*net.named_parameters(), *net.named_buffers())}


def train(net: nn.Module, seed: int, rank: int = 0) -> None:
    """Some step: a forward and a backward pass, and SGD."""
    generator = torch.Generator().manual_seed(10 * seed + rank)
    dtype = next(net.parameters()).dtype
    x = torch.randn(6, 5, generator=generator).to(dtype)
    net(x).square().mean().backward()
    with torch.no_grad():
        for p in net.parameters():
            if p.grad is not None:  # ranks without a row of a tensor have an empty one
                p.sub_(p.grad, alpha=0.5)
                p.grad = None


def follow(twin: EMA, state: dict[str, Tensor], step: int | None = None) -> None:
    """The unsharded run: an EMA of one process that sees the same online network."""
    online = copy.deepcopy(twin.module)
    named = dict((*online.named_parameters(), *online.named_buffers()))
    with torch.no_grad():
        for name, value in state.items():
            if named[name].dtype != value.dtype:
                named[name].data = value.clone()
            else:
                named[name].copy_(value)
    twin.update(online, step)


def equal(net: nn.Module, twin: nn.Module) -> None:
    ours, truth = wholes(net), wholes(twin)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert value.dtype == truth[name].dtype, name
        assert torch.equal(value, truth[name]), f"{name}: {value} for {truth[name]}"


# --------------------------------------------------------------------------------- FSDP2, DTensor


def _made(
    made: str, how: str, dtype: torch.dtype, /, **keywords: Any
) -> tuple[nn.Module, EMA, EMA]:
    """The online network, its EMA, and an EMA of one process."""
    net = network(dtype)
    torch.manual_seed(1)  # of the seed for stochastic rounding
    twin = EMA(copy.deepcopy(net), 0.9, **keywords)
    torch.manual_seed(1)
    if made == "before":
        ema = EMA(net, 0.9, **keywords)
        shard(ema.module, how)
        shard(net, how)
    else:
        shard(net, how)
        ema = EMA(net, 0.9, **keywords)
    return net, ema, twin


def bits(made: str, how: str, kind: str, rank: int, folder: str) -> None:
    """The bits of the unsharded run, with one call of the kernel from the second update on."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    keywords: dict[str, Any] = {"buffers": "average"}
    if kind == "wide average":
        keywords["dtype"] = torch.float32
    if kind == "stochastic":
        keywords["stochastic_rounding"] = True
    net, ema, twin = _made(made, how, dtype, **keywords)
    for step in range(4):
        train(net, step, rank)
        ema.update(net)
        follow(twin, wholes(net))
        equal(ema.module, twin.module)
        assert ema._plan is not None and len(ema._plan._update._parts) == 1
    assert ema.step == twin.step == 4
    start = wholes(network(dtype))["0.weight"]
    assert not torch.equal(wholes(ema.module)["0.weight"].to(dtype), start), "nothing moved"


for made in ("before", "after"):
    for how in ("whole", "mixed"):
        for kind in ("float32", "bfloat16", "wide average", "stochastic"):
            scenario(bits, made, how, kind)


@scenario
def target_forward(rank: int, folder: str) -> None:
    """A target that is called between updates sees each of them."""
    net, ema, twin = _made("before", "whole", torch.float32)
    ema.eval()
    twin.eval()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    for step in range(3):
        with torch.no_grad():
            torch.testing.assert_close(ema(x), twin(x))
        train(net, step, rank)
        with torch.no_grad():
            net(x)  # leaves whole parameters behind
        ema.update(net)
        follow(twin, wholes(net))
        equal(ema.module, twin.module)


def swapping(made: str, how: str, dtype: torch.dtype | None, rank: int, folder: str) -> None:
    """The averaged network inside, one's own outside, to the last bit."""
    net, ema, twin = _made(made, how, torch.float32, dtype=dtype)
    for step in range(3):
        train(net, step, rank)
        ema.update(net)
        follow(twin, wholes(net))
    own, averaged = wholes(net), wholes(ema.module)
    net.eval()
    twin.module.eval().to(torch.float32)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    before = net(x).detach()
    for fails in (False, True):
        try:
            with ema.swapped(net) as inside, torch.no_grad():
                assert inside is net
                torch.testing.assert_close(net(x), twin.module(x))
                net[1].running_mean.add_(1.0)
                if fails:
                    raise KeyError("in the block")
        except KeyError:
            assert fails
        after = wholes(net)
        assert all(torch.equal(after[n], own[n]) for n in own)
        assert torch.equal(net(x), before), "whole parameters of the block are still in use"
    kept = wholes(ema.module)
    assert all(torch.equal(kept[n], averaged[n]) for n in averaged)
    train(net, 7, rank)  # and training goes on
    ema.update(net)


for made in ("before", "after"):
    scenario(swapping, made, "whole", None)
scenario(swapping, "before", "mixed", torch.float64)


@scenario
def tensor_parallel(rank: int, folder: str) -> None:
    """DTensors without FSDP: sharded by columns, by rows, replicated; the copy is a network."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    net, twin = network(), EMA(network(), 0.9)
    for name, place in (("weight", Shard(1)), ("bias", Replicate())):
        value = getattr(net[2], name)
        setattr(net[2], name, nn.Parameter(distribute_tensor(value.detach(), mesh, [place])))
    net[0].weight = nn.Parameter(distribute_tensor(net[0].weight.detach(), mesh, [Shard(0)]))
    ema = EMA(net, 0.9)
    for step in range(3):
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.5 + step)
        ema.update(net)
        follow(twin, wholes(net))
        equal(ema.module, twin.module)
    assert ema._plan is not None
    net[0].weight = nn.Parameter(distribute_tensor(whole(net[0].weight), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"'0\.weight' must have the shape, device and shards"):
        ema.update(net)


@scenario
def replaced_shards_are_noticed(rank: int, folder: str) -> None:
    """A cast of both networks, or a load by assignment, between two updates."""
    net, ema, _ = _made("before", "whole", torch.float32)
    twin = EMA(network(), 0.9)
    ema.update(net)
    follow(twin, wholes(net))
    for both in ((net, ema.module), (twin.module,)):
        for module in both:
            module.to(torch.float64)
    train(net, 1, rank)
    ema.update(net)
    follow(twin, wholes(net))
    equal(ema.module, twin.module)
    net.load_state_dict({k: v.clone() * 2 for k, v in net.state_dict().items()}, assign=True)
    ema.update(net)
    follow(twin, wholes(net))
    equal(ema.module, twin.module)


@scenario
def nothing_grows(rank: int, folder: str) -> None:
    """A thousand steps leave no Python object behind."""
    net, ema, _ = _made("before", "mixed", torch.float32)
    for _ in range(3):
        ema.update(net)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        ema.update(net)
    gc.collect()
    # A leak would be an object a step at least; torch and Python make some of their own now and then.
    assert len(gc.get_objects()) - before < 300


@scenario
def networks_that_do_not_fit(rank: int, folder: str) -> None:
    """A message that says what is sharded how."""
    net = network()
    ema = EMA(net, 0.9)
    shard(net, "whole")
    with pytest.raises(
        ValueError, match=r"EMA.update: '0\.weight' .* sharded \[Shard\(dim=0\)\] and"
    ):
        ema.update(net)
    with pytest.raises(ValueError, match=r"EMA\.swapped: '0\.weight' must have the shape"):
        with ema.swapped(net):
            pass
    weights = EMA(net, 0.9)
    with pytest.raises(RuntimeError, match="holds weights only; call the online network inside"):
        weights(torch.ones(2, 5))


# ------------------------------------------------------------------------------------------ FSDP1


def _fsdp1(net: nn.Module, original: bool) -> nn.Module:
    return fsdp2.FullyShardedDataParallel(
        net,
        use_orig_params=original,
        device_id=torch.device("cpu"),
        auto_wrap_policy=fsdp2.wrap.ModuleWrapPolicy({nn.BatchNorm1d}),
    )


def _summoned(net: nn.Module) -> dict[str, Tensor]:
    with fsdp2.FullyShardedDataParallel.summon_full_params(net, writeback=False):
        named = (*net.named_parameters(), *net.named_buffers())
        return {n.replace("_fsdp_wrapped_module.", ""): x.detach().clone() for n, x in named}


def fsdp1(original: bool, rank: int, folder: str) -> None:
    """Wrapped like the network: updates, target forward passes, swapping."""
    net = network()
    twin, ema = EMA(network(), 0.9), EMA(net, 0.9)
    ema.module = _fsdp1(ema.module, original)
    net = _fsdp1(net, original)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    for module in (ema, twin):
        module.eval()
    for step in range(3):
        with torch.no_grad():
            torch.testing.assert_close(ema(x), twin(x))
        train(net, step, rank)
        ema.update(net)
        follow(twin, _summoned(net))
        ours, truth = _summoned(ema.module), wholes(twin.module)
        assert all(torch.equal(ours[n], truth[n]) for n in truth)
        assert ema._plan is not None
    net.eval()
    before = net(x).detach()
    with ema.swapped(net), torch.no_grad():
        torch.testing.assert_close(net(x), twin(x))
    assert torch.equal(net(x), before)
    with pytest.raises(TypeError, match="wrapped it; make the EMA before"):
        EMA(net)


for original in (True, False):
    scenario(fsdp1, original)


# ------------------------------------------------------------------------------------- checkpoints


def _trained(online: nn.Module, ema: EMA, rank: int) -> None:
    for step in range(3):
        train(online, step, rank)
        ema.update(online)


def checkpoints(made: str, rank: int, folder: str) -> None:
    """Saved by two ranks for one, and what one has saved loaded by two."""
    import torch.distributed.checkpoint as dcp

    net, ema, _ = _made(made, "mixed", torch.float32, stochastic_rounding=True)
    _trained(net, ema, 0)  # the same data, so that what is not sharded is the same on every rank
    ema.seed = 1234567890123456789
    dcp.save(ema.state_dict(), checkpoint_id=f"{folder}/two {made}")
    if rank == 0:
        torch.save(ema.step, f"{folder}/step {made}")
    torch.save(wholes(ema.module), f"{folder}/wholes {made} {rank}")

    _, other, _ = _made(made, "whole", torch.float32)  # sharded in another way, too
    state = other.state_dict()
    dcp.load(state, checkpoint_id=f"{folder}/one")
    other.load_state_dict(state)
    assert (other.step, other.seed) == (11, 22)
    truth = torch.load(f"{folder}/one.pt")
    ours = wholes(other.module)
    assert all(torch.equal(ours[n], truth[n]) for n in truth)
    before = wholes(other.module)
    with pytest.raises((RuntimeError, ValueError)):
        other.load_state_dict({**ema.state_dict(), "module.0.weight": torch.ones(2)})
    after = wholes(other.module)
    assert all(torch.equal(after[n], before[n]) for n in before) and other.step == 11


for made in ("before", "after"):
    scenario(checkpoints, made)


@scenario
def fsdp1_checkpoint(rank: int, folder: str) -> None:
    """Through the functions that torch has for it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as helpers

    net = network()
    ema = EMA(net, 0.9)
    ema.module, net = _fsdp1(ema.module, True), _fsdp1(net, True)
    _trained(net, ema, rank)
    dcp.save(helpers.get_model_state_dict(ema), checkpoint_id=f"{folder}/two fsdp1")
    if rank == 0:
        torch.save(ema.step, f"{folder}/step fsdp1")
    torch.save(_summoned(ema.module), f"{folder}/wholes fsdp1 {rank}")


def worker(rank: int, folder: str) -> None:
    if sys.platform == "linux":  # a host name that does not resolve must not matter
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=HANGS_S),
    )
    found: dict[str, str | None] = {}
    for name, run in SCENARIOS.items():
        try:
            run(rank, folder)
            found[name] = None
        except BaseException:
            found[name] = traceback.format_exc()
            break  # the other rank may wait for this one
    torch.save(found, f"{folder}/found {rank}.pt")
    if any(text is not None for text in found.values()):
        os._exit(0)  # the other rank waits in a collective
    leave_group()


def _one_process(folder: str) -> None:
    """A checkpoint of an unsharded EMA."""
    import torch.distributed.checkpoint as dcp

    net = network()
    ema = EMA(net, 0.8)
    _trained(net, ema, 0)
    ema.step, ema.seed = 11, 22
    dcp.save(ema.state_dict(), checkpoint_id=f"{folder}/one", no_dist=True)
    torch.save(wholes(ema.module), f"{folder}/one.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("ranks"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _one_process(folder)
    mp.spawn(worker, (folder,), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(folder: str, name: str) -> None:
    """See the function of that name."""
    for rank in range(WORLD):
        found = torch.load(f"{folder}/found {rank}.pt")
        first = next((n for n, text in found.items() if text is not None), None)
        assert name in found, f"rank {rank} stopped in {first!r}"
        assert found[name] is None, f"rank {rank}: {found[name]}"


@pytest.mark.parametrize("made", ["before", "after", "fsdp1"])
def test_two_ranks_saved_and_one_goes_on(folder: str, made: str) -> None:
    """The state dict of a sharded EMA in an unsharded one."""
    import torch.distributed.checkpoint as dcp

    ema = EMA(network(), 0.9)
    state = ema.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=f"{folder}/two {made}", no_dist=True)
    ema.load_state_dict(state)
    assert ema.step == torch.load(f"{folder}/step {made}") == 3
    assert made == "fsdp1" or ema.seed == 1234567890123456789
    for rank in range(WORLD):
        truth = torch.load(f"{folder}/wholes {made} {rank}")
        ours = wholes(ema.module)
        for name, value in truth.items():
            if made == "fsdp1" and name.startswith("1.") and not name.endswith("t"):
                continue  # buffers are not sharded: each rank has its own, the first one's are saved
            assert torch.equal(ours[name], value), name
