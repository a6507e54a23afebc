# Everything sets itself up: `make demo` on a fresh clone needs python 3.11 or 3.12 and gcc.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
draft ?= eagle3
sglang ?= 0.5.17
# On a machine with a GPU: the set that SGLang's kernels are built for.
gpu ?= $(wildcard /dev/nvidiactl)

.DEFAULT_GOAL := help
.PHONY: help install install-cpu install-gpu install-offline patch-sglang doctor format lint types test test-gpu soak demo train sweep bench bench-gpu plots clean

help:  ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

install: $(STAMP)  ## Make .venv with the tested versions, for the GPU if there is one
$(STAMP): pyproject.toml constraints.txt $(wildcard constraints/*) $(wildcard colospec/csrc/*)
	@$(MAKE) --no-print-directory install-$(if $(gpu),gpu,cpu)

install-cpu:  ## The same for a CPU, whatever the machine has
	@echo "install: building $(VENV) (about two minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) --constraint constraints.txt torch setuptools
	@$(INSTALL) --constraint constraints.txt --no-build-isolation -e '.[test,dev]'
	@$(INSTALL) --no-deps --requirement constraints/sglang-cpu.txt
	@touch $(STAMP)

install-gpu:  ## The same for CUDA GPUs, with SGLang (sglang=0.5.16 for that version)
	@echo "install: building $(VENV) for CUDA GPUs (several GB the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) --constraint constraints/sglang-$(sglang).txt torch setuptools
	@$(INSTALL) --constraint constraints/sglang-$(sglang).txt --no-build-isolation -e '.[test,dev]'
	@$(INSTALL) --no-deps --requirement constraints/sglang-$(sglang).txt
	@touch $(STAMP)

patch-sglang: $(STAMP)  ## Patch the installed SGLang; the engine runs without it as well
	$(BIN)/python third_party/sglang_patch/apply.py apply

install-offline:  ## Build the extension into the current python, without the network
	$(PYTHON) -m pip install --no-build-isolation --no-deps -e .

doctor: $(STAMP)  ## Look at this machine: GPUs, MPS, limits, versions
	$(BIN)/python -m colospec.doctor

format: $(STAMP)  ## Format Python and C
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i colospec/csrc/*.c colospec/csrc/*.h

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror colospec/csrc/*.c colospec/csrc/*.h
	$(BIN)/codespell $$(git ls-files)

types: $(STAMP)
	$(BIN)/mypy

test: $(STAMP) lint types  ## Lint, types and all tests that need no GPU
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --durations=25

test-gpu: $(STAMP)  ## The tests that need GPUs; those that lack one say so
	$(BIN)/python -m pytest -m "gpu or multi_gpu"

soak: $(STAMP)  ## 1,000 SIGKILLs of the ring, kill and resume of whole runs (half an hour)
	$(BIN)/python tests/ring/soak.py 1000
	$(BIN)/python -m pytest -m slow --timeout=1800 tests

demo: $(STAMP)  ## Train a draft for a small target on this machine and show what it gains
	@$(BIN)/python -m colospec.demo draft=$(draft)

train: $(STAMP)  ## Colocated run on all GPUs of this machine (or its CPU)
	$(BIN)/python -m colospec.run +mode=colocate

sweep: $(STAMP)  ## Three learning rates, one fresh job each
	$(BIN)/python -m colospec.run -m +mode=colocate +sweep=lr

bench: $(STAMP)  ## Measure the ring, then what bench-gpu does; results go to benchmarks/results
	$(BIN)/python benchmarks/bench_ring.py
	@if [ -e /dev/nvidia0 ]; then $(MAKE) --no-print-directory bench-gpu; fi

bench-gpu: $(STAMP)  ## On one GPU: the ring, Eagle3 colocated, a step of every draft
	eval "$$($(BIN)/python -m colospec.mps start --owner $$$$)" && $(BIN)/python benchmarks/bench_ring_gpu.py
	$(BIN)/python benchmarks/bench_colocate.py --gpus 1 --mps require
	$(BIN)/python benchmarks/bench_colocate.py --gpus 1 --mps off
	$(BIN)/python benchmarks/bench_step.py

plots: $(STAMP)  ## Redraw the tables of README.md from benchmarks/results
	$(BIN)/python benchmarks/tables.py

clean:  ## Remove .venv, build products and runs
	rm -rf $(VENV) build dist outputs colospec/*.so *.egg-info .hypothesis .mypy_cache .ruff_cache .pytest_cache
