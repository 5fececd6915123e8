# Everything runs in .venv, which `make setup` builds from nothing but Python 3.11+, pip and the package index, in the
# versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV_VENV := .venv-uv
UV := $(UV_VENV)/bin/uv
UV_VERSION := 0.13.9

.PHONY: setup lock demo test test-postgres test-faults test-model lint check format bench clean

setup: $(STAMP)

# pip first: an older one knows no constraints of the packages that build ours. What was installed is kept in the stamp.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip list --format freeze --exclude-editable > $@.new
	mv $@.new $@

# The newest of everything that pyproject.toml and constraints.in admit, for every Python and system that we support.
lock: $(UV)
	$(UV) pip compile --quiet --no-config --universal --python-version 3.11 --upgrade --extra dev \
		--custom-compile-command "make lock" --annotation-style line --output-file constraints.txt \
		pyproject.toml constraints.in

$(UV): Makefile
	$(PYTHON) -m venv $(UV_VENV)
	$(UV_VENV)/bin/python -m pip install --quiet uv==$(UV_VERSION)
	touch $@

demo: setup
	$(BIN)/python examples/quickstart.py

test: setup
	$(BIN)/python -m pytest

# Both of these bring a PostgreSQL of their own: scripts/with_postgres installs and starts one, and leaves nothing of it.
test-postgres: setup
	scripts/with_postgres $(BIN)/python -m pytest -k "not test_faults or postgres" tests/test_pool_contract.py \
		tests/test_storage.py tests/test_upkeep.py tests/test_schemas.py tests/test_faults.py tests/test_pool_cli.py

test-faults: setup
	scripts/with_postgres $(BIN)/python -m pytest tests/test_faults.py

# LangChain's integration suite over a real model: make test-model MODEL=qwen2.5-coder-1.5b-instruct
test-model: setup
	OUROBOROS_TEST_MODEL=$(MODEL) $(BIN)/python -m pytest -s tests/test_langchain_real.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# make bench PROMPTS=HumanEval.jsonl
bench: setup
	$(BIN)/ouroboros bench --prompts $(PROMPTS)

clean:
	rm -rf $(VENV) .venv-uv dist .mypy_cache .ruff_cache .pytest_cache
