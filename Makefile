# Every target sets up what it needs; on a fresh machine only Python 3.10 or newer and make have to be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: bench demo test lint format

demo: $(READY)
	@echo "A short run: 3 epochs and 2 seeds, where 'visattn compare' by itself takes 20 and 3."
	$(BIN)/visattn compare --epochs 3 --seeds 2 --out demo
	@echo "The full one: $(BIN)/visattn compare --out full"

test: $(READY)
	$(BIN)/python -m pytest -n 2 -q

bench: $(READY)
	$(BIN)/visattn bench --against reference,compiled,peers --json benchmarks/results
	$(BIN)/python -m visattn.benchmarks.table

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt hatch_build.py $(wildcard src/visattn/native/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[all]'
	touch $(READY)
