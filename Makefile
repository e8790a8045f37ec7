# The commands of a source checkout. Each does its own set-up: only Python 3.10+ (with venv), g++ and make are needed.
#
#   make test ARGS="tests/test_rms_norm.py -x"      MEGALODON_GOLDEN=/folder/of/golden/data make test
#
# torch comes from whatever index pip is set up for; where that is not the CPU build's, PIP_EXTRA_INDEX_URL adds it.

PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 3
RUN ?= runs/demo
ARGS ?=
OP ?=
PARTS ?=
SIMT_JOBS ?= $(shell nproc)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD_TOOLS := scikit-build-core pybind11 cmake ninja
# Folders too: a file that comes or goes changes its folder's time.
SOURCES := CMakeLists.txt $(wildcard cpp cpp/* cpp/*/*.h cpp/*/*.cpp cuda cuda/* cuda/*/*.cu cuda/*/*.cuh)
FORMATTED = $$(git ls-files 'cpp/*.h' 'cpp/*.cpp' 'cuda/*.cu' 'cuda/*.cuh' 'cuda/*.h' 'cuda/*.cpp' \
              'tests/*.c' 'tests/*.cu' 'tests/*.h' 'tests/*.cpp')
# What runs in the host executor: the tests that hold for every op, and those of each op that has a CUDA kernel.
SIMT_TESTS = tests/test_ops.py \
             $(sort $(foreach op,$(wildcard cuda/ops/*.cu),$(wildcard $(op:cuda/ops/%.cu=tests/test_%*.py))))
ASAN = detect_leaks=0:allocator_may_return_null=1
PARALLEL = -n $(SIMT_JOBS) --dist worksteal
SIMT_PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) $(SIMT_TESTS) $(ARGS)
SANITIZERS = $$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)

# cmake and ninja of the environment before any others; no build isolation, so that build/ stays valid.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help setup demo test test-simt gpu-check bench lint format docs clean
.DEFAULT_GOAL := help

help:  ## This list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 19

setup: $(VENV)/.built  ## Make .venv and install the package and the development tools into it (others do it too)
	@:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One call of pip per stamp: the requirements when pyproject.toml has changed, the kernels when their sources have.
$(VENV)/.required: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet $(BUILD_TOOLS)
	$(PIP) install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

$(VENV)/.built: $(VENV)/.required $(SOURCES)
	@if [ -e $@ ]; then echo 'rebuilding the kernels'; \
	  $(PIP) install --quiet --no-build-isolation --no-deps --editable .; fi
	@touch $@

demo: setup  ## Train for three minutes on Python's standard library, compare with gzip and xz, generate
	$(BIN)/megalodon train --minutes $(MINUTES) --out $(RUN) --overwrite
	$(BIN)/megalodon eval --checkpoint $(RUN) --max-bytes 262144
	$(BIN)/megalodon generate --checkpoint $(RUN) --prompt 'def ' --max-new-tokens 400 --seed 0 --timing

test: setup  ## Run the tests (ARGS= goes to pytest)
	$(BIN)/python -m pytest $(ARGS)

# The compiler's flags of each build are in cuda/build.cmake. What the numbers are may depend on the schedule, what is
# a race hardly does (tests/simt): of the race build one schedule, preempted at random, on fewer shapes. The sanitizers
# end the process at their first report, on a standard error that pytest must not have taken: of the jobs that share the
# tests one ends, its test has failed, another takes its place. SIMT_JOBS=0: pytest's own process alone. The executor
# uses one core, and torch's threads, which the references do not need, would wait for another by spinning.
test-simt: setup  ## Run the tests of the CUDA kernels on the CPU (docs/executor.md; ARGS= as above; SIMT_JOBS=)
	$(BIN)/cmake --preset simt -DPython_EXECUTABLE=$(abspath $(BIN))/python > /dev/null
	$(BIN)/cmake --build --preset simt
	$(BIN)/python -m pytest -q $(PARALLEL) tests/simt tests/conformance
	for schedule in forward reverse random:1; do \
	  MEGALODON_SIMT_SCHEDULE=$$schedule MEGALODON_TEST_BACKEND=simt $(SIMT_PYTEST) || exit 1; \
	done
	MEGALODON_SIMT_SCHEDULE=random:1 MEGALODON_TEST_BACKEND=simt_race MEGALODON_EXAMPLES=5 $(SIMT_PYTEST)
	MEGALODON_TEST_BACKEND=simt_asan ASAN_OPTIONS=$(ASAN) LD_PRELOAD="$(SANITIZERS)" $(SIMT_PYTEST) --capture=sys

gpu-check:  ## On a machine with a GPU, with its own Python: build, test and measure there (PARTS= picks; no network)
	$(PYTHON) tests/gpu_check.py $(PARTS)

bench: setup  ## Time every op, or OP=name, against what the machine can do and against torch (ARGS='--save NAME')
	$(if $(ARGS),$(BIN)/python -m pytest bench -q $(if $(OP),-k $(OP)) $(ARGS),$(BIN)/megalodon bench $(OP))

lint: setup  ## Check style and types: ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/mypy

format: setup  ## Format Python and C++ in place
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

docs: setup  ## Renew the op table of the README from the registry, docs/performance.md from bench/results
	$(BIN)/python -m megalodon_ops._table README.md
	$(BIN)/python bench/report.py

clean:  ## Remove .venv and everything built (runs/ stays)
	rm -rf $(VENV) build build-* python/megalodon_ops/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
