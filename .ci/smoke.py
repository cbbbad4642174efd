# SPDX-License-Identifier: Apache-2.0
"""Uses an installed sslkernels where there is no compiler: ``python -I .ci/smoke.py`` (run by .ci/wheel.py).

With ``--kernels FOLDER`` the module comes from Hugging Face's ``kernels`` instead, once for each backend.
"""

import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import torch


def check(holds: bool, what: str) -> None:
    """Stop with a message unless something holds."""
    if not holds:
        raise SystemExit(f"smoke: {what}")


def use(sslkernels: ModuleType, compiled: bool) -> str:
    """Value and gradient of a loss, a queue and an average; one line about it."""
    facts = sslkernels.info()
    check(
        facts.cpu_extension == compiled, f"the compiled module must be there: {compiled}\n{facts}"
    )
    check(not facts.cuda_extension, "the wheel has no CUDA module")
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 64, 32).unbind()
    mine, truth = z1.clone().requires_grad_(), z1.double().requires_grad_()
    loss = sslkernels.nt_xent_loss(mine, z2, 0.2)
    loss.backward()
    expected = sslkernels.reference.nt_xent_loss(truth, z2.double(), 0.2)
    expected.backward()
    check(abs(loss.item() - expected.item()) < 1e-5, f"nt_xent_loss: {loss} is not {expected}")
    error = (mine.grad.double() - truth.grad).abs().max().item()
    check(error < 1e-6, f"nt_xent_loss: the gradient is off by {error}")

    queue = sslkernels.KeyQueue(96, 32)
    queue.enqueue(z1)
    queue.enqueue(z2)
    check(len(queue) == 96, "a queue of 96 is full after 128 keys")
    last = torch.nn.functional.normalize(z2, dim=1)[-1]
    check(bool((queue.keys - last).abs().amax(dim=1).min() < 1e-6), "the last key is in the queue")

    online = torch.nn.Linear(4, 3)
    average = sslkernels.EMA(online, decay=0.75)
    before = online.weight.detach().clone()
    with torch.no_grad():
        online.weight += 1.0
    average.update(online)
    error = (average.module.weight - (before + 0.25)).abs().max().item()
    check(error < 1e-6, f"EMA: the weights are off by {error}")
    return f"{facts.isa or 'no compiled module'}, loss {loss.item():.6f}"


def runtimes() -> list[str]:
    """OpenMP runtimes in this process."""
    maps = Path("/proc/self/maps").read_text()
    return sorted(set(re.findall(r"\S*/lib(?:gomp|omp|iomp5)[^\s/]*\.so\S*", maps)))


def main() -> None:
    """Do all of it and print a line."""
    found = [name for name in ("cc", "c++", "gcc", "g++", "clang", "nvcc") if shutil.which(name)]
    check(not found, f"there is a compiler: {found}")
    python = ".".join(map(str, sys.version_info[:3]))
    if "--kernels" in sys.argv:
        import kernels

        folder = Path(sys.argv[sys.argv.index("--kernels") + 1])
        module = kernels.get_local_kernel(folder, backend="cpu")
        check("sslkernels" not in sys.modules, "the kernel must not import an installed sslkernels")
        result = use(module, compiled=True)
        where = f"{module.__name__} by kernels {kernels.__version__}"
    else:
        import sslkernels

        where = str(sslkernels.__file__)
        check(where.startswith(sys.prefix), f"sslkernels comes from {where}")
        result = use(sslkernels, compiled=True)
    check(len(runtimes()) == 1, f"one OpenMP runtime must be loaded, got {runtimes()}")
    print(f"smoke: Python {python}, torch {torch.__version__}, {where}: {result}, {runtimes()[0]}")


if __name__ == "__main__":
    main()
