# Every target makes the environment in .venv first, if it is missing or out of date.
# `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ROOMS := runtime profiles compress export
EXTRAS := cpu,hub,serve,grpc,export,profile,dev
ARGS ?=
NAME ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test lint types bench clean

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

test: $(STAMP) ## the whole test suite (ARGS="-m 'not slow' -k bundle")
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile $(ARGS)

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
