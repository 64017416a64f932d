# make reproduce [PROFILE=pocket] [RUN=runs/pocket] [SEED=0] [QUESTIONS=path] [ARGS="-p rounds=7"]
# make test | test-slow | test-vllm | lab | lint | clean | bank | pocket | pocket-check | bench | bench-gpu | bench-equality | plan
# Every target makes its own virtual environment first; PYTHON names the interpreter it is made with.

PYTHON ?= python3
PROFILE ?= pocket
RUN ?= runs/$(notdir $(basename $(PROFILE)))
BIN := .venv/bin
STAMP := .venv/.pinned
TEST_RUN := runs/test

.PHONY: setup reproduce plan test test-slow lab lint clean bank pocket pocket-check bench bench-gpu
.NOTPARALLEL:

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "foggen needs Python 3.11 to 3.13: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

RUNNER = $(BIN)/python -m foggen.reproduce --profile $(PROFILE) --run $(RUN) \
	$(if $(SEED),--seed $(SEED)) $(if $(QUESTIONS),--questions $(QUESTIONS)) $(ARGS)

reproduce: $(STAMP)
	$(RUNNER)

plan: $(STAMP)
	$(RUNNER) --list

# The unit tests, then the notebooks from top to bottom in a run folder of their own; one closing line counts both.
test: $(STAMP)
	rm -rf $(TEST_RUN)
	FOGGEN_RUN=$(TEST_RUN) $(BIN)/python -m pytest tests $(if $(wildcard notebooks/*.ipynb),notebooks) \
		--nbval-lax --nbval-current-env --nbval-cell-timeout=900 $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow tests $(ARGS)

lab: $(STAMP)
	$(BIN)/jupyter lab notebooks

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/codespell

clean:
	rm -rf .venv runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis lib/*.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

bank: $(STAMP)
	$(BIN)/python data/bank/make_bank.py $(ARGS)

pocket: $(STAMP)
	$(BIN)/python data/pocket/make_pocket.py $(ARGS)

pocket-check: $(STAMP)
	$(BIN)/python data/pocket/make_pocket.py --check $(ARGS)

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/cpu.py $(ARGS)

bench-gpu: $(STAMP)
	$(BIN)/python tests/benchmarks/gpu.py $(ARGS)

include vllm.mk
