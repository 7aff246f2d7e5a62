# make demo: convert the bundled model and print the comparison.  make test: all checks, as CI runs them.
# make bench: the README's table of speed, stock types repacked and not, and bench.json with all of it.
# make test-fast: the daily loop, without lint, slow tests, kernels and whole models; `make runtime` once before it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := D2Q_REQUIRE_RUNTIME=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
# OpenMP's threads spin while they wait, which makes torch crawl on a machine that does anything else.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo bench test test-fast lint runtime clean

demo: runtime
	$(BIN)/python tools/demo.py

bench: runtime
	$(BIN)/python -m tools.bench_model --generation 32 --markdown --write bench.json

test: RUNTIME += --server --no-page
test: lint runtime
	$(PYTEST)

test-fast:
	$(PYTEST) -m "not slow" $(addprefix tests/,calibration export formats model quantize runtime utils) tests/test_*.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vermin --quiet --no-tips --violations --target=3.10- d2q_edge examples tests tools
	$(BIN)/lint-imports
	$(BIN)/python tools/generate_tables.py --check

# Builds the patched llama-cpp-python and llama.cpp's tools once per machine, and its server for `make test`; later runs
# take them from the cache.
RUNTIME := --tools
runtime: $(VENV)/installed
	$(BIN)/d2q-edge runtime install $(RUNTIME)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
