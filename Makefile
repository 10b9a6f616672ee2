# A fresh clone needs nothing but Python 3.10 or newer: every target makes the virtual environment it runs in.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# The authors' published SD3 files, when you have them: tests and demo then run on those instead of a stand-in.
PUBLISHED ?= $(wildcard ../shared/published/sd3)
export SOFTREPA_PUBLISHED_SD3 = $(PUBLISHED)

# The torch of the older stacks. `make test-stacks TORCH=2.6.0` takes the lowest, with gigabytes of CUDA libraries.
TORCH ?= 2.13.0
# What the smoke test of a stack runs: golden numbers, the verbs, files, training and the command.
SMOKE = $(addprefix tests/test_,golden.py tokens.py verbs.py checkpoint.py objectives.py trainer.py commands.py)

.PHONY: demo space test test-all test-stacks smoke-lowest lint format docs bench

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(RUN) -m pip install --quiet --no-deps --editable examples
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

# An environment of its own for the releases of constraints-lowest.txt or constraints-middle.txt.
$(VENV)/%/.installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv $(VENV)/$*
	sed 's/^torch==.*/torch==$(TORCH)/' constraints-$*.txt > $(VENV)/$*/constraints.txt
	$(VENV)/$*/bin/python -m pip install --quiet --constraint $(VENV)/$*/constraints.txt torch
	$(VENV)/$*/bin/python -m pip install --quiet --constraint $(VENV)/$*/constraints.txt --editable ".[test]"
	touch $@

# The tests on the oldest releases, on those between, and on the newest.
test-stacks: $(VENV)/lowest/.installed $(VENV)/middle/.installed
	OMP_NUM_THREADS=1 $(VENV)/lowest/bin/python -m pytest -n auto -m "not slow"
	OMP_NUM_THREADS=1 $(VENV)/middle/bin/python -m pytest -n auto -m "not slow"
	$(MAKE) test

smoke-lowest: $(VENV)/lowest/.installed
	OMP_NUM_THREADS=1 $(VENV)/lowest/bin/python -m pytest -n auto -m "not slow" $(SMOKE)

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
