# make quickstart   set up, compare methods on this machine, print the table and the report's path
# make test         set up, check, test
# make check        format, lint, types, layers, docs in sync
# make test-slow    the tests that do not fit into make test
# make coverage     make test's tests under coverage, which takes half as long again
# make test-servers the tests against real servers: needs PREFOPT_VLLM_PYTHON, see docs/how-to/vllm.md
# make docs         write the generated pages of docs/ again
# make clean        remove the environment and caches

PYTHON ?= python3
BIN := .venv/bin
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
SETUP := .venv/.done
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
WORKERS ?= 2
PYTEST = pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
# Tests start many processes: each would compile everything again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test coverage check test-slow test-servers docs clean setup

quickstart: $(SETUP)
	@$(BIN)/prefopt bench run benchmarks/suites/quickstart.yaml --out runs/quickstart

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt $(addsuffix /pyproject.toml,$(PLUGINS))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prefopt needs Python 3.11 or newer; set PYTHON=...")'
	@echo "setting up .venv (a few minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable ".[dev]" $(addprefix --editable ./,$(PLUGINS))
	@touch $@

check: $(SETUP)
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo > .venv/layers.txt || (cat .venv/layers.txt; false)
	@$(BIN)/python docs/generate.py --check

test: $(SETUP)
	@began=$$(date +%s); \
	$(MAKE) --no-print-directory check && $(BIN)/python -m $(PYTEST); \
	status=$$?; echo "make test: $$(( $$(date +%s) - began )) s"; exit $$status

coverage: $(SETUP)
	@rm -f .coverage .coverage.*; $(BIN)/coverage run -m $(PYTEST)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --skip-covered --fail-under=90

test-slow: $(SETUP)
	@$(BIN)/python -m pytest -m slow --capture=no

test-servers: $(SETUP)
	@$(BIN)/python -m pytest -m servers tests/servers

docs: $(SETUP)
	@$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage .coverage.*
