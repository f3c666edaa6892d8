# make demo | test | slow | check | docs | torch | peers | oldest | newest | wheel | lock | clean.  Needs only Python 3.11 or newer with pip; everything else goes into .venv.
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
# The first interpreter that runs and that JAX supports (a pyenv shim can exist and still not run). Override: make PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1 && echo $$p && break; done)

# Processes of the suite; a file stays in one, so that its compiled functions and fixtures are shared. The files that take
# longest go first (tests/conftest.py), where pytest-xdist would take those with the most tests.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=20
# What `make test` runs; `make test MARKS="not torch and not peers"` takes the slow tests with it.
MARKS ?= not slow and not torch and not peers

# Else every process of the suite, and every child of a test, would compile the project's modules from their text.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test slow check docs torch peers oldest newest wheel lock clean
help:
	@head -n 1 Makefile

demo: $(VENV)/.demo
	$(BIN)/python -m experiments.demo

test: $(VENV)/.test
	$(PYTEST) -m "$(MARKS)"

slow: $(VENV)/.test
	$(PYTEST) -m "slow and not torch and not peers"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The web site of docs/ and of the documents in the top folder, in site/; a warning is an error.
# While writing: .venv/bin/python -m mkdocs serve
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Stages of .ci/run, each in an environment of its own: comparisons with PyTorch, the floors of pyproject.toml, the newest
# JAX, and the wheel far from the checkout.
torch peers oldest newest wheel:
	.ci/run $@

# The versions that `make` installs, for every Python and platform. Keeps what is pinned and still fits; all anew:
# make lock UPGRADE=--upgrade
lock: $(VENV)/.made
	$(BIN)/python -m pip install -qq --disable-pip-version-check uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra test --extra plots --extra dev --extra docs \
		--no-header --no-annotate --no-emit-index-url --no-emit-find-links $(UPGRADE) pyproject.toml -o requirements-dev.lock

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache

# One environment; each goal adds its extras and is done again when pyproject.toml or the lock changes.
$(VENV)/.demo: extras := plots
$(VENV)/.test: extras := test,plots
$(VENV)/.dev: extras := dev,test,plots
$(VENV)/.docs: extras := docs
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev $(VENV)/.docs: pyproject.toml requirements-dev.lock $(VENV)/.made
	@echo "installing ltsm-jax[$(extras)] into $(VENV) (the first time takes a few minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements-dev.lock -e ".[$(extras)]"
	@touch $@

# Where Python comes without ensurepip (Debian without python3-venv), the outer pip fills the environment.
$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 found: install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install -qq --disable-pip-version-check pip; }
	@touch $@
