# `make tune` and `make test` work on a fresh machine: they set up a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TRITON ?=
BUDGET ?= 240s
# This machine's GPU; without one a model that nothing ships for, which is compiled for and predicted.
GPU ?= $(if $(wildcard /dev/nvidiactl),,NVIDIA H100)

# What ships was measured with this Triton, and machine code belongs to a version.
SHIPPED_TRITON = 3.6.0

# What some tests look at and no other may find: models of transformers are others where it is installed.
BESIDE = fla-core==0.6.0 einops

.PHONY: tune test test-whole test-cluster lint inventory recheck setup clean

setup: $(VENV)/ready

# An editable install builds the registry that ships, tilebook/registry.db, from its text.
# PyTorch first and pinned to a build that exists for the CPU alone: without a pin, pip brings gigabytes of CUDA along.
# On a GPU machine where torch is installed already, use that: make VENV=… SYSTEM=--system-site-packages.
# pip compiles modules one after the other, all there are. Here all cores do, and what hardly anybody imports waits.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(SYSTEM) $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q --no-compile "torch==2.13.0"
	$(BIN)/python -m pip install -q --no-compile -e ".[dev,report]" $(if $(TRITON),"triton==$(TRITON)")
	$(BIN)/python -m pip install -q --no-compile --no-deps --target $(VENV)/beside $(BESIDE)
	$(BIN)/python -m compileall -qq -j 0 -x '/tests/|/transformers/models/' $(VENV)/lib || true
	touch $@

tune: setup
	$(BIN)/tilebook tune --suite quick $(if $(GPU),--gpu "$(GPU)") --budget $(BUDGET)

# Hundreds of processes load the package: what one has compiled of its modules, others read, whatever is set outside.
test test-whole: export PYTHONDONTWRITEBYTECODE =

test: setup
	$(BIN)/python -m pytest --sample -n 2 --dist worksteal

# Every case of every test: half an hour on two cores. After a change to what many have in common, and before a release.
test-whole: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Ray's wheel is large, and its cluster of several nodes takes a minute.
test-cluster: setup
	$(BIN)/python -m pip install -q -e ".[ray]"
	$(BIN)/python -m pytest tests/tuner/test_cluster.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What commands that only read records know of the kernels: to be written anew after a change to them.
inventory: setup
	$(BIN)/python -m tilebook.inventory

# Does what ships still compile to the code that was measured? Two minutes on two cores, no GPU.
recheck: setup $(VENV)/triton-$(SHIPPED_TRITON)
	PYTHONPATH=$(VENV)/triton-$(SHIPPED_TRITON) $(BIN)/tilebook recheck --all --check

$(VENV)/triton-$(SHIPPED_TRITON): | $(VENV)/ready
	$(BIN)/python -m pip install -q --no-deps --target $@ "triton==$(SHIPPED_TRITON)"

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
