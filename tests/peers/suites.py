# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of other libraries, from checkouts of their repositories, without and with the patch.

    git clone --branch v1.5.26 https://github.com/lightly-ai/lightly CHECKOUTS/lightly    (see SUITES)
    make test-peers-suites CHECKOUTS=folder [ARGS="lightly open_clip"]

Every test that passes with the library's class must pass with ours; KNOWN lists those that can't, because
they hold the library to what ours improves on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Suite:
    """Tests of one library.

    Args:
        repository: owner/name, of the usual host.
        tag: What was checked out; the library's own code of that tag is what is tested.
        tests: Files in the checkout, those that use the classes.
        source: Folder of the checkout that holds the package; None tests the installed release.
        patch: Names for ``sslkernels.patch``.
        env: More environment variables.
        prepare: Puts what the tests would download into the folder that they run in.
        checkout: Name of the folder; that of the suite by default.
    """

    repository: str
    tag: str
    tests: tuple[str, ...]
    source: str | None
    patch: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None
    checkout: str | None = None


def small_bert(names: tuple[str, ...], checkout: Path) -> None:
    """A small random DistilBERT that reads letters, in the place of models with these names."""
    import tokenizers
    import torch
    import transformers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = {t: i for i, t in enumerate([*special, *letters, *(f"##{c}" for c in letters)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, vocabulary[t]) for t in ("[CLS]", "[SEP]")]
    )
    tokens = {f"{t.strip('[]').lower()}_token": t for t in special}
    reader = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, **tokens
    )
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=len(vocabulary),
        dim=128,
        hidden_dim=256,
        n_heads=4,
        n_layers=2,
        max_position_embeddings=64,
    )
    model = transformers.DistilBertModel(config)
    for folder in (checkout / name for name in names):
        reader.save_pretrained(folder)
        model.save_pretrained(folder)


def bare_package(checkout: Path) -> None:
    """A package of tests that imports nothing: what it does is of no use to these files."""
    (checkout / "tests/__init__.py").write_text("", "utf-8")


LIGHTLY = (
    "tests/loss/test_ntx_ent_loss.py",
    "tests/loss/test_dcl_loss.py",
    "tests/loss/test_negative_cosine_similarity.py",
    "tests/models/modules/test_memory_bank.py",
    "tests/models/test_ModelUtils.py",
    "tests/models/test_ModelsNNCLR.py",
)
PML = Suite(
    "KevinMusgrave/pytorch-metric-learning",
    "v2.8.1",
    (
        "tests/losses/test_ntxent_loss.py",
        "tests/losses/test_contrastive_loss.py",
        "tests/losses/test_triplet_margin_loss.py",
        "tests/losses/test_cross_batch_memory.py",
        "tests/losses/test_self_supervised_loss.py",
        "tests/losses/test_losses_without_labels.py",
        "tests/losses/test_multiple_losses.py",
        "tests/miners/test_batch_hard_miner.py",
        "tests/reducers/test_setting_reducers.py",
        "tests/distances/test_custom_check_shape.py",
        "tests/utils/test_module_with_records_and_reducer.py",
    ),
    "src",
    ("pytorch_metric_learning",),
    {"TEST_DEVICE": "cpu", "TEST_DTYPES": "float32,float64"},
    checkout="pytorch_metric_learning",
)
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # tests get a small random model instead of those on the hub
# Releases whose tests are not to be had (no tag, and no tests in the source archive) run the newest
# tests that are: the suites with source None.
SUITES = {
    "lightly": Suite("lightly-ai/lightly", "v1.5.26", LIGHTLY, ".", ("lightly",)),
    # The release has no NNCLR any more.
    "lightly_main": Suite("lightly-ai/lightly", "e8d317fc", LIGHTLY[:-1], None, ("lightly",)),
    "pytorch_metric_learning": PML,
    "pytorch_metric_learning_release": replace(PML, source=None),
    "open_clip": Suite(
        "mlfoundations/open_clip",
        "v3.3.0",
        ("tests/test_training_simple.py",),
        "src",
        ("open_clip",),
        OFFLINE,
    ),
    "open_clip_main": Suite(
        "mlfoundations/open_clip",
        "89fb801f",
        (
            "tests/test_loss.py",
            "tests/test_siglip_chunked_loss.py",
            "tests/test_task_specific_unit.py",
            "tests/test_factory_task.py",
        ),
        "src",
        ("open_clip",),
        OFFLINE,
    ),
    "sentence_transformers": Suite(
        "UKPLab/sentence-transformers",
        "v5.1.2",
        ("tests/test_cmnrl.py",),
        None,
        ("sentence_transformers",),
        OFFLINE,
        prepare=partial(small_bert, ("distilbert-base-uncased",)),
    ),
    "sentence_transformers_main": Suite(
        "huggingface/sentence-transformers",
        "cad21198",
        tuple(
            f"tests/sentence_transformer/losses/test_{name}.py"
            for name in (
                "cmnrl",
                "cached_mnsrl",
                "contrastive",
                "gradcache",
                "matryoshka",
                "merged_forward",
                "triplet",
            )
        ),
        None,
        ("sentence_transformers",),
        OFFLINE,
        prepare=partial(
            small_bert,
            (
                "distilbert/distilbert-base-uncased",
                "sentence-transformers-testing/stsb-bert-tiny-safetensors",
            ),
        ),
    ),
    "solo_learn": Suite(
        "vturrisi/solo-learn",
        "1.0.8",
        tuple(
            f"tests/{folder}/test_{name}.py"
            for folder in ("losses", "methods")
            for name in ("simclr", "mocov2plus", "byol", "mocov3")
        ),
        ".",
        ("solo_learn",),
        {"SSLKERNELS_PATCH_FORCE": "1"},  # a checkout that is not installed has no version
    ),
    "monai": Suite(
        "Project-MONAI/MONAI",
        "1.5.0",
        ("tests/losses/test_contrastive_loss.py",),
        None,
        ("monai",),
    ),
    "catalyst": Suite(
        "catalyst-team/catalyst",
        "v22.04",
        ("tests/contrib/nn/test_criterion.py",),
        None,
        ("catalyst",),
        prepare=bare_package,
    ),
    "torch_ema": Suite(
        "fadel/pytorch_ema",
        "v0.3.0",
        ("tests/test_ema.py", "tests/test_state_dict.py"),
        None,
        ("torch_ema",),
    ),
    "torch": Suite(
        "pytorch/pytorch",
        "045a976c",
        ("test/optim/test_swa_utils.py",),
        None,
        ("torch",),
    ),
}

# Tests that pass with the library's class and can't with ours: the improvement that they contradict.
KNOWN = {
    "lightly": {
        "tests.models.modules.test_memory_bank.TestMemoryBank::test_forward": "the tail of a batch that "
        "wraps is written to the front of the bank, where lightly drops it"
    },
    "sentence_transformers_main": {
        "tests.sentence_transformer.losses.test_gradcache::test_gradcache_under_autocast": "the loss is "
        "float32, as under autocast on GPUs, where torch's on the CPU is bfloat16; the test's premise"
    },
}
KNOWN["lightly_main"] = KNOWN["lightly"]


def run(suite: Suite, checkout: Path, patched: bool, python: str) -> dict[str, str]:
    """Outcomes of the tests by id.

    Raises:
        SystemExit: pytest wrote no report.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = checkout.resolve()
        roots = [HERE, ROOT, ROOT / "python"]
        if suite.source is not None:
            roots.insert(0, folder / suite.source)
        else:  # away from the library's code, which would be found first
            folder = Path(name, "checkout")
            for top in {Path(test).parts[0] for test in suite.tests}:
                shutil.copytree(checkout / top, folder / top)
        if suite.prepare is not None:
            suite.prepare(folder)
        env = {
            **os.environ,
            **suite.env,
            "PYTHONPATH": os.pathsep.join(map(str, roots)),
            "SSLKERNELS_PATCH": ",".join(suite.patch) if patched else "",
        }
        report = Path(name, "report.xml")
        command = [python, "-m", "pytest", "-q", "-p", "patch_plugin", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", *suite.tests]
        done = subprocess.run(
            command,
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if not report.exists():
            raise SystemExit(f"{done.stdout}\nsuites: no test of {checkout} was run")
        return outcomes(report.read_text("utf-8"))


def outcomes(report: str) -> dict[str, str]:
    """passed, failed or skipped by test, of a report in JUnit's form; parts of a test count together."""
    found: dict[str, str] = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        kinds = {child.tag for child in case}
        result = (
            "failed"
            if kinds & {"failure", "error"}
            else "skipped"
            if "skipped" in kinds
            else "passed"
        )
        name = f"{case.get('classname')}::{case.get('name')}"
        if found.get(name) != "failed":
            found[name] = result
    return found


def broken(without: dict[str, str], patched: dict[str, str]) -> list[str]:
    """Tests that pass with the library's class and do not with ours."""
    return [name for name, how in without.items() if how == "passed" != patched.get(name)]


def main() -> int:
    """Run the suites whose checkouts are there and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkouts", type=Path, help="folder that holds a checkout for each name")
    parser.add_argument(
        "names", nargs="*", help=f"of {', '.join(SUITES)}; default: all that are there"
    )
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    places = {name: args.checkouts / (suite.checkout or name) for name, suite in SUITES.items()}
    names = args.names or [name for name, place in places.items() if place.is_dir()]
    unknown = sorted(set(names) - set(SUITES))
    if unknown or not names:
        parser.error(
            f"names must be of {sorted(SUITES)} with a folder in {args.checkouts}, got {unknown}"
        )
    print("| library | tests at | passed without | passed with | failed without | failed with |")
    print("|---|---|---|---|---|---|", flush=True)
    bad = 0
    for name in names:
        suite = SUITES[name]
        both = [run(suite, places[name], patched, args.python) for patched in (False, True)]
        count = [[list(o.values()).count(how) for o in both] for how in ("passed", "failed")]
        if not count[0][0]:
            raise SystemExit(f"suites: no test of {name} passes without the patch: {both[0]}")
        print(
            f"| {name} | {suite.repository} {suite.tag} | {count[0][0]} | {count[0][1]} "
            f"| {count[1][0]} | {count[1][1]} |",
            flush=True,
        )
        for test in broken(*both):
            reason = KNOWN.get(name, {}).get(test.partition("[")[0])
            print(
                f"  {'expected: ' + reason if reason else 'BROKEN'}: {test}",
                file=sys.stderr,
                flush=True,
            )
            bad += reason is None
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
