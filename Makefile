# Everything runs in .venv, which `make setup` builds from nothing but Python 3.11+, pip and the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-postgres test-faults test-model lint check format bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
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
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache
