# Every target sets up the environment first, unless it is up to date.
PYTHON ?= python3
JOBS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow fuzz mutate lint format bench notebooks docs clean
# After a failed installation the stamp must not look up to date.
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## set up .venv with the tested versions

quickstart: $(STAMP)  ## align the bundled model on the bundled preferences and measure it -> runs/quickstart/
	@$(RUN) -m t2i_align quickstart

test: $(STAMP)  ## run the tests and notebooks, except tests marked slow
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) -m "not slow"

test-slow: $(STAMP)  ## run the tests marked slow
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow

fuzz: $(STAMP)  ## run the property tests on new random examples
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) -m hypothesis --hypothesis-profile others

# MUTANTS limits them by name, the others stay unchecked and unlisted, and mutmut continues where it was:
# make mutate MUTANTS='t2i_align.evaluation.stats.*'
mutate: $(STAMP)  ## change the core in every small way and list the changes that no test notices
	@$(RUN) -m pip install --disable-pip-version-check -q -e '.[mutate]' -c constraints.txt
	@OMP_NUM_THREADS=1 $(RUN) -m mutmut run --max-children $(JOBS) $(MUTANTS)
	@$(RUN) -m mutmut results | sed '/: not checked$$/d'

lint: $(STAMP)  ## check style and types with ruff and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

format: $(STAMP)  ## apply ruff's automatic fixes
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

bench: $(STAMP)  ## time the training step against a bare PyTorch loop -> benchmarks/results/
	@$(RUN) benchmarks/step.py

notebooks: $(STAMP)  ## run the notebooks and store their outputs
	@$(RUN) -m pytest --overwrite notebooks

docs: $(STAMP)  ## build the documentation -> build/site/index.html
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

clean:  ## remove the environment, caches and build products, but not runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis mutants
	find t2i_align pipelines reward_scorers tools tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found. Install Python 3.11 or newer," \
	  "or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is" \
	  "`$(PYTHON) --version`; Python 3.11 or newer is needed. Name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual" \
	  "environments. On Debian or Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV) (about 8 GB; the first time takes a few minutes) ..."
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(RUN) -m pip install --disable-pip-version-check -e '.[dev,docs]' -c constraints.txt \
	  || { echo "error: the installation stopped; run the same command again to continue it" >&2; exit 1; }
	@touch $@
