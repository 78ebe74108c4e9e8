# Each target sets up what it needs, in .venv.  Another index or a CPU-only torch: make test PIP_ARGS="--index-url ..."
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find api modeling_unihema processing_unihema training hub_cards \( -name '*.py' -o -name '*.json' -o -name '*.jinja' -o -path '*/static/*' -o -path '*/shipped_files/*' \) -not -path '*/__pycache__/*')

# Where bytecode is not kept, every command that a test starts compiles PyTorch and Transformers anew: ten seconds each.
unexport PYTHONDONTWRITEBYTECODE

ATTACK ?= 20000
SEED ?= $(shell date +%s)

.PHONY: install test test-slow attack test-lowest lint format docs dist demo demo-train bench clean

install: $(VENV)/installed

# Dependencies: only when the lists of them change.
$(VENV)/dependencies: setup.py pyproject.toml constraints-lowest.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --no-compile $(PIP_ARGS) ".[dev]"
	touch $@

# The package itself: after every change, so that what is tested is what is checked out.
$(VENV)/installed: $(VENV)/dependencies $(SOURCES)
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	rm -rf build
	touch $@

# A test runs on one thread; files are shared out among the cores.
test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

# The same tests with the oldest releases that setup.py admits, in an environment of its own.
test-lowest:
	$(MAKE) test VENV=.venv-lowest PIP_ARGS="$(PIP_ARGS) --constraint constraints-lowest.txt"

# Hostile images, data, checkpoints, results, configurations, names and answers of a Hub: about half an hour on two cores. ATTACK is
# the number of inputs of all kinds together. SEED, which is printed, repeats them; what failed is kept in .attacks/ and tried first.
attack: install
	@echo "SEED=$(SEED)"
	UNIHEMA_ATTACK=$(ATTACK) UNIHEMA_ATTACK_SEED=$(SEED) $(BIN)/python -m pytest -n auto --maxprocesses 4 -rA tests/robustness

# Imports and types are read from the installed package, in which the folders lie as they are imported.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: $(VENV)/dependencies
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site, in site/. API pages are read from the installed package.
docs: install
	$(BIN)/python -m mkdocs build --strict

# The source distribution and the wheel, as they would be published.
dist: $(VENV)/dependencies
	rm -rf dist build
	$(BIN)/python -m build --outdir dist .
	rm -rf build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/check_wheel.py dist

# Real smears, analysed by the checkpoint that comes with the package.
demo: install
	$(BIN)/unihema demo demo

# Synthetic smears, and the tiny model trained on them: about nine minutes.
demo-train: install
	$(BIN)/python -m tools.demo_train demo-train

# About twenty minutes on two cores; writes docs/results/speed.md and speed.json.
bench: install
	$(BIN)/python -m benchmarks.speed

clean:
	rm -rf build dist site demo demo-train *.egg-info .hypothesis .pytest_cache .ruff_cache .mypy_cache
