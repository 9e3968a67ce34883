# `make demo` and `make test` set up everything they need in .venv on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test quick docs mutate lowest lock catalog check-catalog clean

# Tests that need no large model: most of what goes wrong while one edits shows here.
QUICK := tests/test_catalog.py tests/test_files.py tests/test_hub.py tests/test_weights.py tests/test_loading_mutants.py \
	tests/test_docs.py tests/cards tests/pictures/test_pictures_mutants.py tests/data tests/evaluation/test_metrics.py \
	tests/ffn tests/layers tests/moe/test_moe_mutants.py tests/moe/test_losses.py tests/caching/test_caching_mutants.py \
	tests/caching/test_schedules.py tests/caching/test_taylor.py tests/caching/test_units.py tests/tasks/test_teachers.py

demo: $(STAMP)
	$(BIN)/zoo demo -o demo

# At most three tests are run a second time, with the first traceback shown: worker processes have died with no word of why.
RERUN := --reruns 1 --max-suite-reruns 3 --rerun-show-tracebacks

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n auto --dist worksteal $(RERUN)

# In 90 s on two quiet cores; types are checked beside the tests.
quick: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow' --durations=0 --durations-min=2 $(QUICK) && wait $$types

# The documents as a site, offline. Open docs/_build/index.html.
docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

# Seed 200 bugs of one line and tell which of them the tests let live; `make mutate COUNT=20 AREAS='hub data'`.
COUNT ?= 200
mutate: $(STAMP)
	$(BIN)/python -m tests.mutate --count $(COUNT) $(AREAS)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# The quick tests with the lowest versions that pyproject.toml allows, in an environment of its own.
lowest:
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct -e '.[dev]'
	.venv-lowest/bin/python -m pytest -n auto -m 'not slow'

# Rewrite requirements.lock, what the Dockerfile installs: the versions of constraints.txt with their hashes.
EXTRAS := diffusion video train export openvino spandrel formats demo app
lock: $(STAMP)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml $(addprefix --extra ,$(EXTRAS)) -c constraints.txt --generate-hashes \
		--python-version 3.11 --python-platform linux --no-annotate --no-emit-index-url --no-header --quiet -o requirements.lock

# Rewrite zoo/catalog.json, the facts behind `zoo list`, from the registry.
catalog: $(STAMP)
	$(BIN)/python -m zoo.cards.catalog_writer

# Count every model anew and say whether zoo/catalog.json is out of date; `make test` counts one model a family.
check-catalog: $(STAMP)
	$(BIN)/python -m zoo.cards.catalog_writer --check

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info
