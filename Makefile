# Two commands for a fresh machine with Python >= 3.11: `make demo` and `make test`. Both set up .venv first.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test types tests docs gpu gpu-rehearsal install clean

install: .venv/installed

# Installs again only when the requirements change.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pra needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Trains the digits recipe (3 to 4 minutes on 2 cores; at once if it is trained already), samples, looks at the result.
demo: .venv/installed
	$(BIN)/python examples/demo.py runs/demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory --jobs 2 types tests

types:
	$(BIN)/mypy

tests:
	$(BIN)/python -m pytest -q -n auto --dist loadfile

# The documentation as pages for a browser: site/index.html. A dead link or an unknown name stops it.
docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'look at site/index.html'

# Everything that needs a GPU, within 25 minutes. MINUTES=9 does a part: the next call does the rest. Installs nothing.
gpu gpu-rehearsal:
	PYTHONPATH=src $(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu_day.py $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(filter %rehearsal,$@),--rehearsal)

clean:
	rm -rf .venv runs site
