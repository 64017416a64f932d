# make reproduce [PROFILE=pocket] [RUN=runs/pocket] [SEED=0] [QUESTIONS=path] [ARGS="-p rounds=7"]   resumes where it stopped
# make plan      the same options: what would be run, downloaded and needed; creates nothing
# make report OUTCOMES=file    notebook 07 on an outcomes file of your own, as runs/report/07_your_outcomes.html
# make book      README, notebooks and docs as a static site, from the committed outputs: build/book/index.html
# make lab | publish (a run's outputs into the notebooks) | setup | setup-gpu (adds vLLM) | clean (environments, caches) | clean-runs (runs; asks first)
# make test | test-slow | test-vllm | rehearse | lint | lock | bank | pocket | pocket-check | study | bench | bench-gpu | bench-equality
# Every target makes its own virtual environment first; PYTHON names the interpreter it is made with.
# On a Linux laptop without a GPU: TORCH_INDEX=https://download.pytorch.org/whl/cpu spares gigabytes of CUDA packages.

PYTHON ?= python3
PROFILE ?= pocket
BIN := .venv/bin
STAMP := .venv/.pinned
TEST_RUN := runs/test
PIP := -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# A variable's text as one word of the shell, whatever stands in it; an option with it, where it is set.
quoted = '$(subst ','\'',$(value $(1)))'
option = $(if $(value $(2)),$(1)$(call quoted,$(2)))

.PHONY: setup setup-gpu reproduce plan publish report lab book test test-slow rehearse lint lock clean clean-runs \
	bank pocket pocket-check study bench bench-gpu
.NOTPARALLEL:

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "foggen needs Python 3.11 to 3.13: make PYTHON=...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) --editable '.[dev]'
	touch $@

# The same pins serve both, so what is installed already stays.
setup-gpu: $(STAMP)
	$(BIN)/python $(PIP) --editable '.[dev,gpu]'

RUNNER = $(BIN)/python -m foggen.reproduce $(call option,--profile=,PROFILE) $(call option,--run=,RUN) \
	$(call option,-p seed=,SEED) $(call option,-p data.questions=,QUESTIONS) $(ARGS)

reproduce: $(STAMP)
	$(RUNNER)

plan: $(STAMP)
	$(RUNNER) --list

report: $(STAMP)
	@test -f $(call quoted,OUTCOMES) || { echo 'make report OUTCOMES=file: a .jsonl, .csv or .parquet file of outcomes'; exit 2; }
	mkdir -p runs/report/notebooks && touch runs/report/.foggen-run
	$(BIN)/papermill notebooks/07_your_outcomes.ipynb runs/report/notebooks/07_your_outcomes.ipynb \
		-r run runs/report -r outcomes $(call quoted,OUTCOMES) $(ARGS)
	$(BIN)/jupyter nbconvert --to html --no-input --output-dir runs/report runs/report/notebooks/07_your_outcomes.ipynb

# Outputs, costs and figures of a finished run, into the checkout
publish: $(STAMP)
	$(BIN)/python notebooks/publish.py $(if $(value RUN),$(call quoted,RUN))

# Runs no notebook. What Sphinx needs is kept apart from what the results were made with.
BOOK_STAMP := .venv-book/.pinned
BOOK_PINS = $$(sed -n 's/^book = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d '",')

$(BOOK_STAMP): pyproject.toml constraints.txt
	test -x .venv-book/bin/pip || $(PYTHON) -m venv .venv-book
	.venv-book/bin/python -m pip install --quiet --constraint constraints.txt $(BOOK_PINS)
	touch $@

book: $(BOOK_STAMP)
	.venv-book/bin/sphinx-build -q -E -W --keep-going -c docs/book -b html . build/book $(ARGS)
	@echo 'build/book/index.html'

lab: $(STAMP)
	@echo 'JupyterLab saves what you run into notebooks/; git checkout notebooks brings the published outputs back.'
	$(BIN)/jupyter lab notebooks $(ARGS)

# The unit tests in two processes, then the notebooks from top to bottom in a run folder of their own. ARGS go to both;
# where they choose nothing of one (exit code 5), the other decides.
PYTEST = $(BIN)/python -m pytest
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=900

test: $(STAMP)
	rm -rf $(TEST_RUN)
	status=0; \
	OMP_NUM_THREADS=1 $(PYTEST) tests -n 2 --dist loadfile $(ARGS) || [ $$? = 5 ] || status=1; \
	FOGGEN_RUN=$(TEST_RUN) $(PYTEST) notebooks $(NBVAL) $(ARGS) || [ $$? = 5 ] || status=1; \
	exit $$status

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow tests --ignore=tests/rehearsal $(ARGS)

# The paper profile on a hub of our own, offline, with tiny models under the published names
rehearse: $(STAMP)
	$(BIN)/python -m pytest -m '' tests/rehearsal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/codespell

# After a change of a version in pyproject.toml: the whole tree again, for uv (uv.lock) and for pip and conda.
lock: $(STAMP)
	$(BIN)/uv lock
	$(BIN)/uv export --quiet --frozen --all-extras --no-emit-project --no-hashes --no-annotate --no-header \
		| sed 's/ ;.*//' > constraints.txt

clean:
	rm -rf .venv .venv-book .venv-vllm build .pytest_cache .mypy_cache .ruff_cache .hypothesis lib/*.egg-info
	find . -name runs -prune -o -name __pycache__ -prune -exec rm -rf {} +

clean-runs:
	@test -e runs || { echo 'there are no runs'; exit 1; }
	@echo 'This deletes these run folders, with the answers paid for in them:' && du -shc runs/*
	@test '$(YES)' = 1 || { printf 'Delete them? [y/N] '; read answer && test "$$answer" = y; } \
		|| { echo; echo 'nothing was deleted (make clean-runs YES=1 does not ask)'; exit 1; }
	rm -rf runs

bank: $(STAMP)
	$(BIN)/python data/bank/make_bank.py $(ARGS)

pocket: $(STAMP)
	$(BIN)/python data/pocket/make_pocket.py $(ARGS)

pocket-check: $(STAMP)
	$(BIN)/python data/pocket/make_pocket.py --check $(ARGS)

# Every chain of the stored study again, in runs/study; ARGS="--processes 2 --only foggen=1" for some of them
study: $(STAMP)
	$(BIN)/python data/results/make_study.py $(ARGS)

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/cpu.py $(ARGS)

bench-gpu: $(STAMP)
	$(BIN)/python tests/benchmarks/gpu.py $(ARGS)

include vllm.mk
