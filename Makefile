# The few commands that people and CI share. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
# ONNX Runtime for the GPU where there is one.
DEMO := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo demo-gpu || echo demo)

.PHONY: help demo test check format protos bench wheel clean

help:  ## what there is to run
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

demo: $(VENV)/.demo  ## the main job once: train, ensemble, merge, serve, measure, report
	$(BIN)/ensemerge demo

test: $(VENV)/.dev check  ## everything that must hold before a change lands
	$(BIN)/python -m pytest

check: $(VENV)/.dev  ## format, lint, types, layers, generated code, Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python protos/generate.py --check
	$(BIN)/hadolint Dockerfile

format: $(VENV)/.dev  ## bring the code into its form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(VENV)/.dev  ## generate the messages from the .proto files
	$(BIN)/python protos/generate.py

bench: $(VENV)/.dev  ## the benchmarks, side by side with their limits
	$(BIN)/python benchmarks/serving.py

wheel: $(VENV)/.dev  ## dist/*.whl
	$(BIN)/python -m build --wheel --outdir dist .

clean:  ## remove the environment and caches; models stay
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit("expected Python 3.11 or newer, got " + sys.version.split()[0] + "; set PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) '.[$(DEMO)]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) '.[$(DEMO),dev]'
	@touch $@ $(VENV)/.demo
