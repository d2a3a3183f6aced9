# Python that makes the environment, and extra arguments for its `pip install`. PyPI's torch for Linux carries CUDA
# (several GB); for a CPU-only environment: make env PIP_EXTRA="--index-url URL", URL being PyTorch's own CPU index.
PYTHON ?= python3
PIP_EXTRA ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help env test test-gpu test-transformers test-with demo docs lint wheel-smoke clean

help: ## show this list
	@echo "hf_asentmax: ASEntmax attention for Transformers. Each command sets up $(VENV) first if it is not there."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  variables:  PYTHON=$(PYTHON) (3.10 or newer)   PIP_EXTRA='$(PIP_EXTRA)' (more arguments for pip install)"

env: $(STAMP) ## install the package and its tools into .venv, at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and \
	  "PYTHON must be Python 3.10 or newer, got %d.%d; name one: make env PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing into $(VENV): a few minutes, more where pip downloads torch with CUDA"
	$(BIN)/python -m pip install --quiet $(PIP_EXTRA) -c constraints.txt -e ".[dev]"
	@touch $@

# In the order of tests/conftest.py, which begins with the longest files.
SUITE := -q -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test: lint ## check style and types, then run the tests that need neither a GPU nor patience
	$(BIN)/python -m pytest $(SUITE) --durations=10

test-gpu: env ## the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu --durations=10

# The oldest release is pyproject.toml's; everything else stays at constraints.txt, but for what Transformers pins itself.
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
TRANSFORMERS_TESTS := $(patsubst %,tests/test_%.py,models generation engines patching no_silent_softmax packing_models \
  remote_code conversion peft training tensor_parallel)

test-transformers: ## the tests of all that Transformers touches, on its oldest supported release and on its newest
	@$(MAKE) --no-print-directory test-with NAME=oldest RELEASE='==$(OLDEST).*'
	@$(MAKE) --no-print-directory test-with NAME=newest RELEASE=

test-with:
	test -d $(VENV)-$(NAME) || $(PYTHON) -m venv $(VENV)-$(NAME)
	grep -Ev '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > $(VENV)-$(NAME)/constraints.txt
	$(VENV)-$(NAME)/bin/python -m pip install --quiet --upgrade $(PIP_EXTRA) -c $(VENV)-$(NAME)/constraints.txt \
	  -e ".[test]" "transformers$(RELEASE)"
	$(VENV)-$(NAME)/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	$(VENV)-$(NAME)/bin/python -m pytest $(SUITE) $(TRANSFORMERS_TESTS)

demo: env ## train two small twins (softmax, ASEntmax), compare them far beyond their training length: runs/demo
	$(BIN)/python scripts/demo.py --output_dir runs/demo

docs: env ## build the documentation into site/, where a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: env ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel-smoke: env ## build the wheel, install it elsewhere and use it from another folder
	PYTHON=$(BIN)/python scripts/smoke_wheel.sh

clean: ## remove build products and caches (not .venv*, not runs)
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)*/*' -prune -exec rm -rf {} +
