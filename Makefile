# Two commands: `make study` (set up, get the speech, run the main job) and `make test`.
PYTHON ?= python3
CORPUS ?= prompts:en
VENV := .venv
BIN := $(VENV)/bin

.PHONY: study test check readme setup speech clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[speech,study,dev]'
	touch $@

speech: setup
	$(BIN)/mapreuse corpus $(CORPUS)

study: speech
	$(BIN)/mapreuse study --preset quick --corpus $(CORPUS) --out results/quick

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/ruff check src tests scripts
	$(BIN)/mypy
	$(BIN)/python scripts/readme.py --check

readme: setup
	$(BIN)/python scripts/readme.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
