# The torch to install, as pip arguments. It goes in first and alone, so that what depends on it accepts the
# build chosen here (a CPU wheel, a nightly, a local file) instead of pulling the default one.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
# The tested set of everything else.
PINS ?= --constraint constraints.txt
MINUTES ?= 3
RUN ?= runs/quickstart
GPU_RUN ?= runs/gpu

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
# the packages of the extra `docs`: the site is made from the sources, without installing what they need
DOCS_VENV ?= .venvs/docs
DOCS := 'mkdocs>=1.6,<2' mkdocs-material 'mkdocstrings[python]'
SOURCES := src scripts tests benchmarks models
# Transformers/torch of `make test-matrix`; src/hf_xlstm/versions.py states the range.
MATRIX := 5.15.0/2.13.0 5.17.0/2.13.0 5.19.0/2.13.0 5.23.0/2.13.0 5.24.0/2.13.0 5.17.0/2.11.0 5.24.0/2.14.1
OLDEST := $(firstword $(MATRIX))

.PHONY: help quickstart test test-oldest test-matrix test-newest test-all test-vllm lint format pins gpu docs release-check clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install $(PINS) --editable '.[train,dev]'
	touch $@

quickstart: $(STAMP)  ## train a small model on real text, reload it, generate (about five minutes on two cores)
	$(BIN)/hf-xlstm train --output $(RUN) --minutes $(MINUTES) --overwrite
	$(BIN)/hf-xlstm generate $(RUN) --contexts 100 20000 --report $(RUN)/report.md

test: lint  ## lint and the quick tests
	$(BIN)/pytest -n auto -m "not slow"

test-oldest:  ## the quick tests of what touches Transformers, on the oldest supported version
	tests/matrix.sh --models-only $(OLDEST)

test-matrix:  ## the quick tests on every supported version, each in an environment of its own
	tests/matrix.sh $(MATRIX)

test-newest:  ## the quick tests on the newest release of everything, whatever is pinned
	tests/matrix.sh newest/$(patsubst torch==%,%,$(TORCH))

test-all: lint  ## lint and all tests
	$(BIN)/pytest -n auto

$(VLLM_STAMP): pyproject.toml tests/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install $(TORCH)
	$(VLLM_VENV)/bin/pip install --no-deps --requirement tests/vllm/requirements.txt
	$(VLLM_VENV)/bin/pip install --no-deps --editable .
	touch $@

test-vllm: $(VLLM_STAMP)  ## the vLLM plugin against vLLM's engine, in an environment of its own (3.4 GB)
	$(VLLM_VENV)/bin/pytest tests/vllm

gpu:  ## prove and measure the kernels on a GPU in nine minutes, with the python that has torch there
	$(PYTHON) benchmarks/gpu/prove.py --minutes 9 --out $(GPU_RUN)

lint: $(STAMP)  ## ruff and mypy: lint, format and types, changing nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(STAMP)  ## ruff: fix and format in place
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

pins: $(STAMP)  ## write what is installed into constraints.txt, once the tests pass with it
	tests/pins.sh $(BIN)/pip

$(DOCS_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install $(DOCS)
	touch $@

docs: $(DOCS_VENV)/.installed  ## the site, into build/site; a broken link is an error
	$(DOCS_VENV)/bin/mkdocs build --strict --quiet

release-check:  ## build, check and try both distributions in a clean environment
	tests/release_check.sh "$(TORCH)"

clean:  ## remove the virtual environments, runs and caches
	rm -rf $(VENV) .venvs $(VLLM_VENV) runs build dist .pytest_cache .ruff_cache .mypy_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
