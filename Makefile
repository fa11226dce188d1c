# `make serve` and `make test` are all a fresh machine needs. Every target is idempotent.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := tests/e2e/clients
CLIENT_VENVS := $(CLIENTS)/.venvs
ARGS ?=
FUZZ_TARGETS ?= request_parser sse_encoder gguf_reader stop_strings answer_parser
FUZZ_S ?= 60
# pip, with a line per package instead of its dozens.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
PIP_PROGRESS := sed -un 's/^Collecting \([^ ]*\).*/  \1/p; s/^ *Downloading \(.*\)/    downloading \1/p; s/^Installing.*/  installing/p'

.PHONY: help setup setup-test setup-clients serve test test-all fuzz check lint clean

help:
	@echo "make serve     install and serve the demo model on 127.0.0.1:8000 (ARGS='--port 9000' for more)"
	@echo "make test      install with the test extras and run the tests (no GPU needed)"
	@echo "make test-all  the same and the long ones: clients in environments of their own (2 GB), a soak of ten minutes"
	@echo "make fuzz      fuzz what reads others' bytes, FUZZ_S seconds each (60), where Python has a wheel of atheris"
	@echo "make check     format, lint, types, tests"

setup: $(VENV)/.installed

setup-test: $(VENV)/.installed-test tests/e2e/node_modules/.installed

setup-clients: $(patsubst %,$(CLIENT_VENVS)/%/.installed,openai2 langchain litellm vllm-bench mlserver locust gradio lm-eval guidellm router ray flashinfer) \
	$(CLIENT_VENVS)/vllm-bench/endpoint_request_func.py $(CLIENTS)/node_modules/.installed

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

# The npm clients' tests are skipped, aloud, where there is no Node.
%/node_modules/.installed: %/package.json %/package-lock.json
	@if command -v npm >/dev/null; then \
		echo "headrace: installing the npm test clients of $*"; \
		npm ci --prefix $* --no-audit --no-fund --loglevel=error && touch $@; \
	else echo "headrace: no npm here: the tests with npm clients will be skipped"; fi

$(CLIENT_VENVS)/%/.installed: $(CLIENTS)/%.txt
	@echo "headrace: installing the test client $*"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --disable-pip-version-check -qq -r $<
	@touch $@

# Beside what is installed for the server.
$(CLIENT_VENVS)/ray/.installed $(CLIENT_VENVS)/flashinfer/.installed: $(CLIENT_VENVS)/%/.installed: \
		$(CLIENTS)/%.txt $(VENV)/.installed-test
	@echo "headrace: installing $*"
	@$(PYTHON) -m venv --clear $(@D)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/headrace.pth
	@$(@D)/bin/python -m pip install --disable-pip-version-check -qq --no-deps -r $<
	@touch $@

$(CLIENT_VENVS)/vllm-bench/endpoint_request_func.py: $(CLIENTS)/vllm-source.txt $(CLIENT_VENVS)/vllm-bench/.installed
	@echo "headrace: fetching vLLM's wheel (320 MB, not kept) for one file of its benchmark"
	@folder=$$(mktemp -d); trap 'rm -r "$$folder"' EXIT; \
	$(@D)/bin/python -m pip download --disable-pip-version-check -qq --no-cache-dir --no-deps \
		--only-binary :all: --platform manylinux_2_28_x86_64 --dest "$$folder" -r $<; \
	$(@D)/bin/python -c 'import pathlib, sys, zipfile; member = zipfile.ZipFile(sys.argv[1]).read(sys.argv[2]); \
		pathlib.Path(sys.argv[3]).write_bytes(member)' "$$folder"/*.whl vllm/benchmarks/lib/$(@F) $@

serve: setup
	@$(BIN)/headrace serve $(ARGS)

# Two workers, each with one thread of torch's, and then those that start servers, a file after the other in each.
test: setup-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests/unit tests/contract $(ARGS)
	@$(BIN)/python -m pytest -n 2 --dist loadfile tests/e2e tests/soak $(ARGS)

test-all: setup-test setup-clients
	@TESTS_LONG=1 $(BIN)/python -m pytest tests $(ARGS)

# What finds new coverage stays in tests/fuzz/found; what fails is written beside it.
fuzz: setup-test
	@$(PIP_INSTALL) -e '.[fuzz]' | $(PIP_PROGRESS)
	@for target in $(FUZZ_TARGETS); do \
		mkdir -p tests/fuzz/found; \
		$(BIN)/python tests/fuzz/fuzz.py $$target -max_total_time=$(FUZZ_S) -timeout=20 -rss_limit_mb=3000 \
			-max_len=4096 -artifact_prefix=tests/fuzz/found/$$target- $(ARGS); \
	done

check: lint test

lint: setup-test .typecheck
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/clang-format --dry-run --Werror kernels/cpu/*.h kernels/cpu/*.cpp benchmarks/*.cpp
	@$(BIN)/mypy -p headrace
	@$(BIN)/mypy tests examples

# mypy cannot follow an editable install whose folders are renamed; links show it the import names.
.typecheck:
	@mkdir -p .typecheck/headrace
	@for folder in server scheduler kernels benchmarks configs; do ln -sfn ../../$$folder .typecheck/headrace/$$folder; done

clean:
	rm -rf $(VENV) .typecheck tests/e2e/node_modules $(CLIENTS)/node_modules $(CLIENT_VENVS) build *.egg-info
