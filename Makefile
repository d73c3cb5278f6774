# Two commands do all of their own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: demo test lint types imports unit bench fuzz mutants clean

FUZZ_SECONDS ?= 3600
TEST_PROCESSES ?= 2

demo: $(READY)
	$(BIN)/fedkl demo --out runs/demo

test: lint types imports unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

# Two processes of one thread each: a core each on the smallest machine that this is meant for.
# Bytecode is kept: some tests start processes, and each would compile the package again.
unit: $(READY)
	PYTHONDONTWRITEBYTECODE= $(RUN) $(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadscope --no-loadscope-reorder

bench: $(READY)
	$(RUN) $(BIN)/python benchmarks/lock_overhead.py

# Goes on where the last one stopped; findings are in .fuzz. Coverage-guided where atheris installs.
fuzz: $(READY)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: "$$(grep '^atheris==' constraints.txt)"
	$(RUN) $(BIN)/python -m tests.fuzzing --seconds $(FUZZ_SECONDS)

# Takes protections out of a copy, one by one: the tests must fail each time.
mutants: $(READY)
	$(RUN) $(BIN)/python -m tests.mutants

# torch first and pinned: a bare `torch` may bring gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
