# SPDX-License-Identifier: Apache-2.0
"""Every loss under everything that torch does around a function: the right number, or a clear error.

``docs/torch.md`` lists the same names.  Transforms of torch.func are in ``test_transforms.py``.
"""

from __future__ import annotations

import copy
import gc
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transforms import LOSSES, TWICE, UNREDUCED, inputs
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import sslkernels

CASES = {**LOSSES, **UNREDUCED}
Loss = Callable[..., Tensor]


def leaves(seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(x.float().requires_grad_() for x in inputs(seed))


def plain(loss: Loss) -> tuple[Tensor, ...]:
    """Value and gradients in plain eager mode."""
    x = leaves()
    value = loss(*x)
    return value.detach(), *torch.autograd.grad(value, x)


def same_bits(loss: Loss, value: Tensor, gradients: Any) -> None:
    for ours, truth in zip((value.detach(), *gradients), plain(loss), strict=True):
        assert torch.equal(ours, truth)


def close(loss: Loss, value: Tensor, gradients: Any) -> None:
    for ours, truth in zip((value.detach(), *gradients), plain(loss), strict=True):
        torch.testing.assert_close(ours, truth)


def inside(make: Callable[[], AbstractContextManager[Any]]) -> Callable[[Loss], None]:
    """The same bits inside of a context."""

    def check(loss: Loss) -> None:
        with make():
            x = leaves()
            value = loss(*x)
            value.backward()
        same_bits(loss, value, [leaf.grad for leaf in x])

    return check


# ---- mechanisms --------------------------------------------------------------------------------


def retain_graph(loss: Loss) -> None:
    x = leaves()
    value = loss(*x)
    for _ in range(2):
        same_bits(loss, value, torch.autograd.grad(value, x, retain_graph=True))
    value.backward(retain_graph=True)
    value.backward()
    same_bits(loss, value, [leaf.grad / 2 for leaf in x if leaf.grad is not None])


def checkpointed(reentrant: bool) -> Callable[[Loss], None]:
    def check(loss: Loss) -> None:
        x = leaves()
        value = checkpoint(loss, *x, use_reentrant=reentrant)
        value.backward()
        same_bits(loss, value, [leaf.grad for leaf in x])

    return check


def batched_gradients(loss: Loss) -> None:
    """Several incoming gradients in one call: what one call for each gives."""
    x = leaves()
    value = loss(*x)
    incoming = torch.stack([torch.ones_like(value), -0.5 * torch.ones_like(value)])
    together = torch.autograd.grad(value, x, incoming, retain_graph=True, is_grads_batched=True)
    for i in range(2):
        alone = torch.autograd.grad(value, x, incoming[i], retain_graph=True)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-5, atol=1e-6)


def hooks_of_tensors(loss: Loss) -> None:
    x, seen = leaves(), []
    x[0].register_hook(lambda g: (seen.append(g), 2 * g)[1])
    value = loss(*x)
    value.backward()
    assert len(seen) == 1 and torch.equal(2 * seen[0], x[0].grad)
    same_bits(loss, value, [seen[0], *(leaf.grad for leaf in x[1:])])


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def no_grad(loss: Loss) -> None:
    saved: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        value = loss(*leaves())
    assert not saved and not value.requires_grad
    assert torch.equal(value, plain(loss)[0])


def inference_mode(loss: Loss) -> None:
    """Before a training step too, with numbers that no training step has used."""
    with torch.inference_mode():
        value = loss(*(x.detach().clone() for x in leaves()))
        assert value.is_inference()
    assert torch.equal(value.clone(), plain(loss)[0])


def autocast(loss: Loss) -> None:
    """Float32 inputs stay what they are."""
    with torch.autocast("cpu", torch.bfloat16):
        x = leaves()
        value = loss(*x)
    value.backward()
    same_bits(loss, value, [leaf.grad for leaf in x])


def fake_tensors(loss: Loss) -> None:
    """Shapes and dtypes without memory, forward and backward."""
    value, *gradients = plain(loss)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = [mode.from_tensor(leaf) for leaf in leaves()]
        found = loss(*x)
        found.backward()
    assert (found.shape, found.dtype) == (value.shape, value.dtype)
    for leaf, gradient in zip(x, gradients, strict=True):
        assert leaf.grad is not None
        assert (leaf.grad.shape, leaf.grad.dtype) == (gradient.shape, gradient.dtype)


def compiled(loss: Loss) -> None:
    torch._dynamo.reset()
    x = leaves()
    value = torch.compile(loss, backend="aot_eager", fullgraph=True)(*x)
    value.backward()
    close(loss, value, [leaf.grad for leaf in x])


class Wrapped(nn.Module):
    """A loss as a module without parameters."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return self.loss(x, y, t)


class Learned(nn.Module):
    """A loss whose last argument is a parameter."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss, self.t = loss, nn.Parameter(torch.tensor(9.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y, self.t)


def functional_call(loss: Loss) -> None:
    x, y, t = leaves()
    value = torch.func.functional_call(Learned(loss), {"t": t}, (x, y))
    same_bits(loss, value, torch.autograd.grad(value, (x, y, t)))


def data_parallel(loss: Loss) -> None:
    """Without GPUs it calls the module; with them each replica is a call of its own."""
    x = leaves()
    value = nn.DataParallel(Wrapped(loss))(*x)
    value.backward()
    same_bits(loss, value, [leaf.grad for leaf in x])


def distributed_tensors(loss: Loss) -> None:
    """torch's error, as no op here says how it is sharded; or its number, of torch operations."""
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = [DTensor.from_local(leaf.detach(), mesh, [Replicate()]) for leaf in leaves()]
        try:
            value = loss(*x)
        except (NotImplementedError, RuntimeError) as error:
            words = "sharding strategy|mixed torch.Tensor and DTensor|DTensor"
            assert re.search(words, str(error)), error
        else:
            value = value.full_tensor() if isinstance(value, DTensor) else value
            torch.testing.assert_close(value, plain(loss)[0])
    finally:
        dist.destroy_process_group()


def exported(loss: Loss) -> None:
    x = tuple(leaf.detach() for leaf in leaves())
    program = torch.export.export(Wrapped(loss), x, strict=False)
    other = tuple(leaf.detach() for leaf in leaves(3))
    torch.testing.assert_close(program.module()(*other), loss(*other))


def scripted(loss: Loss) -> None:
    """Refused by torch: the checks of arguments are Python."""
    with pytest.raises(Exception, match=r"(?s)."), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Wrapped(loss))


def written_after_forward(loss: Loss) -> None:
    """An input that is written before backward: an error, or it was not needed and nothing changes."""
    x = leaves()
    views = [leaf * 1 for leaf in x]
    value = loss(*views)
    views[0].add_(1)
    try:
        value.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    close(loss, value, [leaf.grad for leaf in x])


def second_derivative(loss: Loss) -> None:
    x = leaves()
    gradient = torch.autograd.grad(loss(*x), x[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(gradient.sum(), x[0])


def layouts(loss: Loss) -> None:
    """Strided, offset, transposed: no element between the rows is read."""

    def strided(x: Tensor) -> Tensor:
        wide = torch.full((2 * len(x) + 1, 3 * x.shape[1] + 1), torch.nan)
        view = wide[1::2, 1::3]
        return view.copy_(x)

    for change in (strided, lambda x: x.t().contiguous().t()):
        x = [change(leaf.detach()) if leaf.ndim else leaf.detach().clone() for leaf in leaves()]
        for leaf in x:
            leaf.requires_grad_()
        value = loss(*x)
        close(loss, value, torch.autograd.grad(value, x))


def python_threads(loss: Loss) -> None:
    """Three train at once, each with the bits of one alone."""
    truth, wrong = plain(loss), []

    def train() -> None:
        for _ in range(8):
            found = plain(loss)
            wrong.extend(a for a, b in zip(found, truth, strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Subclass(Tensor):
    """A subclass that changes nothing."""


def subclasses(loss: Loss) -> None:
    x = [leaf.detach().as_subclass(Subclass).requires_grad_() for leaf in leaves()]
    value = loss(*x)
    value.backward()
    close(loss, value.as_subclass(Tensor), [leaf.grad.as_subclass(Tensor) for leaf in x])


def default_device(loss: Loss) -> None:
    """Tensors are where the inputs are, not where torch.set_default_device says."""
    x = leaves()
    with torch.device("meta"):
        value = loss(*x)
        value.backward()
    same_bits(loss, value, [leaf.grad for leaf in x])


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MECHANISMS: dict[str, Callable[[Loss], None]] = {
    "retain_graph": retain_graph,
    "is_grads_batched": batched_gradients,
    "checkpoint, reentrant": checkpointed(True),
    "checkpoint": checkpointed(False),
    "saved_tensors_hooks": inside(
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x)
    ),
    "save_on_cpu": inside(torch.autograd.graph.save_on_cpu),
    "hooks of tensors": hooks_of_tensors,
    "detect_anomaly": inside(torch.autograd.detect_anomaly),
    "use_deterministic_algorithms": inside(deterministic),
    "set_multithreading_enabled(False)": inside(
        lambda: torch.autograd.set_multithreading_enabled(False)
    ),
    "no_grad": no_grad,
    "inference_mode": inference_mode,
    "autocast": autocast,
    "FakeTensorMode": fake_tensors,
    "torch.compile": compiled,
    "torch.export": exported,
    "torch.jit.script": scripted,
    "functional_call": functional_call,
    "DataParallel": data_parallel,
    "DTensor": distributed_tensors,
    "writing an input before backward": written_after_forward,
    "second derivatives": second_derivative,
    "strides and offsets": layouts,
    "threads of Python": python_threads,
    "subclasses of Tensor": subclasses,
    "set_default_device": default_device,
    "set_default_dtype": inside(default_dtype),
}
SLOW = ("torch.compile", "torch.export")  # for a few losses here: the op's own tests have all


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("case", CASES)
def test_the_right_number_or_an_error(case: str, mechanism: str) -> None:
    if mechanism == "second derivatives" and case in TWICE:
        pytest.skip("has them: test_transforms compares them")
    if mechanism in SLOW and case not in ("nt_xent", "info_nce queue", "siglip", "sup_con"):
        pytest.skip("compiled in the tests of its op")
    loss = CASES[case]
    with warnings.catch_warnings():
        if mechanism == "detect_anomaly":
            warnings.simplefilter("ignore")  # torch says that it is slow
        MECHANISMS[mechanism](lambda *x: loss(sslkernels, *x))


def test_the_page_lists_the_mechanisms() -> None:
    page = Path(__file__).parents[1].joinpath("docs/torch.md").read_text("utf-8")
    table = page.split("<!-- mechanisms -->")[1].split("<!--")[0]
    listed = re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)[1:]
    assert [name.replace("`", "") for name in listed] == list(MECHANISMS)


# ---- evaluation first, and updates under a default device ----------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_evaluation_in_inference_mode_may_come_first(case: str) -> None:
    """Numbers as arguments that the process has not used before."""
    loss = CASES[case]
    temperature = 0.3 + torch.rand((), dtype=torch.float64).item() / 3
    call = lambda *x: loss(sslkernels, *x, temperature)  # noqa: E731
    with torch.inference_mode():
        first = call(*(x.detach() for x in leaves()[:2]))
    x = leaves()[:2]
    value = call(*x)
    value.backward()
    torch.testing.assert_close(value.detach(), first.clone())


def test_updates_under_a_default_device() -> None:
    torch.manual_seed(0)
    network = nn.Linear(3, 4)
    ema, queue = sslkernels.EMA(network, 0.5), sslkernels.KeyQueue(8, 3)
    keys = torch.randn(5, 3)
    with torch.device("meta"):
        network_step = network.weight.detach() + 1
        network.weight.data.copy_(network_step)
        ema.update(network)
        queue.enqueue(keys)
        state = {**ema.state_dict(), **queue.state_dict()}
        sslkernels.ema_update_([network.weight.data], [network_step], 0.5)
    assert not any(x.is_meta for x in state.values())
    torch.testing.assert_close(ema.module.weight.detach(), network_step - 0.5)
    torch.testing.assert_close(queue.keys[:5], nn.functional.normalize(keys))
    with torch.device("meta"):
        total = sslkernels.cached_step(network, [keys, keys + 1], sslkernels.nt_xent_loss, 2)
    assert not total.is_meta and network.weight.grad is not None


# ---- modules ------------------------------------------------------------------------------------


MODULES: dict[str, Callable[[], nn.Module]] = {
    "NTXentLoss": lambda: sslkernels.NTXentLoss(torch.tensor(0.2)),
    "DCLLoss": lambda: sslkernels.DCLLoss(nn.Parameter(torch.tensor(0.3))),
    "MoCoLoss": lambda: sslkernels.MoCoLoss(queue_size=16, dim=5),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_modules_compute_the_same(name: str, copied: Callable[[Any], Any]) -> None:
    module = MODULES[name]()
    x, y, _ = (leaf.detach() for leaf in leaves())
    before = module(x, y)
    twin = copied(module)
    after, again = module(x + 1, y), twin(x + 1, y)
    assert torch.equal(after, again) and not torch.equal(before, after)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {
        k: v.shape for k, v in module.state_dict().items()
    }
    if any(p.requires_grad for p in module.parameters()):
        moved = {k: v.detach() * 1.1 for k, v in module.named_parameters()}
        swapped = torch.func.functional_call(module, moved, (x, y))
        assert not torch.equal(swapped, twin(x, y))


def test_a_graph_that_is_dropped_frees_what_it_kept() -> None:
    """References to nodes go round through Python; nothing keeps them alive."""
    freed: list[int] = []
    for case in CASES:
        x = leaves()
        value = CASES[case](sslkernels, *x)
        assert value.grad_fn is not None
        value.grad_fn.metadata["marker"] = _Marker(freed)
        del value
    gc.collect()
    assert len(freed) == len(CASES)


class _Marker:
    def __init__(self, freed: list[int]) -> None:
        self.freed = freed

    def __del__(self) -> None:
        self.freed.append(1)
