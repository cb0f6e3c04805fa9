PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NPROC ?= 2
# Processes that share the tests; many tests start ranks of their own, and some wait for one another. With a thread
# each: with more, small products take ten times as long.
WORKERS ?= 3
# The stamp carries the pins: it is remade when they change, and nothing is installed twice.
STAMP := $(VENV)/.installed

.PHONY: upcycle test lint setup clean

upcycle: $(STAMP)
	$(BIN)/torchrun --standalone --nproc-per-node=$(NPROC) train.py +recipe=upcycle $(ARGS)

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not alone" --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder $(ARGS)
	$(BIN)/python -m pytest -m alone --numprocesses=$(WORKERS) --dist=loadfile $(ARGS) || [ $$? -eq 5 ]  # 5: there are none among ARGS

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

setup: $(STAMP)

$(STAMP): requirements.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Graft needs Python 3.11 or newer, this is %d.%d: make PYTHON=/path/to/python3.11 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) outputs
