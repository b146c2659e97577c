# The project's commands; `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(abspath $(VENV))/bin
# The stages run `python`, torchrun and dvc of this environment.
export PATH := $(BIN):$(PATH)
# Tests wait more than they compute: two processes, each file in one of them.
PARALLEL ?= -n 2 --dist loadfile
# Without compiled files Ray takes 15 s to start, not 4.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run test test-slow soak rehearse gpu lint format lock clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 20

# --no-compile: a run imports a quarter of the installed modules, and Python compiles these itself.
# That takes 19 s of CPU time in the first run; pip would take 65 s for all of them.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: PYTHON=$(PYTHON) is older than 3.10; name another: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Without a git repository (in an unpacked archive), DVC needs core.no_scm. A killed DVC may have left
# its own files half written.
run: $(VENV)/.installed  ## run the pipeline of params.yaml: text, shards, model, metrics, report
	@if test "$$(git rev-parse --show-toplevel 2>/dev/null)" = "$(CURDIR)"; then \
		dvc config --local --quiet --unset core.no_scm 2>/dev/null || true; \
	else \
		echo 'no git repository here: DVC runs with core.no_scm; dvc exp and dvc diff need git'; \
		dvc config --local core.no_scm true; \
	fi
	@python -m pipeline.repair
	dvc repro
	@echo
	@sed -n '/^## Before training/,$$p' artifacts/samples.md
	@echo
	@python -c 'import json; print("Result        validation loss {val_loss:.4f} nats per token, perplexity {perplexity:.2f}".format(**json.load(open("metrics/eval.json"))))'
	@echo 'Model         artifacts/checkpoint; in the Hugging Face layout: artifacts/hf'
	@echo 'Metrics       metrics/{data,train,eval}.json; dvc metrics show; dvc plots show'
	@echo 'Report        artifacts/report.html; samples: artifacts/samples.md'
	@echo 'Sample text   python -m model.generate --checkpoint artifacts/checkpoint --prompt "The state of the Union is"'
	@echo 'Playground    python -m train.play'
	@echo 'Environment   . $(VENV)/bin/activate'

test: $(VENV)/.installed  ## run the fast tests
	python -m pytest $(PARALLEL) -m 'not slow and not soak'

test-slow: $(VENV)/.installed  ## run the slow tests: full sizes, kills, complete pipelines
	python -m pytest $(PARALLEL) -m 'slow and not soak'

soak: $(VENV)/.installed  ## run the longest tests: many kills, lost hosts, full sizes (an hour)
	python -m pytest -m soak
	python -m tests.reliability --long --dry
	python -m tests.soak.download
	python -m tests.soak.study_corpora

rehearse: $(VENV)/.installed  ## rehearse the presets fineweb-10b, one-gpu and one-hour in small sizes: 25 minutes
	python -m tests.rehearse

gpu: $(VENV)/.installed  ## on a machine with GPUs: run the tests that need one, then time a step
	python -m pytest -m gpu
	python -m train.bench

lint: $(VENV)/.installed  ## run ruff and mypy
	ruff check .
	ruff format --check .
	mypy

format: $(VENV)/.installed  ## fix and format with ruff
	ruff check --fix .
	ruff format .

# torch pins its own CUDA packages; leaving them out allows other CUDA builds.
lock:  ## resolve constraints.txt again (needs uv)
	{ echo '# Tested versions, for every Python from 3.10; `make lock` resolves them again.'; \
	  uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 \
	    --no-annotate --no-header --quiet --constraint <(echo torch==2.13.0) \
	    | grep -vE '^(nvidia|cuda|triton)'; } > constraints.txt.new
	mv constraints.txt.new constraints.txt
lock: SHELL := bash -o pipefail

clean:  ## remove what the pipeline made (data, artifacts, store, DVC cache); keep .venv
	rm -rf data artifacts .work .dvc/cache .dvc/tmp metrics/live metrics/*.csv
