# make demo      install, prepare the built-in corpora, train on 2 processes, resume, plot
# make test      install and run the tests (minutes); make test-all adds the slow ones
# make check     linters and type checks
# make docs      check that the documentation's links and commands hold
#
# TORCH_INDEX    a package index for torch, where the default one would bring a CUDA build that
#                this machine has no use for: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
STORE := store/demo
TORCHRUN := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 --master-addr 127.0.0.1

.PHONY: demo test test-all check format docs install clean

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
	$(BIN)/allometry prepare builtin:python-code builtin:python-prose --out $(STORE) --vocab-size 4096
	rm -rf runs/demo
	$(TORCHRUN) -m allometry.launch.train preset:demo --stop-at-step 80
	@echo "--- the same command again: it goes on from the checkpoint ---"
	$(TORCHRUN) -m allometry.launch.train preset:demo
	$(BIN)/allometry plot runs/demo --out runs/demo/loss.png

test: install
	$(BIN)/python -m pytest -m "not slow"

test-all: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy -p allometry.configs -p allometry.scaling -p allometry.laws \
	  -p allometry.data -p allometry.optim

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/python -m pytest tests/unit/test_docs.py -q

clean:
	rm -rf runs store build *.egg-info .pytest_cache .mypy_cache .ruff_cache
