# One command per task; each makes the virtual environment it needs. `make TORCH=torch==2.12.0 test` takes another torch.

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)
TYPED := $(abspath $(VENV))/typed

.PHONY: mutants mutation soak bounds demo test unit coverage gpu-test eval bench bench-tests lint types tables install clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo      several streams generate from one pool of 2-bit pages; report in runs/demo/report.html'
	@echo 'make test      lint, types and tests, as continuous integration runs them'
	@echo 'make unit      tests only            make gpu-test  tests that need a CUDA device'
	@echo 'make eval      quality of every format in closed loop (meant for a GPU)'
	@echo 'make bench     speed beside what it competes with     make bench-tests  benchmarks of the test suite'
	@echo 'make coverage  every branch of scheduler and pool, or it fails'
	@echo 'make mutants   bugs planted in the scheduler, each of which the checker must find'
	@echo 'make mutation  mutation score of scheduler and pool          make bounds  promises of the scheduler'
	@echo 'make soak      20,000 seeds of at least 2,000 events; goes on where it stopped'
	@echo 'make lint      ruff                  make types     mypy, strict'
	@echo 'make tables    fill README tables from benchmarks/results'

install: $(READY)

# torch first and by itself, then again as a requirement, so that no dependency replaces it
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install '$(TORCH)'
	$(BIN)/python -m pip install '$(TORCH)' --editable '.[test,bench,dev]'
	rm -f $(VENV)/.ready-*
	touch $@

demo: $(READY)
	$(BIN)/qvg-paged demo $(ARGS)

eval: $(READY)
	$(BIN)/qvg-paged eval $(ARGS)

test: lint types unit

unit: $(READY)
	$(BIN)/pytest -m 'not gpu' --benchmark-disable $(ARGS)

# every branch of the scheduler and of the pool; state machines and simulations reach them too, but these tests alone must
COVERING := async bad_input books line metrics plugins policies pool pressure scheduler tiers

coverage: $(READY)
	$(BIN)/pytest --benchmark-disable $(COVERING:%=tests/test_%.py) --cov=scheduler --cov=qvg_paged --cov-branch --cov-report= $(ARGS)
	$(BIN)/python -m coverage report --include='scheduler/*,qvg_paged/pool.py,qvg_paged/slab*.py' --show-missing --skip-covered --fail-under=100

gpu-test: $(READY)
	$(BIN)/pytest -m gpu $(ARGS)

bench: $(READY)
	$(BIN)/qvg-paged bench $(ARGS)

bench-tests: $(READY)
	$(BIN)/pytest -m 'not gpu' --benchmark-only $(ARGS)

mutants: $(READY)
	PYTHONPATH=benchmarks $(BIN)/python -m stress.mutants

mutation: $(READY)
	$(BIN)/python benchmarks/stress/mutation.py $(ARGS)

soak: $(READY)
	$(BIN)/python benchmarks/stress/soak.py $(ARGS)

bounds: $(READY)
	$(BIN)/python benchmarks/scheduler_bounds.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/python benchmarks/readme_tables.py --check

# mypy does not see mapped subpackages in an editable install, so it looks at a regular one, from outside the checkout
types: $(READY)
	rm -rf $(TYPED) build
	$(BIN)/python -m pip install --quiet --no-deps --target $(TYPED) .
	cd $(TYPED) && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p qvg_paged

tables: $(READY)
	$(BIN)/python benchmarks/readme_tables.py

clean:
	rm -rf $(VENV) build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
