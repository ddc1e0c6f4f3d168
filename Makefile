# make benchmark   the digits benchmark, from nothing to a table
# make test        the tests
# make lint docs   what CI runs besides
# make dist        wheel and source distribution in dist/
# make upstream-tests   pytorch-ood's own tests with our classes among its own; needs a network

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV := $(shell command -v uv 2>/dev/null)

.PHONY: benchmark test upstream-tests lint docs format dist clean

benchmark: $(READY)
	$(BIN)/pood benchmark digits

test: $(READY)
	$(BIN)/python -m pytest

upstream-tests: $(READY)
	$(BIN)/python tests/upstream/run.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build
	@echo "Open docs/_build/index.html"

# the wheel is built from the source distribution, so that it is known to suffice
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	@echo "See dist/"

# torch and torchvision come from one index in one step, so that they match
$(READY): pyproject.toml
ifdef UV
	test -x $(BIN)/python || $(UV) venv --python $(PYTHON) $(VENV)
	$(UV) pip install --python $(BIN)/python -e '.[dev]'
else
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dev]'
endif
	touch $(READY)

clean:
	rm -rf $(VENV) build dist docs/_build results .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
