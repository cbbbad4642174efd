# Everything is set up in .venv with the versions of constraints.txt, on the first call and again when
# a file that it depends on has changed.  `make help` lists the targets.
#
#   PYTHON=python3.12     another interpreter (3.10 or newer; the pins are for 3.11 and newer)
#   PIP_FLAGS="..."       flags for every `pip install`, for example an index with CPU builds of torch
#   ARGS="..."            more arguments for train, test, bench
#   JOBS=N                processes of the tests (as many as cores, at most 4; 0: in one, which -s and --pdb need)

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The first interpreter that is new enough and can make a virtual environment.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
# Other libraries' classes need torchvision, which needs a torch of its own.
PEERS := .venv-peers
# What the tests and scripts of these libraries import beside what the libraries ask for: of torch,
# sentence-transformers and open_clip; of lightly 1.5; of solo-learn; of MONAI.
PEERS_IMPORT := pytest-mock expecttest datasets faiss-cpu braceexpand webdataset pandas \
	aenum certifi lightly_utils requests urllib3 lightning parameterized
# What builds and checks packages, and pyright.
TOOLS := .venv-tools
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input \
	--prefer-binary --retries 5 --timeout 60 -c constraints.txt $(PIP_FLAGS)
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))
# Threads of two processes that wait for each other on the same cores must not spin.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
# The CUDA module is compiled where nvcc is found (10 s on two cores); it needs no GPU to be compiled.
export SSLKERNELS_CUDA ?= auto

PYTHON_FILES := sslkernels python tests benchmarks examples docs/site setup.py .ci csrc
CPP_FILES = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp')
CPU_SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)
ifneq ($(SSLKERNELS_CUDA),0)
CPU_SOURCES += $(wildcard csrc/cuda/*)
endif

# ---- Targets -------------------------------------------------------------------------------------

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: train
train: ## train and evaluate SimCLR, BYOL and MoCo on digits (some minutes); results go to runs/
	@$(MAKE) --no-print-directory -j2 $(VENV)/.train $(VENV)/.build
	$(BIN)/python -m ssltrain demo $(ARGS)
	@echo "results: $(CURDIR)/runs (config, metrics.csv, checkpoint, results, PNG plots, TensorBoard)"
	@echo "next: source $(BIN)/activate, then ssltrain --help"

.PHONY: test
test: test-setup ## run every test
	$(PYTEST) $(ARGS)

.PHONY: test-fast
test-fast: test-setup ## run the tests that take seconds
	$(PYTEST) -m "not slow" $(ARGS)

.PHONY: test-all
test-all: test-setup ## run every test and the campaigns, which take longer than all of them
	$(PYTEST) -m "campaign or not campaign" $(ARGS)

.PHONY: mutants
mutants: test-setup ## break the kernels in a hundred ways and see tests fail each time (ARGS="-j4 NAME ...")
	$(BIN)/python tests/mutants $(ARGS)

.PHONY: sanitize
sanitize: $(VENV)/.tools $(if $(findstring bindings,$(ARGS)),$(VENV)/.test) ## CPU kernels under the sanitizers for addresses, undefined behaviour and threads (ARGS=bindings: the module)
	$(BIN)/python tests/sanitize $(ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.tools ## wrong calls of the C++ module, chosen by what they reach; needs clang (ARGS="--seconds 600")
	$(BIN)/python tests/sanitize/fuzz.py $(ARGS)

.PHONY: test-peers
test-peers: $(VENV)/.build $(PEERS)/.ready ## compare with the libraries that it stands in for (own environment, 6 GB)
	PYTHONPATH="$(CURDIR):$(CURDIR)/python" $(PEERS)/bin/python -m pytest tests/peers tests/test_integrations.py \
		tests/test_examples.py $(ARGS)

.PHONY: test-peers-suites
test-peers-suites: $(VENV)/.build $(PEERS)/.ready ## run those libraries' own tests, without and with the patch: CHECKOUTS=folder
	$(PEERS)/bin/python tests/peers/suites.py "$(CHECKOUTS)" $(ARGS)

.PHONY: test-peers-scripts
test-peers-scripts: $(VENV)/.build $(PEERS)/.ready ## run those libraries' example scripts as they are and patched: CHECKOUTS=folder
	$(PEERS)/bin/python tests/peers/scripts.py "$(CHECKOUTS)" $(ARGS)

.PHONY: docs
docs: $(VENV)/.docs ## build the documentation into build/site; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict -f docs/site/mkdocs.yml
	@echo "documentation: $(CURDIR)/build/site/index.html"

.PHONY: build
build: $(VENV)/.build ## compile the C++ extension in place (SSLKERNELS_WERROR=1, DEBUG=1, SSLKERNELS_CUDA=1)

.PHONY: wheel
wheel: $(TOOLS)/.ready ## source archive and wheel into dist/, checked, and used where there is no compiler
	$(TOOLS)/bin/python .ci/wheel.py --pip-flags="$(PIP_FLAGS)" $(ARGS)

.PHONY: bench
bench: $(VENV)/.bench ## benchmark against PyTorch and other libraries: the headline table, 2 to 4 minutes
	$(BIN)/python -m benchmarks $(ARGS)

.PHONY: bench-full
bench-full: $(VENV)/.bench ## every benchmark, size and contender
	$(BIN)/python -m benchmarks --full $(ARGS)

.PHONY: gpu-check
gpu-check: test-setup $(VENV)/.gpu-peers ## test and measure on a GPU and write one report; without one, a dry run
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

.PHONY: gpu-report
gpu-report: test-setup ## compile every GPU kernel ahead of time; registers, spills and shared memory to docs
	$(BIN)/python -m benchmarks.gpu_report $(ARGS)

.PHONY: lint
lint: $(VENV)/.test ## check style and types; changes no file
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/mypy

.PHONY: typecheck
typecheck: test-setup $(TOOLS)/.ready ## check with pyright that every public type is complete
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$(CURDIR):$(CURDIR)/python" $(TOOLS)/bin/python .ci/typecheck.py

.PHONY: resolve
resolve: $(VENV)/.tools ## check that the pins can be installed from the public index (metadata only)
	@$(BIN)/python .ci/resolve.py

.PHONY: format
format: $(VENV)/.test ## format Python and C++ files
	$(BIN)/ruff check --fix-only --quiet $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CPP_FILES)

.PHONY: clean
clean: ## remove everything that was built, and .venv; runs/ stays
	rm -rf $(VENV) $(PEERS) $(TOOLS) build dist *.egg-info python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f sslkernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- Set-up --------------------------------------------------------------------------------------

# lightly alone: its dependency torchvision would replace torch by another build.
$(VENV)/.bench: test-setup constraints.txt
	@test -f $@ -a $@ -nt constraints.txt || { $(INSTALL) --no-deps lightly && touch $@; }

# Other libraries' GPU kernels and lightly, alone like above.  The report names what could not be installed.
GPU_PEERS := inf_cl==1.2.1 memeff==0.3.1 siglip-kernel==0.1.2
$(VENV)/.gpu-peers: test-setup Makefile constraints.txt
	@test -f $@ -a $@ -nt Makefile -a $@ -nt constraints.txt || { missing=; \
		for peer in lightly $(GPU_PEERS); do $(INSTALL) --no-deps $$peer || missing="$$missing $$peer"; done; \
		test -z "$$missing" && touch $@ || echo "not installed, and not measured:$$missing" >&2; }

.PHONY: test-setup
test-setup:
	@$(MAKE) --no-print-directory -j2 $(VENV)/.test $(VENV)/.build

# What is needed to compile.  The packages are used in place, and so is the command ssltrain.
$(VENV)/.tools: constraints.txt pyproject.toml .ci/in_place.py
	@test -n "$(PYTHON)" || { echo "make: no Python of 3.10 or newer with the module venv was found;" \
		"install one (Debian: python3-venv) or say PYTHON=..." >&2; exit 2; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) setuptools wheel pybind11
	@$(BIN)/python .ci/in_place.py
	@touch $@

$(VENV)/.train: $(VENV)/.tools
	@echo "installing torch and the packages of the trainers"
	@$(BIN)/python .ci/requirements.py train > $(VENV)/train.txt
	@$(INSTALL) -r $(VENV)/train.txt
	@touch $@

$(VENV)/.test: $(VENV)/.tools
	@echo "installing torch and the packages of trainers and tests"
	@$(BIN)/python .ci/requirements.py train gpu bench dev > $(VENV)/test.txt
	@$(INSTALL) -r $(VENV)/test.txt
	@touch $@ $(VENV)/.train

$(VENV)/.docs: $(VENV)/.tools
	@echo "installing the packages of the documentation"
	@$(BIN)/python .ci/requirements.py docs > $(VENV)/docs.txt
	@$(INSTALL) -r $(VENV)/docs.txt
	@touch $@

$(TOOLS)/.ready: .ci/tools.txt $(VENV)/.tools
	@echo "setting up $(TOOLS): what builds and checks packages"
	@test -x $(TOOLS)/bin/python || $(BIN)/python -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install -qq --disable-pip-version-check --no-input --retries 5 --timeout 60 \
		-r .ci/tools.txt
	@touch $@

$(PEERS)/.ready: constraints-peers.txt pyproject.toml $(VENV)/.tools
	@echo "setting up $(PEERS): torch, torchvision and the libraries to compare with"
	@test -x $(PEERS)/bin/python || $(BIN)/python -m venv $(PEERS)
	@$(BIN)/python .ci/requirements.py lightly pytorch_metric_learning open_clip sentence_transformers \
		info_nce monai catalyst timm torch_ema examples examples_text > $(PEERS)/requirements.txt
	@$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check --no-input --prefer-binary \
		--retries 5 --timeout 60 -c constraints-peers.txt $(PIP_FLAGS) torch torchvision pytest \
		pytest-benchmark $(PEERS_IMPORT) \
		-r $(PEERS)/requirements.txt
	@touch $@

$(VENV)/.build: $(VENV)/.tools $(CPU_SOURCES)
	@echo "compiling the C++ extension (about a minute)"
	@$(BIN)/python setup.py --quiet build_ext --inplace > $(VENV)/build.log 2>&1 \
		|| { cat $(VENV)/build.log >&2; exit 1; }
	@grep -A20 "built without" $(VENV)/build.log >&2 || true
	@touch $@
