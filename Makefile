# Everything runs in .venv, and test-oldest in .venv-oldest; both are made on first use. torch and torchvision are installed
# together, from one index.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin

.PHONY: quickstart test test-all test-oldest lint clean

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

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup  # one thread for each of two workers

test: lint
	$(PYTEST) -m 'not slow'

# With every backbone in every test, every pair of export formats, two dozen kills: before a release.
test-all: lint
	$(PYTEST)

# The versions are for Python 3.10 to 3.12: `make test-oldest PYTHON=python3.10`. The .gitignore keeps git and ruff out.
.venv-oldest/installed: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	echo '*' > .venv-oldest/.gitignore
	$(OLDEST)/pip install --quiet -c tests/oldest.txt torch torchvision
	$(OLDEST)/pip install --quiet -c tests/oldest.txt -e '.[cli,train,report,onnx]' 'pytest>=8' 'hypothesis>=6'
	touch $@

# Left out: what needs TensorBoard, and what compares with torch's own counter, which does not see the CPU's fused
# attention in torch 2.6.
test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest tests/laws tests/unit tests/test_cli.py tests/test_storage.py \
		tests/test_backbones.py tests/train/test_data.py tests/train/test_objectives.py tests/train/test_finetune.py \
		--deselect tests/train/test_finetune.py::test_tensorboard_gets_the_same_figures \
		--deselect tests/unit/test_cost.py::test_torchs_own_counter_agrees

clean:
	rm -rf .venv .venv-oldest out build dist *.egg-info
