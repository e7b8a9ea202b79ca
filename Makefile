# Every target works from a bare clone on Linux with python3 (3.11 or newer) and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu test-lmms check tables results bench bench-gpu reference-report claims needles methods

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 26

setup: $(STAMP)  ## make .venv with exact versions (once)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## compare methods on a tiny shipped model and rendered videos
	$(BIN)/vlmbench run

test: setup  ## all tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not gpu"

test-lmms:  ## lmms-eval's tasks and scorers beside ours, in an environment of its own (.venv-lmms: minutes, 7 GB)
	test -x .venv-lmms/bin/python || $(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/python -m pip install --disable-pip-version-check -q -e '.[lmms]' pytest hypothesis jsonschema
	OMP_NUM_THREADS=1 .venv-lmms/bin/python -m pytest -q tests/lmms tests/test_lmms.py

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

tables: setup  ## the tables of the README and of results/<machine>/, from what is committed there
	$(BIN)/python -m vlmbench.publish

results: setup  ## measure what results/cpu holds again (minutes; leave the machine alone meanwhile)
	rm -rf runs/results && mkdir -p results/cpu
	$(BIN)/vlmbench run --out runs/results
	$(BIN)/vlmbench table runs/results --format json > results/cpu/demo.json
	$(BIN)/vlmbench table runs/results > results/cpu/demo.md
	$(BIN)/python -m vlmbench.overhead --out results/cpu/overhead.json
	$(BIN)/python -m vlmbench.publish

bench: setup  ## the fixed CPU workloads against the best dense kernel (minutes)
	$(BIN)/vlmbench bench attention --method pevlm:sink=8,block=8 --frames 256 --frame-tokens 64 --check --format json > results/cpu/attention-A.json
	$(BIN)/vlmbench bench attention --method pevlm:sink=8,block=8 --frames 83 --frame-tokens 196 --check --format json > results/cpu/attention-B.json
	for p in grid vs a_shape mix; do $(BIN)/vlmbench bench attention --method mminference:pattern=$$p --tokens 16458/32842 --frame-tokens 64 \
		--heads 5 --kv-heads 1 --head-dim 128 --rounds 3 --check --format json > results/cpu/attention-mm-$$p.json || exit 1; done
	$(BIN)/vlmbench bench vision --method turbo:r=21 --shape llava-1.5-7b --layers 1 --frames 8 --rounds 3 --format json > results/cpu/vision-turbo.json
	$(BIN)/vlmbench bench decode --method corematching:beta=0.4 --shape qwen2.5-vl-3b --layers 6 --frames 9 --text-tokens 64 --steps 16 --format json > results/cpu/decode-core.json

# On a GPU machine without .venv the machine's own python, torch and transformers are used; what pip refuses there costs nothing,
# since the checkout comes first on the path.
# COMMIT names the source where only its files were copied.
bench-gpu:  ## the fixed GPU workloads into OUT=dir, nine minutes (PART=2 the rest, SMOKE=1 a rehearsal on CPU)
	@test -n "$(OUT)" || { echo 'Say where the rows go: make bench-gpu OUT=dir'; exit 2; }
	@test -x $(BIN)/python || timeout 60 $(PYTHON) -m pip install -q --no-deps --no-build-isolation . \
		|| echo 'pip could not install it here; the checkout itself is used.'
	PYTHONPATH=. VLMBENCH_COMMIT=$(COMMIT) $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m vlmbench.bench_gpu --out '$(OUT)' \
		$(if $(SMOKE),--smoke) $(if $(PART),--part $(PART))

# Only files that hold such tests: the others import what a GPU machine may lack.
test-gpu:  ## the kernels at true shapes and the CUDA graphs (needs a CUDA device)
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m pytest -q -m gpu -p no:cacheprovider \
		$$(grep -l 'mark[.]gpu' tests/test_*.py)

reference-report: setup  ## look inside the tiny models: accuracies and probes into results/cpu (long; goes on where it stopped)
	$(BIN)/python -m vlmbench.reference.inside --runs runs/reference --out results/cpu

# A quarter of an hour a model on two idle cores; what runs/claims holds already is not run again.
claims: setup  ## PEVLM's claims in miniature into results/cpu/pevlm.md (goes on where it stopped; CLAIMS="--part ladder")
	$(BIN)/python -m vlmbench.claims --runs runs/claims --out results/cpu $(CLAIMS)

# Twenty minutes of one core for both models; answers alone, so the machine may do other things meanwhile.
needles: setup  ## MMInference's patterns and boundaries on needles into results/cpu/mminference.md (goes on; NEEDLES="--part maps")
	OMP_NUM_THREADS=1 $(BIN)/python -m vlmbench.needles --runs runs/needles --out results/cpu $(NEEDLES)

# Forty minutes of one core for both models; answers alone, so the machine may do other things meanwhile.
methods: setup  ## every method beside the trivial ones at its budget, into results/cpu/methods.md (goes on; METHODS="--suite synthimage")
	OMP_NUM_THREADS=1 $(BIN)/python -m vlmbench.methods_study --runs runs/methods --out results/cpu $(METHODS)
