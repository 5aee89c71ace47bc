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
EXTRAS := openvino,$(EXTRAS)
else ifeq ($(EXTRA),ray)
EXTRAS := cpu,ray,$(EXTRAS)
else
$(error EXTRA=$(EXTRA): openvino and ray have tests of their own)
endif
# One process more than there are processors: tests wait for servers and for other processes.
PROCESSES = $(shell $(PYTHON) -c 'import os; print(min(8, (os.cpu_count() or 1) + 1))')
# In the order of tests/conftest.py, the longest files first, not by the number of tests in a file.
PYTEST = $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test fuzz lint types bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' Makefile

venv: $(STAMP) ## the environment in .venv, at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing edgeclip[$(EXTRAS)] into $(VENV); the first time takes some minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP) ## distil, export and measure the built-in data's student, in runs/demo (ARGS=--quick)
	$(BIN)/edgeclip demo --out runs/demo $(ARGS)

test: $(STAMP) ## the whole test suite (ARGS="-m 'not slow' -k bundle"; EXTRA=openvino or ray)
	$(PYTEST) $(or $(ARGS),$(addprefix -m ,$(EXTRA)))

fuzz: $(STAMP) ## property tests with random examples, until one fails (MINUTES=10)
	@end=$$(($$(date +%s) + 60 * $(MINUTES))); \
	while test $$(date +%s) -lt $$end; do \
		$(PYTEST) --quiet -m hypothesis --hypothesis-profile fuzz $(ARGS) || exit 1; \
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
