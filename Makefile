# From a clean clone, with Python 3.11 or later and make: `make demo`, `make test`.
# Everything is installed into .venv, once; it is installed again when pyproject.toml or constraints.txt change.

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# python3.11 if it runs, else a python3 that is new enough. Choose another with `make PYTHON=... test`.
FIND := for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done
PYTHON = $(shell $(FIND))
# Options for the command behind a target: `make demo ARGS="--solver broyden"`, `make test ARGS="-k registry"`.
ARGS :=

.PHONY: help demo test lint bench clean

help:
	@echo "make demo   train a DEQ on handwritten digits; writes convergence.png and demo.toml"
	@echo "make test   run every test"
	@echo "make lint   ruff and pyright"
	@echo "make bench  run the benchmarks; writes benchmarks/results/"
	@echo "make clean  remove .venv and everything else that was made"
	@echo 'Options for the command behind a target: make demo ARGS="--solver broyden"'

demo: $(STAMPS)/demo
	$(BIN)/deqcore demo $(ARGS)

# Two workers with one thread each: with more, they wait for each other on two cores.
test: $(STAMPS)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(STAMPS)/bench
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info plugins/*/build plugins/*/dist plugins/*/*.egg-info
	rm -rf .pytest_cache .hypothesis .ruff_cache convergence.png demo.toml
	find . -name .git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# The pinned torch comes first and by itself, so that nothing that is installed later can bring another build of it.
$(STAMPS)/torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "deqcore needs Python 3.11 or later; set it with: make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch into $(VENV), once; this takes a minute or two"
	@$(INSTALL) torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo: $(STAMPS)/torch pyproject.toml
	@echo "installing deqcore into $(VENV)"
	@$(INSTALL) -e '.[demo]'
	@touch $@

$(STAMPS)/bench: $(STAMPS)/dev
	@echo "installing what the benchmarks compare with into $(VENV)"
	@$(INSTALL) -e '.[bench]'
	@touch $@

$(STAMPS)/dev: $(STAMPS)/torch pyproject.toml
	@echo "installing deqcore and what its tests need into $(VENV)"
	@$(INSTALL) -e '.[dev]'
	@touch $@ $(STAMPS)/demo
