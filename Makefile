PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NPROC ?= 2
# Processes that share the tests; many tests start ranks of their own, and some sleep. With a thread each: with
# more, small products take ten times as long.
WORKERS ?= 3
# Tests that every router, method, dispatcher, back end and config passes.
CONTRACTS := tests/test_architecture.py tests/moe tests/kernels/test_kernels_contract.py tests/recipes/config
# Many tests start processes: what they import is compiled once.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS)
# The stamp carries the pins: it is remade when they change, and nothing is installed twice.
STAMP := $(VENV)/.installed

# With a number of threads torchrun does not print that it has chosen one; engine.threads decides in the end.
TRAIN := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node=$(NPROC) train.py

.PHONY: quick upcycle test tests check types lint setup clean

# The whole path in a minute, to see it before you believe it.
quick: $(STAMP)
	$(TRAIN) +recipe=quick $(ARGS)

upcycle: $(STAMP)
	@echo "about 7 minutes on two cores of an AMD EPYC; the run says how long it takes here after its first steps"
	$(TRAIN) +recipe=upcycle $(ARGS)

# The type checker runs beside the tests, which leave a processor free while they import.
test: $(STAMP)
	$(MAKE) --no-print-directory --jobs=2 types tests

tests: $(STAMP)
	$(PYTEST) --dist=loadfile --no-loadscope-reorder $(ARGS)

# Lint, types, and one case of every contract: in a minute or so, before a commit.
check: types $(STAMP)
	$(PYTEST) --dist=load --first $(CONTRACTS) $(ARGS)

types: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

setup: $(STAMP)

$(STAMP): requirements.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Graft needs Python 3.11 or newer, this is %d.%d: make PYTHON=/path/to/python3.11 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --no-index -e .
	touch $(STAMP)

clean:
	rm -rf $(VENV) outputs
