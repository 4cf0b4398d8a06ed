# Everything runs in .venv, which `make install` builds; the other targets call it when needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One process per command here, so it may use all cores; set OMP_NUM_THREADS=1 for several at a time.
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable ".[deepspeed,quantization,report,dev]"
	touch $(STAMP)

demo: install
	$(BIN)/python recipes/demo.py

test: install lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile --cov --cov-report=term

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs build dist *.egg-info src/*.egg-info .coverage .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
