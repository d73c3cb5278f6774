# Every target does all of its own set-up; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: help demo test docs lint types imports unit notebooks bench fuzz mutants hooks dist oldest clean

FUZZ_SECONDS ?= 3600
TEST_PROCESSES ?= 2
OLDEST_PYTHON ?= $(PYTHON)
OLDEST_TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
PINNED = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(READY) ## a leak, the lock, the masks: pictures and a report in runs/demo
	$(BIN)/fedkl demo --out runs/demo

test: lint types imports unit ## all that CI runs

docs: $(READY) ## the documentation as a site, in site/
	$(RUN) $(BIN)/sphinx-build --quiet --fail-on-warning -b html -d build/doctrees docs site
	@echo site/index.html

lint: $(READY) ## ruff, formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy --strict
	$(BIN)/mypy

imports: $(READY) ## imports go downwards only
	$(BIN)/lint-imports

# Two processes of one thread each: a core each on the smallest machine that this is meant for.
# Bytecode is kept: some tests start processes, and each would compile the package again.
unit: $(READY) ## the tests
	PYTHONDONTWRITEBYTECODE= $(RUN) $(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadscope --no-loadscope-reorder

notebooks: $(READY) ## executes examples/notebooks, and stores what their cells give
	$(RUN) $(BIN)/python -m tests.notebooks

bench: $(READY) ## what a lock costs a step
	$(RUN) $(BIN)/python benchmarks/lock_overhead.py

# Goes on where the last one stopped; findings are in .fuzz. Coverage-guided where atheris installs.
fuzz: $(READY) ## hostile files and messages, for FUZZ_SECONDS
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: "$$(grep '^atheris==' constraints.txt)"
	$(RUN) $(BIN)/python -m tests.fuzzing --seconds $(FUZZ_SECONDS)

# Takes protections out of a copy, one by one: the tests must fail each time.
mutants: $(READY) ## tests find protections that were taken out
	$(RUN) $(BIN)/python -m tests.mutants

hooks: $(READY) ## git runs lint, types and imports before each commit
	$(PINNED) pre-commit
	$(BIN)/pre-commit install

# What is on a package index for others to install, each file tried in an environment of its own.
dist: $(READY) ## sdist and wheel in dist/, checked and tried
	$(PINNED) build twine
	$(BIN)/python -m tests.distribution

# PyTorch itself stays the pinned one: an older one may bring gigabytes of CUDA libraries. With a CPU build at hand:
# make oldest OLDEST_TORCH=2.6.0 OLDEST_PYTHON=python3.10
oldest: $(READY) ## the wheel with the oldest dependencies that it claims
	$(PINNED) build twine uv
	$(BIN)/python -m tests.distribution --oldest --python $(OLDEST_PYTHON) --torch $(OLDEST_TORCH)

# torch first and pinned: a bare `torch` may bring gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean: ## removes what the others made
	rm -rf $(VENV) runs build dist site jupyter_execute docs/made .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
