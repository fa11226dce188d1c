# `make serve` and `make test` are all a fresh machine needs. Every target is idempotent.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# pip, with a line per package instead of its dozens.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
PIP_PROGRESS := sed -un 's/^Collecting \([^ ]*\).*/  \1/p; s/^ *Downloading \(.*\)/    downloading \1/p; s/^Installing.*/  installing/p'

.PHONY: help setup setup-test serve test test-all check lint clean

help:
	@echo "make serve     install and serve the demo model on 127.0.0.1:8000 (ARGS='--port 9000' for more)"
	@echo "make test      install with the test extras and run the tests (no GPU needed)"
	@echo "make test-all  the same and the long ones, a soak of ten minutes among them"
	@echo "make check     format, lint, types, tests"

setup: $(VENV)/.installed

setup-test: $(VENV)/.installed-test tests/e2e/node_modules/.installed

$(BIN)/python:
	@echo "headrace: making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "headrace: installing (torch is the largest part, some 200 MB to download the first time)"
	@$(PIP_INSTALL) -e . | $(PIP_PROGRESS)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "headrace: installing the test extras"
	@$(PIP_INSTALL) -e '.[test]' | $(PIP_PROGRESS)
	@touch $@

# The npm client's test is skipped, aloud, where there is no Node.
tests/e2e/node_modules/.installed: tests/e2e/package.json tests/e2e/package-lock.json
	@if command -v npm >/dev/null; then \
		echo "headrace: installing the npm test clients"; \
		npm ci --prefix tests/e2e --no-audit --no-fund --loglevel=error && touch $@; \
	else echo "headrace: no npm here: the tests with npm clients will be skipped"; fi

serve: setup
	@$(BIN)/headrace serve $(ARGS)

test: setup-test
	@$(BIN)/python -m pytest $(ARGS)

test-all: setup-test
	@TESTS_LONG=1 $(BIN)/python -m pytest tests $(ARGS)

check: lint test

lint: setup-test .typecheck
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy -p headrace
	@$(BIN)/mypy tests

# mypy cannot follow an editable install whose folders are renamed; links show it the import names.
.typecheck:
	@mkdir -p .typecheck/headrace
	@for folder in server scheduler kernels benchmarks configs; do ln -sfn ../../$$folder .typecheck/headrace/$$folder; done

clean:
	rm -rf $(VENV) .typecheck tests/e2e/node_modules build *.egg-info
