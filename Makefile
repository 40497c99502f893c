# Everything runs in .venv, which is made on first use. torch and torchvision are installed together, from one index.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint clean

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch torchvision
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

quickstart: .venv/installed
	$(BIN)/python examples/clothing/quickstart.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2  # one thread for each of two workers

clean:
	rm -rf .venv out build dist *.egg-info
