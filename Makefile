# Needs only Python 3.10+, a C++ compiler and make: every target sets up .venv and builds what it needs.
# `make demo QUICK=1` is the short form. `PYTHON=python3.12 make ...` picks the Python of a new .venv.
PYTHON ?= python3
QUICK ?= 0

VENV := .venv
BIN := $(VENV)/bin
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
SIMT := $(shell find tests/simt -name '*.h' -o -name '*.cpp' -o -name '*.cu')
NATIVE := $(CSRC) CMakeLists.txt setup.py pyproject.toml ringcomm/_version.py
QUICK_FLAG := $(if $(filter-out 0,$(QUICK)),--quick)

.PHONY: help demo test torch-suite kernel-budgets cuda-tools gpu-check lint format bench build clean
.DELETE_ON_ERROR:

help:
	@echo "make demo [QUICK=1] | test | torch-suite | lint | format | bench | build | clean"
	@echo "CUDA: make gpu-check [OUT=results.json] | kernel-budgets | cuda-tools"

demo: build
	$(BIN)/python -m ringcomm.demo $(QUICK_FLAG)

test: build
	$(BIN)/python -m pytest

# torch's own tests of a backend; what they print is what Gloo passes and ringcomm does not.
torch-suite: build
	for n in 2 3 4; do $(BIN)/python -m tests.torch_suite --world-size $$n || exit 1; done

# Registers that kernels may need, from what they need now.
kernel-budgets: $(VENV)/.tools
	$(BIN)/python -m tests.cuda_build --update

# On a machine with a GPU: build, test and measure, in less than nine minutes. Needs no .venv and no network.
gpu-check:
	$(PYTHON) bench/gpu_check.py $(if $(OUT),--out "$(OUT)")

# nvcc from PyPI; `make build` finds it from then on.
cuda-tools: $(VENV)/.tools
	$(BIN)/python -m pip install --quiet --requirement requirements-cuda.txt
	rm -f $(VENV)/.built

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC) $(SIMT)
	$(BIN)/python -m mypy.stubtest ringcomm._core --mypy-config-file pyproject.toml --ignore-unused-allowlist --allowlist tests/stubtest_allowlist.txt

format: $(VENV)/.tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC) $(SIMT)

# Peers that cannot be had here are named in the results, with the reason.
bench: build
	-$(BIN)/python -m bench.peers --prepare
	$(BIN)/python -m bench $(QUICK_FLAG)

build: $(VENV)/.built

# Each stamp is newer than what it was made from; touching one redoes it.
$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.10 or newer, or set PYTHON"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' || { \
	  echo "$$($(PYTHON) -V) has no torch 2.13.0, which requirements-dev.txt pins: use Python 3.10 to 3.14, as in 'make PYTHON=python3.12 ...'"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: install the package python3-venv (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { \
	  echo "Python.h was not found: install the package python3-dev (Debian, Ubuntu: apt install python3-dev)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.tools: requirements-dev.txt $(VENV)/.python
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

# CUDA code for the GPU at hand, or for one kind; the tests compile it for all (tests/cuda_build).
ARCHS = $(or $(TORCH_CUDA_ARCH_LIST),$(if $(shell nvidia-smi -L 2>/dev/null | grep GPU),native,9.0))

$(VENV)/.built: $(NATIVE) $(VENV)/.tools
	TORCH_CUDA_ARCH_LIST='$(ARCHS)' $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@$(BIN)/python -m ringcomm.info --build
	@touch $@

clean:
	rm -rf $(VENV) build dist ringcomm.egg-info .mypy_cache .ruff_cache .pytest_cache
	rm -f ringcomm/_core*.so ringcomm/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
