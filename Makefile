# Everything below works on a fresh clone of a machine that has python3 (3.11 or later) and make.

PYTHON ?= python3
# The pins of development, with torch's CPU build. On a machine with GPUs: make setup CONSTRAINTS=
CONSTRAINTS ?= constraints.txt
DEMO_ARGS ?=
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet $(addprefix --constraint=,$(CONSTRAINTS))
LINT_BUDGET_S := 120

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Create .venv and install the package with all that development needs

# Torch goes first and alone: where its pin is not to be had, this stops before anything else is downloaded.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

demo: setup ## Train, save and reload a small mixture-of-experts model (DEMO_ARGS="--help" lists the options)
	$(BIN)/hf-moe-accel demo $(DEMO_ARGS)

# One session for all directories: the pool of ranks starts once a session. tests/conftest.py holds the budgets.
test: setup ## Run the tests but the slow ones (PYTEST_ARGS narrows them down)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: setup ## Run all tests, with the full grids
	$(BIN)/python -m pytest --run-slow $(PYTEST_ARGS)

lint: setup ## Check style, types and import directions
	@start=$$(date +%s); failed=; \
	for check in 'ruff check' 'ruff format --check' 'mypy' 'lint-imports'; do \
		echo "== $$check"; $(BIN)/$$check || failed="$$failed '$$check'"; \
	done; \
	took=$$(($$(date +%s) - start)); \
	echo "== lint took $$took s of $(LINT_BUDGET_S) s"; \
	test $$took -le $(LINT_BUDGET_S) || failed="$$failed budget"; \
	test -z "$$failed" || { echo "== failed:$$failed"; exit 1; }
