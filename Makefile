# Two commands: `make quickstart` and `make test`. Everything is installed into .venv; nothing is compiled.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCK := -c requirements/lock.txt
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.PHONY: help install quickstart test multinode lint bench clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' Makefile | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.installed: requirements/requirements.txt requirements/lock.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "deepy needs Python 3.11 to 3.13, and $(PYTHON) is another. Run: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing into $(VENV) (torch and deepspeed are the large ones; nothing is compiled) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "python3 -m venv failed. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(PIP) install --quiet $(LOCK) torch setuptools
	@$(PIP) install --quiet $(LOCK) -r requirements/requirements.txt
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements/dev.txt requirements/wandb.txt requirements/tensorboard.txt requirements/s3.txt
	@$(PIP) install --quiet $(LOCK) -r requirements/dev.txt
	@touch $@

install: $(VENV)/.installed  ## make .venv and install the library into it

quickstart: $(VENV)/.installed  ## prepare data, train, plot, generate and export: ten minutes on two CPU cores
	@$(BIN)/python tools/quickstart.py

lint: $(VENV)/.installed-dev  ## ruff, mypy and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## lint, then the whole test suite
	$(BIN)/python -m pytest -n 2

multinode: $(VENV)/.installed-dev  ## train over two hosts made of namespaces: pdsh, MPI, Slurm, torchrun, failures (root)
	@PYTHON=$(BIN)/python tests/multinode/run

bench: $(VENV)/.installed-dev  ## every benchmark, in its quick form
	@for file in startup data train kernels fp8 checkpoint; do echo "== $$file"; $(BIN)/python benchmarks/$$file.py --quick || exit 1; done

clean:  ## remove caches, but no data, run or checkpoint
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
