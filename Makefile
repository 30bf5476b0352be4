# make demo      install, prepare the built-in corpora, train a ladder of small runs, fit a law, predict
#                a larger run, train that on 2 processes (with a stop and a resume), report
# make test      install and run the tests (minutes); make test-all adds the slow ones
# make gpu       on a machine with a GPU: the tests that need one, then training speed beside other
#                frameworks' (minutes; benchmarks/README.md)
# make check     linters and type checks
# make docs      build the documentation's site (build/site) without warnings, and check that links, commands,
#                keys and code of the pages hold; make site builds it only
# make gallery   train small runs of every kind and write docs/gallery.md and its pictures (minutes)
# make reference write docs/configuration.md from the models of configs/
#
# TORCH_INDEX    a package index for torch, where the default one would bring a CUDA build that
#                this machine has no use for: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
LADDER := ladders/demo
TARGET := $(LADDER)/configs/target-w128-d786432-s0.yaml
TORCHRUN := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 --master-addr 127.0.0.1

.PHONY: demo gallery test test-all gpu check format reference site docs install clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: apt install python3.11"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "no virtual environment could be made; on Debian or Ubuntu: apt install python3-venv"; exit 2; }
	$(PIP) install --quiet -c constraints.txt pip setuptools wheel
	$(PIP) install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@# Oracles of the tests; what they declare to need (torchvision, bitsandbytes) is not what is used.
	$(PIP) install --quiet --no-deps -c constraints.txt mup apollo-torch muon-optimizer sgd-sai
	@touch $@

demo: install
	$(BIN)/allometry prepare builtin:python-code builtin:python-prose --out store/ladder --vocab-size 2048
	rm -rf $(LADDER)
	$(BIN)/allometry ladder run preset:ladder_demo --only rungs
	@echo "--- the law of these runs, and what it says of a larger one that nobody has trained ---"
	$(BIN)/allometry ladder fit preset:ladder_demo
	$(BIN)/allometry ladder predict preset:ladder_demo
	@echo "--- now it is trained, on two processes, and stopped halfway ---"
	$(TORCHRUN) -m allometry.launch.train $(TARGET) batch.micro_batch_sequences=4 --stop-at-step 384
	@echo "--- the same command again: it goes on from the checkpoint ---"
	$(TORCHRUN) -m allometry.launch.train $(TARGET) batch.micro_batch_sequences=4
	@echo "--- predicted against measured ---"
	$(BIN)/allometry ladder predict preset:ladder_demo
	$(BIN)/allometry report $(LADDER) --out $(LADDER)/report.html

gallery: install
	PYTHON=$(BIN)/python examples/gallery/runs.sh
	$(BIN)/allometry gallery gallery --out docs/gallery.md

# Tests of one process run two at a time; those of several ranks have the machine to themselves.
UNIT := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/unit
REST := $(BIN)/python -m pytest tests/dist tests/gpu

test: install
	$(UNIT) -m "not slow"
	$(REST) -m "not slow"

test-all: install
	$(UNIT)
	$(REST)

gpu: install
	$(BIN)/python -m pytest -q tests/gpu tests/unit/models/test_models_cuda.py tests/dist/test_dist_cuda.py tests/dist/test_dist_cuda_layouts.py
	$(BIN)/python benchmarks/gpu/throughput.py
	$(BIN)/python benchmarks/loss_memory.py --device cuda
	$(BIN)/python benchmarks/gpu/kernels.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy -p allometry

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: install
	$(BIN)/python -m allometry.configs.reference docs/configuration.md

$(VENV)/.docs-installed: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

site: $(VENV)/.docs-installed
	$(BIN)/mkdocs build --strict

docs: site
	$(BIN)/python -m pytest -q tests/unit/test_docs*.py tests/unit/configs/test_configs_reference.py

clean:
	rm -rf runs ladders gallery store build *.egg-info .pytest_cache .mypy_cache .ruff_cache
