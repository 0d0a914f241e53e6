# `make tune` and `make test` work on a fresh machine: they set up a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TRITON ?=
BUDGET ?= 240s
GPU ?= NVIDIA H200

.PHONY: tune test lint setup clean

setup: $(VENV)/ready

# PyTorch first and pinned to a build that exists for the CPU alone: without a pin, pip brings gigabytes of CUDA along.
# On a GPU machine where torch is installed already, use that: make VENV=… SYSTEM=--system-site-packages.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(SYSTEM) $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "torch==2.13.0"
	$(BIN)/python -m pip install -q -e ".[dev,report]" $(if $(TRITON),"triton==$(TRITON)")
	touch $@

tune: setup
	$(BIN)/tilebook tune --suite quick --gpu "$(GPU)" --budget $(BUDGET)

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
