# Every target makes the environment in .venv first, if it is missing or out of date.
# `make` alone lists the targets.

PYTHON ?= python3
ROOMS := runtime profiles compress export
ARGS ?=
EXTRA ?=
MINUTES ?= 10
NAME ?=

# Tests that need one more extra, EXTRA=openvino (whose ONNX Runtime takes the place of the usual
# one) or EXTRA=ray, have an environment of their own; with ARGS, all tests can run in it.
VENV := .venv$(addprefix -,$(EXTRA))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := images,hub,data,lora,serve,grpc,export,profile,dev
ifeq ($(EXTRA),)
EXTRAS := cpu,$(EXTRAS)
else ifeq ($(EXTRA),openvino)
EXTRAS := onnxruntime-openvino,$(EXTRAS)
else ifeq ($(EXTRA),ray)
EXTRAS := cpu,ray,$(EXTRAS)
else
$(error EXTRA=$(EXTRA): openvino and ray have tests of their own)
endif
# The device's part has an environment for each version of Python that devices have.
VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
RUNTIME_VENV = .venv-runtime-$(VERSION)
RUNTIME_STAMP = $(RUNTIME_VENV)/.installed
RUNTIME_EXTRAS := cpu,images,hub,serve,grpc,profile,test
RUNTIME_CONSTRAINTS = $(firstword $(wildcard constraints-python$(VERSION).txt) constraints.txt)
# One process more than there are processors: tests wait for servers and for other processes.
PROCESSES = $(shell $(PYTHON) -c 'import os; print(min(8, (os.cpu_count() or 1) + 1))')
# In the order of tests/conftest.py, the longest files first, not by the number of tests in a file.
PYTEST = -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-runtime fuzz lint types bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

venv: $(STAMP) ## the environment in .venv, at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing edgeclip[$(EXTRAS)] into $(VENV); the first time takes some minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

$(RUNTIME_STAMP): pyproject.toml $(RUNTIME_CONSTRAINTS)
	@$(PYTHON) -m venv $(RUNTIME_VENV)
	@echo "installing edgeclip[$(RUNTIME_EXTRAS)] into $(RUNTIME_VENV)"
	@$(RUNTIME_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(RUNTIME_CONSTRAINTS) -e '.[$(RUNTIME_EXTRAS)]'
	@touch $@

demo: $(STAMP) ## distil, export and measure the built-in data's student, in runs/demo (ARGS=--quick)
	$(BIN)/edgeclip demo --out runs/demo $(ARGS)

test: $(STAMP) ## the whole test suite (ARGS="-m 'not slow' -k bundle"; EXTRA=openvino or ray)
	$(BIN)/python $(PYTEST) $(or $(ARGS),$(addprefix -m ,$(EXTRA)))

test-runtime: $(RUNTIME_STAMP) ## the device's part alone, without torch (PYTHON=python3.10 or later)
	$(RUNTIME_VENV)/bin/python $(PYTEST) -m "not ray and not openvino" tests/runtime tests/profiles $(ARGS)

fuzz: $(STAMP) ## property tests with random examples, until one fails (MINUTES=10)
	@end=$$(($$(date +%s) + 60 * $(MINUTES))); \
	while test $$(date +%s) -lt $$end; do \
		$(BIN)/python $(PYTEST) --quiet -m hypothesis --hypothesis-profile fuzz $(ARGS) || exit 1; \
	done

lint: $(STAMP) ## ruff, its formatter, and mypy --strict on source and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

# mypy cannot follow setuptools' mapping of ROOM to edgeclip.ROOM: show it that tree.
types: $(STAMP)
	@mkdir -p build/typing/edgeclip
	@for room in $(ROOMS); do ln -sfn ../../../$$room build/typing/edgeclip/$$room; done
	$(BIN)/mypy

bench: $(STAMP) ## the benchmarks, all or those with NAME=part (ARGS=--quick)
	@found=""; failed=""; \
	for script in tests/benchmarks/*$(NAME)*.py; do \
		case "$$script" in tests/benchmarks/_*) continue;; esac; \
		test -f "$$script" || continue; \
		found=yes; echo "== $$script $(ARGS)"; \
		$(BIN)/python "$$script" $(ARGS) || failed="$$failed $$script"; \
	done; \
	test -n "$$found" || { echo "no benchmark in tests/benchmarks is named like '$(NAME)'"; exit 2; }; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

clean: ## remove what was built (not .venv, not runs)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(ROOMS) tests -type d -name __pycache__ -prune -exec rm -rf {} +
