# make setup   everything into .venv, pinned        make demo    the main job on the embedded default
# make test    what CI runs                         make check   style, types, floors (part of make test)
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test check format clean

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch .venv/ready

demo: setup
	$(BIN)/netweight compress digits-cnn --data digits --budget bits=4 --within linf=0.02 --out demo

test: check
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

check: setup
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff format --quiet .
	$(BIN)/ruff check --fix --quiet .

clean:
	rm -rf .venv demo build *.egg-info
