# A fresh clone needs nothing but Python 3.10 or newer: every target makes the virtual environment it runs in.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# The authors' published SD3 files, when you have them: tests and demo then run on those instead of a stand-in.
PUBLISHED ?= $(wildcard ../shared/published/sd3)
export SOFTREPA_PUBLISHED_SD3 = $(PUBLISHED)

.PHONY: demo space test test-all lint format docs bench

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(RUN) examples/demo.py

# The page's library wants other versions than the tests, so it has an environment of its own.
space:
	test -x .venv/space/bin/python || examples/space/install.sh
	.venv/space/bin/python examples/space/app.py

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto -m "not slow"

test-all: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/typos

format: $(VENV)/.installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

bench: $(VENV)/.installed
	$(RUN) benchmarks/adapter.py
	$(RUN) benchmarks/training.py
	$(RUN) benchmarks/paper_cost.py
