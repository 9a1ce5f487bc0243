# Commands of the project. `make help` lists them. Works on a fresh machine with Python 3.11+ and nothing else.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# On a machine without a GPU, a CPU build of torch saves several GB:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Processes of `make test` that test side by side. Each takes up to 2 GB.
TESTERS ?= 2

# Two torch threads on a shared 2-core machine are up to 30 times slower than one.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo up test test-gpu mutate check bench chaos clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.installed-gpu  ## Make .venv and install what a studio needs (TORCH_INDEX=... picks a torch build)

setup-dev: $(VENV)/.installed-dev  ## As setup, plus what tests and checks need

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-gpu: requirements/web.txt requirements/gpu.txt | $(VENV)/bin/python
	@echo "installing requirements/gpu.txt into $(VENV) (some minutes the first time) ..."
	@$(PIP_INSTALL) -r requirements/gpu.txt
	@touch $@

$(VENV)/.installed-dev: requirements/dev.txt $(VENV)/.installed-gpu
	@echo "installing requirements/dev.txt into $(VENV) ..."
	@$(PIP_INSTALL) -r requirements/dev.txt
	@touch $@

demo: setup  ## The whole main job on the demo model, through REST; ends with pictures to look at
	$(BIN)/python -m demo.run

up: setup  ## Start the studio on this machine: one terminal, one URL, one login
	$(BIN)/python manage.py studio

test: setup-dev  ## All tests, on real servers: side by side, then those that need the machine for themselves
	@failed=0; \
	$(BIN)/python -m pytest -m "not gpu and not alone" -n $(TESTERS) --dist loadfile --no-loadscope-reorder tests || failed=1; \
	$(BIN)/python -m pytest -m "alone and not gpu" tests || failed=1; \
	exit $$failed

test-gpu: setup-dev  ## The tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests

mutate: setup-dev  ## Plant bugs one by one; the tests that guard against each must go red
	$(BIN)/python -m tests.chaos.mutate

check: setup-dev  ## Lint, types, direction of imports, settings, migrations, API schema
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy core gpu_worker jobs lorasite demo
	$(BIN)/lint-imports
	LORASITE_SECRET_KEY=$$($(BIN)/python -c 'import secrets; print(secrets.token_urlsafe(64))') \
		DJANGO_SETTINGS_MODULE=lorasite.settings.production \
		$(BIN)/python manage.py check --deploy --fail-level ERROR
	$(BIN)/python manage.py makemigrations --check --dry-run
	$(BIN)/python manage.py spectacular --validate --fail-on-warn --file /dev/null

bench: setup-dev  ## Run every benchmark in tests/benchmarks; each prints one JSON object as its last line
	@for file in tests/benchmarks/[a-z]*.py; do \
		$(BIN)/python -m tests.benchmarks.$$(basename $$file .py) || exit 1; \
	done

chaos: setup-dev  ## Kill, freeze and cut off a real site; audit every job (KILLS=300 SEED=7 DATABASE=postgres|sqlite)
	$(BIN)/python -m tests.chaos.run --kills $(or $(KILLS),300) --database $(or $(DATABASE),postgres) \
		$(if $(SEED),--seed $(SEED))

clean:  ## Remove caches and .venv; your data in var/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
