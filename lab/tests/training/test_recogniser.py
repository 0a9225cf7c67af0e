import json

import numpy as np
import pytest
import torch
from mapreuse_lab.techniques import parse
from mapreuse_lab.training import BASELINE, Recogniser
from safetensors.torch import save_file


def test_the_shipped_recogniser_is_small_on_disk(baseline):
    assert sum(path.stat().st_size for path in BASELINE.iterdir()) < 8e6
    config = baseline.model.config.encoder_config
    assert (config.num_hidden_layers, config.num_attention_heads, config.layerdrop) == (8, 4, 0)
    assert next(baseline.model.parameters()).dtype == torch.float32


@pytest.fixture
def audio() -> list[np.ndarray]:
    """A second of noise."""
    return [np.random.default_rng(0).standard_normal(8000).astype(np.float32)]


def test_saving_and_loading_changes_no_bit(tiny, tmp_path, audio):
    tiny.save(tmp_path)
    again = Recogniser.load(tmp_path)
    assert torch.equal(again.logits(audio)[0], tiny.logits(audio)[0])
    assert again.vocabulary == tiny.vocabulary


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("vocabulary", ["ab"] * 28, "must list single characters, got 'ab'"),
        ("features", {"sampling_rate": "x"}, "sampling_rate must be a positive whole number, got 'x'"),
        ("features", {"num_mel_bins": 40}, "the model reads 32 mel bins, but the features have 40"),
        ("features", {"bands": 40}, "an object `features` with the keys hop, lowest"),
        ("features", 7, "must have a list `vocabulary`, an object `features`"),
        ("vocabulary", None, "must have a list `vocabulary`"),
        ("vocabulary", ["a"], "the model has 29 outputs, but the vocabulary and the blank need 2"),
        ("technique", "window-3", "for a technique, its `name` and `config`"),
    ],
)
def test_a_damaged_description_is_refused_on_one_line(tiny, tmp_path, part, value, reason):
    tiny.save(tmp_path / "model")
    description = json.loads((tmp_path / "model" / "recogniser.json").read_text())
    description[part] = description.get(part, {}) | value if isinstance(value, dict) else value
    (tmp_path / "model" / "recogniser.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="model holds a damaged recogniser") as caught:
        Recogniser.load(tmp_path / "model")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_refused_on_one_line(tiny, tmp_path):
    tiny.save(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    description = tmp_path / "model" / "recogniser.json"
    damages = (
        lambda: weights.write_bytes(weights.read_bytes()[:-100]),
        lambda: description.write_text("{"),
        description.unlink,
    )
    for damage in damages:
        damage()
        with pytest.raises(ValueError, match="model holds") as caught:
            Recogniser.load(tmp_path / "model")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["window-3", "skip-1", "window-3+reuse-2x1", "reuse-2x1", "full"])
def test_a_technique_is_saved_with_its_weights(name, tmp_path, audio):
    recogniser = Recogniser.create("abc ", num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32)
    recogniser.compress(parse(name))
    recogniser.save(tmp_path / "model")
    again = Recogniser.load(tmp_path / "model")
    assert torch.equal(again.logits(audio)[0], recogniser.logits(audio)[0])
    again.save(tmp_path / "copy")
    assert torch.equal(Recogniser.load(tmp_path / "copy").logits(audio)[0], recogniser.logits(audio)[0])


def test_damaged_weights_of_a_technique_are_refused_on_one_line(tmp_path):
    recogniser = Recogniser.create("abc ", num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32)
    recogniser.compress(parse("window-3"))
    recogniser.save(tmp_path / "model")
    description = json.loads((tmp_path / "model" / "recogniser.json").read_text())
    description["technique"]["name"] = "window-4"
    (tmp_path / "model" / "recogniser.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="weights of 'window-3' do not belong in a model under 'window-4'"):
        Recogniser.load(tmp_path / "model")
    weights = tmp_path / "model" / "weights.safetensors"
    for damage in (lambda: weights.write_bytes(b"no"), weights.unlink):
        damage()
        with pytest.raises(ValueError, match="damaged recogniser") as caught:
            Recogniser.load(tmp_path / "model")
        assert "\n" not in str(caught.value)


def test_text_with_an_unknown_character_is_refused(tiny):
    assert tiny.decode(tiny.encode("it's on")) == "it's on"
    with pytest.raises(ValueError, match="no character 'é'"):
        tiny.encode("café")


def test_an_utterance_has_the_same_logits_alone_and_in_a_batch(baseline, prompts):
    audio = [cut.load_audio()[0] for cut in prompts.test if cut.duration < 4][:4]
    together, lengths = baseline.logits(audio)
    for row, length, samples in zip(together, lengths.tolist(), audio, strict=True):
        alone, (frames,) = baseline.logits([samples])
        assert length == int(frames) == alone.shape[1]
        assert torch.allclose(row[:length], alone[0], atol=1e-3)


def test_decoding_merges_repeats_and_removes_blanks(tiny):
    """Output 0 is the blank; a blank between two equal characters keeps both."""
    path = [0, *tiny.encode("aab"), 0, *tiny.encode("bb"), 0, *tiny.encode("c")]
    logits = torch.nn.functional.one_hot(torch.tensor([path]), 29).float()
    assert tiny.texts(logits, torch.tensor([len(path)])) == ["abbc"]
    assert tiny.texts(logits, torch.tensor([4])) == ["ab"]


def test_a_recogniser_saved_by_version_0_1_0_with_a_language_model_still_loads(tiny, tmp_path, audio):
    tiny.save(tmp_path)
    description = json.loads((tmp_path / "recogniser.json").read_text())
    description["fusion"] = {"weight": 1.1, "bonus": 1.0}
    (tmp_path / "recogniser.json").write_text(json.dumps(description))
    save_file({"counts": torch.arange(3)}, tmp_path / "language_model.safetensors")
    assert torch.equal(Recogniser.load(tmp_path).logits(audio)[0], tiny.logits(audio)[0])
