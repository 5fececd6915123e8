# Everything runs in .venv, which `make setup` builds from nothing but Python 3.11+, pip and the package index, in the
# versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV_VENV := .venv-uv
UV := $(UV_VENV)/bin/uv
UV_VERSION := 0.13.9

# What the versions of our dependencies could break: the same tokens, the targets, the adapters, the store.
END_SUITES := $(addprefix tests/test_,exactness.py generation.py targets.py transformers_api.py measurements.py static.py \
	fusing.py packing.py sampling.py grammar.py sessions.py quantization.py langchain.py langchain_tools.py \
	langchain_standard.py llama_index.py llama_index_tools.py llama_index_standard.py llama_index_engines.py \
	pool_contract.py storage.py upkeep.py schemas.py)
# The oracle and the adapters, on tiny models.
SHORT_SUITES := $(addprefix tests/test_,exactness.py generation.py targets.py transformers_api.py langchain.py \
	langchain_tools.py llama_index.py llama_index_tools.py)

.PHONY: setup lock demo test test-all test-oldest test-newest test-ends test-postgres test-faults test-model \
	wheel lint check format bench clean

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

# Two processes, as many as small machines have cores. What is left out is named at the end.
test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The lowest versions that pyproject.toml admits; the newest that the index has, also beyond its bounds.
test-oldest test-newest: test-%: setup $(UV)
	$(BIN)/python scripts/test_end $* -n 2 --dist worksteal $(END_SUITES)

# A short form of both. torch is the lock's, which spares gigabytes: its own ends are for the two above.
test-ends: setup $(UV)
	$(BIN)/python scripts/test_end oldest --torch locked -n 2 --dist worksteal $(SHORT_SUITES)
	$(BIN)/python scripts/test_end newest --torch locked -n 2 --dist worksteal $(SHORT_SUITES)

# The wheel and the sdist, installed into empty environments and tried.
wheel: setup
	$(BIN)/python scripts/check_wheel

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
	rm -rf $(VENV) .venv-uv .venv-oldest .venv-newest dist .mypy_cache .ruff_cache .pytest_cache
