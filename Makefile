# Two commands for a newcomer: `make demo` and `make test`. Each sets up all it needs in .venv, says what
# it does, and is quick the second time. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
JOBS ?= 2
TRITON_OLD := 3.6.0
# the assembler of an installed CUDA toolkit, which a GPU machine may use in place of Triton's
PTXAS ?= $(firstword $(shell command -v ptxas 2>/dev/null) $(wildcard /usr/local/cuda/bin/ptxas))
# two workers of one thread each: OpenMP threads that outnumber the cores spin and starve each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
QUICK := not slow and not gpu and not interpret and not aot
SOURCES := $(wildcard csrc/*.cpp csrc/*.h) setup.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick test-interpret test-aot test-slow lint verify bench soak docs wheel clean

help:
	@echo "make demo            train, evaluate and tag real audio; writes runs/demo/report.html"
	@echo "make test            lint and every test that needs no GPU, except those marked slow"
	@echo "make test-quick      the Python and C++ tests alone"
	@echo "make test-interpret  the Triton kernels in Triton's interpreter"
	@echo "make test-aot        every Triton kernel compiled for seven GPU generations, by two Tritons, and for"
	@echo "                     Hopper by the ptxas of an installed CUDA toolkit"
	@echo "make test-slow       the tests marked slow, and 200 drawn cases a property in place of 25"
	@echo "make lint            ruff and mypy"
	@echo "make verify          the table of errors and budgets on this machine"
	@echo "make bench           the CPU benchmark suites (about 15 minutes)"
	@echo "make soak            10,000 training steps twice: memory flat, losses finite (about ten minutes)"
	@echo "make docs            the pages of docs/ as a site in build/site"
	@echo "make wheel           a wheel in dist/, checked"
	@echo "make clean           remove what these commands made, except runs/"

setup: $(VENV)/.built

$(VENV)/.packages: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"ast_fast needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@echo "==> making a virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> installing pinned packages (PyTorch is large; a minute or more the first time)"
	@$(PIP) install -c constraints.txt setuptools wheel pybind11
	@$(PIP) install -c constraints.txt --no-build-isolation -e ".[all]"
	@touch $@

$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	@echo "==> building the C++ kernels for each instruction set"
	@$(BIN)/python setup.py -q build_ext --inplace
	@$(BIN)/python -c 'from ast_fast import cpp; r = cpp.why_unavailable(); print("==> C++ kernels:", "ready" if r is None else f"absent, plain PyTorch instead: {r}")'
	@if command -v "$${CXX:-c++}" >/dev/null 2>&1; then $(BIN)/python -c 'from ast_fast import cpp; import sys; sys.exit(cpp.why_unavailable())'; fi
	@touch $@

demo: setup
	@echo "==> demo: tones of spoken Mandarin syllables, from waveform to report"
	@$(BIN)/ast-fast demo

test: lint test-quick test-interpret test-aot
	@echo "==> all tests passed"

test-quick: setup
	@echo "==> Python and C++ tests"
	@$(PYTEST) -n $(JOBS) -m "$(QUICK)" tests

test-interpret: setup
	@echo "==> Triton kernels in the interpreter"
	@TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) -m "interpret and not slow" tests/kernels

test-aot: export AST_FAST_PTXAS := $(PTXAS)
test-aot: setup $(VENV)/triton-$(TRITON_OLD)
	@if [ -n "$(PTXAS)" ]; then echo "==> kernels for sm_90 are also assembled by $(PTXAS)"; \
	else echo "==> no ptxas of a CUDA toolkit here: kernels are assembled by Triton's alone (PTXAS=PATH names one)"; fi
	@echo "==> Triton kernels compiled ahead of time, installed Triton"
	@$(PYTEST) -n $(JOBS) -m "aot and not slow" tests/aot
	@echo "==> the same, Triton $(TRITON_OLD)"
	@AST_FAST_TRITON_DIR=$(abspath $(VENV)/triton-$(TRITON_OLD)) $(PYTEST) -n $(JOBS) -m "aot and not slow" tests/aot

$(VENV)/triton-$(TRITON_OLD): $(VENV)/.packages
	@echo "==> fetching Triton $(TRITON_OLD) beside the installed one"
	@$(PIP) install --no-deps --target $@ triton==$(TRITON_OLD)
	@touch $@

test-slow: export AST_FAST_HYPOTHESIS := ci
test-slow: setup
	@$(PYTEST) -m "(slow or hypothesis) and not gpu and not interpret and not aot" tests
	@TRITON_INTERPRET=1 $(PYTEST) -m "interpret and (slow or hypothesis)" tests/kernels

lint: setup
	@echo "==> lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

verify: setup
	@$(BIN)/ast-fast verify

bench: setup
	@PYTHON=$(BIN)/python benchmarks/cpu.sh

soak: setup
	@echo "==> soak: 10,000 steps alone, 10,000 of the trainer"
	@$(BIN)/python -m benchmarks.soak --json build/soak.json

docs: setup
	@$(BIN)/mkdocs build --strict

wheel: setup
	@rm -rf dist/wheel && mkdir -p dist/wheel
	@AST_FAST_REQUIRE_EXT=1 $(PIP) wheel --no-deps --no-build-isolation -w dist/wheel .
	@$(PYTEST) tests/packaging -m "" -k wheel
	@ls -l dist/wheel

clean:
	rm -rf $(VENV) build dist *.egg-info ast_fast/_C*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache
