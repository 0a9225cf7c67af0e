# Two commands: `make study` (set up, get the speech, run the main job) and `make test`.
PYTHON ?= python3
CORPUS ?= prompts:en
VENV := .venv
BIN := $(VENV)/bin

.PHONY: study full-study test test-full test-versions wheel check docs readme models works-with speed breakdown gpu setup speech clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml lab/pyproject.toml constraints.txt $(wildcard src/mapreuse/maps/_kernel*.[ch])
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

# Everything in lab/results/speed, on a machine with nothing else to do; `make speed-conformer` makes one file.
# The first run exports the models to build/, which takes most of its time.
THREADS ?= 1
KERNELS := mapreuse+openvino+kernels,mapreuse+openvino+kernels+int8
IN_PYTORCH := sdpa,sdpa+optimize,mapreuse+optimize,sdpa+optimize+int8,mapreuse+optimize+int8
IN_RUNTIMES := sdpa+openvino,sdpa+onnx,sdpa+openvino+int8,mapreuse+openvino,mapreuse+openvino+int8,$(KERNELS)
CONFORMER := --part whole --contestants $(IN_PYTORCH),$(IN_RUNTIMES) --plans full,4x4 --exports build/conformer
BENCH_conformer := $(CONFORMER) --lengths 128,250,500,1000,2000 --repeats 3 --max-seconds 8
BENCH_conformer-long := $(CONFORMER) --lengths 4000,8000 --repeats 1 --max-seconds 8
BENCH_conformer-8 := $(CONFORMER) --batch-size 8 --lengths 128,250,500,1000 --repeats 3 --max-seconds 6
BENCH_compile := --contestants sdpa,sdpa+compile,mapreuse+optimize,mapreuse+compile --plans 4x4 --lengths 128,250 --repeats 5
BENCH_memory := --lengths 2000 --plans 4x4 --contestants eager,sdpa,mapreuse,sdpa+openvino,mapreuse+openvino \
	--storage dense,dense16,dense8,recompute --repeats 1 --memory

MINILM := --calibration build/texts.txt --lengths 20,128,512 --plans full,1x2,2x2,2x3 \
	--contestants $(IN_PYTORCH),$(IN_RUNTIMES) --threads $(THREADS) --exports build/minilm

speed: $(addprefix speed-,conformer conformer-long conformer-8 compile memory minilm long)

speed-long: setup
	$(BIN)/python lab/experiments/long_audio.py

# A real sentence encoder on texts from Python's language reference, one at a time and eight at a time.
speed-minilm: setup
	mkdir -p build && $(BIN)/python lab/experiments/texts.py > build/texts.txt
	ln -sfn "$$($(BIN)/mapreuse-lab fetch minilm | tail -1)" build/all-MiniLM-L6-v2
	$(BIN)/mapreuse bench build/all-MiniLM-L6-v2 $(MINILM) --batch-size 1 --json lab/results/speed/minilm-1.json
	$(BIN)/mapreuse bench build/all-MiniLM-L6-v2 $(MINILM) --batch-size 8 --json lab/results/speed/minilm.json

speed-%: setup
	$(BIN)/mapreuse-lab bench --threads $(THREADS) $(BENCH_$*) --json lab/results/speed/$*.json

# Where the time goes at up to 30,000 frames, on a machine with nothing else to do; the same command continues.
breakdown: setup
	$(BIN)/mapreuse-lab breakdown-by-length --out lab/results/breakdown

# The tests and benchmarks for a GPU, in ten minutes and without a network: .venv if it exists, or PYTHON with its packages.
gpu:
	PYTHONPATH=src:lab:$$PYTHONPATH $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m mapreuse_lab.cli gpu

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
