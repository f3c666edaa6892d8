# make demo | test | slow | check | clean.  Needs only Python 3.11 or newer with pip; everything else goes into .venv.
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
# The first interpreter that runs and that JAX supports (a pyenv shim can exist and still not run). Override: make PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1 && echo $$p && break; done)

# Processes of the suite; a file stays in one, so that its compiled functions and fixtures are shared.
WORKERS ?= 2

.PHONY: help demo test slow check clean
help:
	@head -n 1 Makefile

demo: $(VENV)/.demo
	$(BIN)/python -m experiments.demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not torch"

slow: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "slow and not torch"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache

# One environment; each goal adds its extras and is done again when pyproject.toml changes.
$(VENV)/.demo: extras := plots
$(VENV)/.test: extras := test,plots
$(VENV)/.dev: extras := dev,test,plots
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: pyproject.toml $(VENV)/.made
	@echo "installing ltsm-jax[$(extras)] into $(VENV) (the first time takes a few minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[$(extras)]"
	@touch $@

# Where Python comes without ensurepip (Debian without python3-venv), the outer pip fills the environment.
$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 found: install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install -qq --disable-pip-version-check pip; }
	@touch $@
