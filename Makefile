# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` work on a bare clone: `setup` brings Python packages, headers and the compiled
# operators into .venv, once, and again only when pyproject.toml, CMake files or C++ sources change.

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
# A virtual environment does not survive a move, so the stamp carries the folder's path.
READY := .venv/ready-$(shell pwd | cksum | cut -d' ' -f1)
NATIVE := $(shell find CMakeLists.txt cmake plugins \( -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
          -o -name '*.cmake' -o -name '*.map' -o -name CMakeLists.txt -o -name '*.sh' \) 2>/dev/null)
CXX_SOURCES = $(shell find plugins examples tests \( -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)
# Two workers with one thread each: two cores, and no worker waits for the other's.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=2 --dist=worksteal
FAST := not slow and not network

export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test test-all gpu-test lint docs wheel setup rtx clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(READY) ## compile the OPT that the repository carries, generate text, show what was skipped
	@bash examples/quickstart/demo.sh

test: $(READY) ## run the tests
	@$(PYTEST) -m "$(FAST)"

test-all: $(READY) ## run all tests, the slow ones and those that need the network, a GPU or an Arm cross compiler too
	@bash scripts/aarch64.sh
	@$(PYTEST)

# Fails too if a part was not run or a goal is missed: make gpu-test ALLOW_SKIPS=1 ALLOW_MISSED=1
gpu-test: $(READY) ## with an NVIDIA GPU: kernels, compute-sanitizer, whole engines, and a table of times in build/gpu
	@$(BIN)/python -m tests.gpu $(if $(ALLOW_SKIPS),--allow-skips) $(if $(ALLOW_MISSED),--allow-missed)

lint: $(READY) ## style, format and types of Python and C++
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@bash scripts/typecheck.sh
	@$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

docs: ## build the pages of docs/ as a site into build/docs/site; needs Python alone
	@bash scripts/docs.sh

wheel: $(READY) ## build dist/shadowc-*.whl
	@mkdir -p dist build
	@rm -f dist/shadowc-*.whl
	@$(BIN)/pip wheel . --no-deps --no-build-isolation --wheel-dir dist >build/wheel.log 2>&1 || { tail -n 30 build/wheel.log; exit 1; }
	@ls dist/shadowc-*.whl

setup: $(READY) ## create .venv, install everything, build the operators

$(READY): pyproject.toml scripts/setup.sh $(NATIVE)
	@bash scripts/setup.sh
	@touch $@

rtx: $(READY) ## install TensorRT for RTX (NVIDIA's licence) and cuobjdump: the tests then build real engines, without a GPU
	@$(BIN)/pip install --disable-pip-version-check --quiet --group rtx

clean: ## remove what was built; .venv stays
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
