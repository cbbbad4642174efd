# SPDX-License-Identifier: Apache-2.0
"""The documentation: its code runs, its drawings and figures are what the project says and does."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import HANGS_S, threads
from peaks import Training

import sslkernels
from sslkernels import reference

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Those of docs/migration need the library they are about: tests/peers runs them.
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in DOCS.rglob("*.md")
    if path.parent.name != "migration" and "```python" in path.read_text("utf-8")
)


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", DOCS.joinpath(page).read_text("utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_the_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one script from top to bottom; a warning is an error, as everywhere in these tests."""
    monkeypatch.chdir(tmp_path)
    # A module of its own, for what looks up where a function was defined.
    module = types.ModuleType("docs_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = torch.get_rng_state()
    try:
        for n, source in enumerate(blocks(page)):
            exec(compile(source, f"{page}, block {n + 1}", "exec"), module.__dict__)
    finally:
        torch.set_rng_state(state)
        sslkernels.unpatch()


def test_no_code_hides_from_the_tests() -> None:
    """Python is written as ```python."""
    for path in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        fences = re.findall(r"^ *```(\S+)$", path.read_text("utf-8"), re.MULTILINE)
        assert not set(fences) - {"python", "bash", "sh", "yaml", "math"}, path.name


def test_every_loss_has_a_page() -> None:
    listed = DOCS.joinpath("losses/index.md").read_text("utf-8")
    code = "".join("".join(blocks(page)) for page in PAGES if page.startswith("losses/"))
    losses = [name for name in sslkernels.__all__ if name.endswith("_loss")]
    assert len(losses) > 10
    for name in losses:
        assert f"`{name}`" in listed and re.search(rf"\b{name}\b", code + listed), name


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("losses/*.md")))
def test_the_page_of_a_loss_names_all_its_arguments(page: str) -> None:
    text = DOCS.joinpath("losses", page).read_text("utf-8")
    code = "".join(blocks(f"losses/{page}"))
    called = set(re.findall(r"sslkernels\.(\w+_loss(?:_symmetric)?)\(", code))
    assert called or page == "index.md"
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", prose))))
    for name in called:
        missing = set(inspect.signature(getattr(sslkernels, name)).parameters) - named
        assert not missing, f"{name}: {missing}"


def test_the_formulas_of_the_article_are_here() -> None:
    """Functions, options and tests that docs/article.md names."""
    text = (DOCS / "article.md").read_text("utf-8")
    lines = [line for line in text.splitlines() if "`test_" in line]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert len(rows) == 18
    options = 0
    for _, here, *rest, test in rows:
        named = [n.removeprefix("metrics.") for n in re.findall(r"`([\w.]+)`", here)]
        names = [n for n in named if hasattr(sslkernels, n) or hasattr(sslkernels.metrics, n)]
        assert names or "`ssltrain " in here, here
        file, _, name = test.strip("`").partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text("utf-8"), test
        functions = [getattr(sslkernels, n) for n in names if hasattr(sslkernels, n)]
        arguments = {a for f in functions for a in inspect.signature(f).parameters}
        for option in re.findall(r"`(\w+)(?:=[^`]*)?`", rest[-1]) if len(rest) == 2 else ():
            assert option in arguments or hasattr(sslkernels, option), (here, option)
            options += 1
    assert options > 15


def test_the_reference_has_every_public_name() -> None:
    described = "".join(path.read_text("utf-8") for path in DOCS.glob("api/*.md"))
    names = set(re.findall(r"^::: \S+\.(\w+)$", described, re.MULTILINE))
    modules = {"functional", "metrics", "reference"}
    assert set(sslkernels.__all__) - modules - {"__version__"} <= names


def test_drawings_are_what_their_program_draws() -> None:
    spec = importlib.util.spec_from_file_location("drawings", DOCS / "site/drawings.py")
    assert spec is not None and spec.loader is not None
    drawings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawings)
    drawn = drawings.drawings()
    committed = {path.name: path.read_text("utf-8") for path in DOCS.glob("assets/*.svg")}
    assert drawn == committed, "run docs/site/drawings.py"
    # The tournament: every pair of groups once, no group twice in a round.
    pairs = [p for games in drawings.rounds(6) for p in games]
    assert len(set(pairs)) == len(pairs) == 6 * 7 // 2
    for games in drawings.rounds(6)[1:]:
        assert sorted(sum(games, ())) == list(range(6))


def test_pictures_are_shown_and_described() -> None:
    shown = set()
    for path in DOCS.rglob("*.md"):
        for words, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", path.read_text("utf-8")):
            assert len(words) > 10, f"{path.name}: {target} has no description"
            shown.add((path.parent / target).resolve())
    assert {path for path in DOCS.glob("assets/*.svg")} <= shown


def test_pages_load_nothing_from_elsewhere() -> None:
    for path in [*DOCS.glob("assets/*"), *DOCS.rglob("*.md")]:
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"<(script|link|img|iframe)[^>]*https?://|url\(https?:|@import", text)
        assert path.suffix == ".md" or "http" not in text, path.name
    assert "font: false" in DOCS.joinpath("site/mkdocs.yml").read_text("utf-8")


# ---- the memory page ---------------------------------------------------------------------------

ROW = r"^\| (`[^|]+) \| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$"
TABLE = {
    name.replace("`", ""): (float(matrices), float(factor), float(fixed))
    for name, _, matrices, factor, fixed in re.findall(
        ROW, DOCS.joinpath("memory.md").read_text("utf-8"), re.MULTILINE
    )
}
KEYS = 4  # times as many keys in the queue as queries


def training(name: str, module: types.ModuleType, n: int, d: int) -> Training:
    """N as the page counts it."""
    a, b = torch.nn.functional.normalize(torch.randn(2, n, d), dim=2)
    labels = torch.arange(n) % 10
    if name == "info_nce_loss with a queue":
        queue = torch.nn.functional.normalize(torch.randn(KEYS * n, d))
        return Training(lambda x: module.info_nce_loss(x, b, queue), a)
    if name in ("nt_xent_loss", "dcl_loss"):
        return Training(getattr(module, name), a[: n // 2], b[: n // 2])
    if name in ("sup_con_loss", "triplet_loss"):
        return Training(lambda x: getattr(module, name)(x, labels), a)
    if name == "uniformity_loss":
        return Training(module.uniformity_loss, a)
    if name == "clip_loss":
        return Training(lambda x, y: module.clip_loss(x, y, 10.0, normalize=True), a, b)
    if name == "siglip_loss":
        return Training(lambda x, y: module.siglip_loss(x, y, 10.0, -10.0, normalize=True), a, b)
    assert name == "info_nce_loss"
    return Training(lambda x, y: module.info_nce_loss(x, y), a, b)


def test_the_table_has_all_losses() -> None:
    assert len(TABLE) == 9


@pytest.mark.skipif(find_spec("sslkernels._C") is None, reason="the extension is not built")
@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_memory_is_right_to_a_third(name: str, tmp_path: Path) -> None:
    matrices, factor, fixed = TABLE[name]
    n, d = 2560, 96
    with threads(2):
        counted = training(name, sslkernels, n, d).peak(tmp_path)
    said = factor * n * d * 4 + fixed * 2**20
    assert 3 / 4 < counted / said < 4 / 3, f"{counted / 2**20:.1f} MiB for {said / 2**20:.1f}"
    n, d = 512, 4  # few features: the matrices are nearly all
    plain = training(name, reference, n, d).peak(tmp_path)
    columns = KEYS * n if "queue" in name else n
    assert 3 / 4 < plain / (matrices * n * columns * 4) < 4 / 3


def test_the_calculator_computes_what_the_table_says() -> None:
    """In node, where there is one; a browser runs the same file."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here")
    row = {"matrices": 4.8, "factor": 4.2, "fixed": 0.2}
    script = (
        f"const c = require({json.dumps(str(DOCS / 'assets/calculator.js'))});"
        f"const b = c.bytes({json.dumps(row)}, 8192, 8192, 128);"
        "console.log(JSON.stringify([b.plain, b.ours, c.readable(b.plain), c.readable(900)]));"
    )
    done = subprocess.run(
        [node, "-e", script], capture_output=True, text=True, check=True, timeout=HANGS_S
    )
    plain, ours, words, few = json.loads(done.stdout)
    assert plain == pytest.approx(4.8 * 8192**2 * 4)
    assert ours == pytest.approx(4.2 * 8192 * 128 * 4 + 0.2 * 2**20)
    assert (words, few) == ("1.2 GiB", "900 bytes")
    page = DOCS.joinpath("memory.md").read_text("utf-8")
    used = re.findall(r'find\("(\w+)"\)', DOCS.joinpath("assets/calculator.js").read_text("utf-8"))
    assert used and all(f'id="{name}"' in page for name in used)


# ---- factors between codes, on the pages of losses ---------------------------------------------


def test_factors_to_the_codes_of_papers() -> None:
    """Their formulas, written out; the libraries themselves are compared in tests/peers."""
    cross_entropy, unit = torch.nn.functional.cross_entropy, torch.nn.functional.normalize
    torch.manual_seed(0)
    n, t = 12, 0.3
    a, b, c, d = (unit(torch.randn(n, 8, dtype=torch.float64)) for _ in range(4))
    diagonal, far = torch.arange(n), torch.eye(n) * 1e9

    # SimCLR: cross-entropies of both directions, each over [other view | own view], are added.
    simclr = sum(
        cross_entropy(torch.cat([x @ y.T / t, x @ x.T / t - far], 1), diagonal)
        for x, y in ((a, b), (b, a))
    )
    assert torch.allclose(simclr, 2 * sslkernels.nt_xent_loss(a, b, t))

    # MoCo v3: both directions times 2 t.
    moco3 = sum(cross_entropy(q @ k.T / t, diagonal) * 2 * t for q, k in ((a, b), (c, d)))
    ours = sslkernels.info_nce_loss(a, b, temperature=t)
    ours = ours + sslkernels.info_nce_loss(c, d, temperature=t)
    assert torch.allclose(moco3, ours * 2 * t)

    # SupContrast: the mean log-probability of positives, times t / 0.07.
    labels = torch.arange(n) % 3
    logits = (a @ a.T / t).masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
    partners = (labels[:, None] == labels) & ~torch.eye(n, dtype=torch.bool)
    log_probability = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~partners, 0)
    sup_contrast = -(t / 0.07) * (log_probability.sum(1) / partners.sum(1)).mean()
    assert torch.allclose(sup_contrast, sslkernels.sup_con_loss(a, labels, t) * t / 0.07)

    # BYOL: both views added; lightly's negative cosine.
    cosines = [(p * z).sum(1) for p, z in ((a, b), (c, d))]
    byol = sum((2 - 2 * cosine).mean() for cosine in cosines)
    assert torch.allclose(byol, sslkernels.byol_loss_symmetric(a, b, c, d))
    negative_cosine = -cosines[0].mean()
    assert torch.allclose(negative_cosine, sslkernels.byol_loss(a, b) / 2 - 1)

    # A temperature is one over CLIP's scale.
    clip = (cross_entropy(a @ b.T / t, diagonal) + cross_entropy(b @ a.T / t, diagonal)) / 2
    assert torch.allclose(clip, sslkernels.clip_loss(a, b, 1 / t))
