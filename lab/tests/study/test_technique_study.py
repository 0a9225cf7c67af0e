"""The study of techniques on a pretrained model: results technique by technique, and its page."""

import json

import numpy as np
import pytest
import torch
import transformers as tf
from mapreuse_lab.models import Metric
from mapreuse_lab.study import TechniqueStudy, _pretrained_techniques, write_technique_page

NAMES = ("full", "window-2", "wide-heads-1", "layers-1")


class TinyTask:
    """A random encoder whose metric is the mean of its outputs; it counts evaluations."""

    stack = "encoder"
    evaluations = 0

    def __init__(self):
        torch.manual_seed(0)
        self.model = torch.nn.ModuleDict()
        self.model["encoder"] = tf.BertModel(
            tf.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
        ).eval()

    def calibration(self, stack):
        return [{"input_ids": torch.randint(1, 99, (2, 12))} for _ in range(16)]

    @torch.no_grad()
    def evaluate(self, model):
        TinyTask.evaluations += 1
        found = model["encoder"](input_ids=torch.arange(1, 13)[None]).last_hidden_state[0]
        return [Metric("cosine", "similarity", np.stack([found.mean(1).numpy(), np.ones(12)], 1))]


@pytest.fixture
def study(monkeypatch, tmp_path):
    for name, value in (("_LENGTHS", 12), ("_CALIBRATION", 4)):
        monkeypatch.setitem(getattr(_pretrained_techniques, name), TinyTask, value)
    monkeypatch.setattr(_pretrained_techniques, "open_task", lambda name: TinyTask())
    monkeypatch.setattr(TinyTask, "evaluations", 0)
    monkeypatch.setattr(
        _pretrained_techniques, "_inputs", lambda task, length: {"input_ids": torch.ones(1, length, dtype=torch.long)}
    )
    monkeypatch.setitem(_pretrained_techniques._TIMED_LENGTHS, TinyTask, (4, 8))
    return lambda: TechniqueStudy("tiny", tmp_path, NAMES)


def test_what_has_a_result_is_not_evaluated_again(study, tmp_path):
    study().evaluate()
    assert TinyTask.evaluations == 4  # the baseline, and three techniques that apply
    kept = json.loads((tmp_path / "tiny.json").read_text())
    study().evaluate()
    assert TinyTask.evaluations == 4
    assert json.loads((tmp_path / "tiny.json").read_text())["techniques"] == kept["techniques"]
    assert kept["techniques"]["full"]["no training"]["metrics"]["cosine"]["against"] == [0.0, [0.0, 0.0]]
    assert "trained heads" in kept["techniques"]["wide-heads-1"]["why not"]


def test_results_of_an_earlier_version_are_shown_but_not_compared_until_they_are_measured_again(study, tmp_path):
    study().evaluate()
    results = json.loads((tmp_path / "tiny.json").read_text())
    del results["techniques"]["window-2"]["no training"]["metrics"]["cosine"]["amounts"]
    (tmp_path / "tiny.json").write_text(json.dumps(results))
    write_technique_page(tmp_path)
    row = "| window of ±2 (`window-2`) |"
    assert (tmp_path / "README.md").read_text().count(row) == 1
    study().evaluate()
    assert TinyTask.evaluations == 5
    write_technique_page(tmp_path)
    assert (tmp_path / "README.md").read_text().count(row) == 2


def test_the_page_shows_quality_recovery_latency_and_what_does_not_apply(study, tmp_path):
    opened = study()
    opened.evaluate()
    opened.evaluate(steps=2)
    write_technique_page(tmp_path)
    assert "Latency was not measured." in (tmp_path / "README.md").read_text()
    study().time(repeats=1)
    write_technique_page(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| window of ±2 (`window-2`) |" in page
    assert "cosine, recovered, 2 steps" in page
    assert "Latency was not measured." not in page
    assert "| wide-heads | trained heads have no counterpart of another width |" in page
    assert (tmp_path / "tiny.png").exists()


def test_a_technique_that_fails_is_a_row_and_the_others_go_on(study, tmp_path, monkeypatch):
    def fails(self, stack, batches):
        raise RuntimeError("no memory\nat all")

    monkeypatch.setattr("mapreuse_lab.techniques.Window.convert", fails)
    study().evaluate()
    rows = json.loads((tmp_path / "tiny.json").read_text())["techniques"]
    assert rows["window-2"]["no training"] == {"failed": "no memory at all"}
    assert "metrics" in rows["layers-1"]["no training"]
    write_technique_page(tmp_path)
    assert "failed" in (tmp_path / "README.md").read_text()
