# make demo   set up, train PEER and its dense twin, write runs/demo/report.html
# make teach  after the demo: teach its PEER model 50 airports that it never saw
# make model  train a PEER model on facts about 1,000 airports: runs/airports-int8, models/airports for transformers
# make test   set up, lint, type-check, run the tests
# make test-all   the slow tests too
# make test-python PYTHON=python3.13   the fast tests of layers and operators under another Python
# make dist   the files to upload: dist/*.tar.gz and dist/*.whl

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tests of a file share what takes long to make: processes, a report, compiled kernels.
PYTEST := $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder
# Triton reads the variable when it is imported, so these tests have processes of their own. There is no Triton but on Linux.
INTERPRETED = ! $(BIN)/python -c "import triton" 2> /dev/null || TRITON_INTERPRET=1 $(PYTEST) tests/gpu/interpreted

# The operators' own tests, which run on interpreted kernels too; "alone" are 65,536 tokens of one element.
OPERATORS := $(foreach name,expert_mlp row_adam quantized_tables product_key_topk,tests/ops/test_$(name).py)

.PHONY: setup demo teach model test test-all test-python lint types types-of-newest dist clean

setup: $(VENV)/installed

# Python compiles at its first import what is used, and pip would compile all of it: half of the installation's time.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/tinyexperts study demo

teach: setup
	test -d runs/demo/new-airports || $(BIN)/tinyexperts data prepare --corpus airports --exclude runs/demo/data \
		--max-entities 50 --every-fact --tokenizer runs/demo/peer-seed0/tokenizer.json --output runs/demo/new-airports
	$(BIN)/tinyexperts teach runs/demo/peer-seed0 --data runs/demo/new-airports --output runs/demo/taught

model: setup
	test -d data/airports-1000 || $(BIN)/tinyexperts data prepare --corpus airports --max-entities 1000 --vocab-size 1024 \
		--output data/airports-1000
	test -d runs/airports-int8 || $(BIN)/tinyexperts train peer --run runs/airports-fp32 --data data/airports-1000 \
		--training-flops 1e13 --batch-size 8 --model.vocab-size 1024 --model.context-length 128 --model.d-model 48 \
		--model.num-heads 3 $$(test ! -f runs/airports-fp32/config.json || echo --resume)
	test -d runs/airports-int8 || $(BIN)/tinyexperts quantise runs/airports-fp32 --bits 8 --output runs/airports-int8
	test -d models/airports || $(BIN)/tinyexperts export runs/airports-int8 models/airports --license mit
	$(BIN)/tinyexperts ask "The city of SFO is"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory -j 2 types types-of-newest

types:
	$(BIN)/mypy

types-of-newest:
	$(BIN)/mypy --python-version 3.13

test: lint
	$(PYTEST) -m "not slow"
	$(INTERPRETED) -m "not slow"

test-all: lint
	$(PYTEST)
	$(INTERPRETED) $(OPERATORS) -k "not alone"

test-python:
	$(MAKE) setup VENV=.venv-other
	.venv-other/bin/pytest -n 3 --dist loadfile -m "not slow" tests/ops tests/layers tests/optim tests/test_cli.py

dist: setup
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) .venv-other build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find tinyexperts -name '*.nb[ci]' -delete
