# make demo   set up, train PEER and its dense twin, write runs/demo/report.html
# make test   set up, lint, type-check, run the tests
# make test-all   the slow tests too

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tests of a file share what takes long to make: processes, a report, compiled kernels.
PYTEST := $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test test-all lint clean

setup: $(VENV)/installed

# Python compiles at its first import what is used, and pip would compile all of it: half of the installation's time.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/tinyexperts study demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find tinyexperts -name '*.nb[ci]' -delete
