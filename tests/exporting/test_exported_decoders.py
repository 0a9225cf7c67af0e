"""Exported language models generate the tokens of PyTorch, with values only in the cache where layers reuse."""

import json

import agreement
import numpy as np
import openvino
import pytest
import torch
from commands import run_command
from decoders import NEW, PROMPTS, converted, defined, inputs, original
from tiny_models import SENTENCES, tokenizer

import mapreuse as mr
from mapreuse.cli import main
from mapreuse.exporting import open_decoder, open_exported

PLANS = {name: agreement.PLANS[name] for name in ("full", "groups of 2", "other heads", "in part")}
GROUPS = PLANS["groups of 2"]
PROMPT = "padded on the left"


def generated(decoder, input_ids, attention_mask):
    """Greedy tokens, prompt included, and the logits of each."""
    decoder.reset()
    new, logits = input_ids, []
    for _ in range(NEW):
        logits.append(decoder(new, attention_mask)[:, -1])
        new = logits[-1].argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, new], 1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(new)], 1)
    return input_ids, torch.stack(logits, 1)


@pytest.mark.sample(13)
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt-neox", "gemma", "mistral", "phi3"])
def test_an_exported_decoder_generates_what_the_definition_does(family, plan, runtime, tmp_path):
    model = converted(family, PLANS[plan])
    example = inputs(torch.ones(1, 11, dtype=torch.int64))
    description = mr.export(model, tmp_path / "out", example, runtime=runtime)
    assert description["difference"] < 1e-4
    decoder = open_decoder(tmp_path / "out", threads=1)
    for prompt in (PROMPT, "longer than a window"):
        tokens, logits = defined(family, PLANS[plan], prompt)
        found, of_exported = generated(decoder, **inputs(PROMPTS[prompt]))
        assert torch.equal(found, tokens)
        assert (of_exported - logits).abs().max() <= 1e-4 * logits.abs().max()


@pytest.mark.parametrize("runtime", ["openvino", pytest.param("onnx", marks=pytest.mark.full)])
def test_reusing_layers_have_values_only_and_texts_can_be_exchanged(runtime, tmp_path):
    plan = mr.ReusePlan.from_sources([0, 0, 2, 2], heads={3: [1, None, 1, 3]})
    mr.export(converted("llama", plan), tmp_path / "out", inputs(PROMPTS["one text"]), runtime=runtime)
    batch = inputs(PROMPTS[PROMPT])
    if runtime == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
        shapes = {port.name: port.shape[1::2] for port in session.get_inputs() if "past" in port.name}
        assert shapes == {
            f"past_key_values.{layer}.{name}": [1 if (layer, name) == (3, "key") else 2, 8]
            for layer in range(4)
            for name in (("value",) if layer == 1 else ("key", "value"))
        }
        assert [port.name for port in session.get_outputs()][1:] == [
            name.replace("past_key_values", "present") for name in shapes
        ]
        return
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(tmp_path / "out/openvino_model.xml", "CPU", options)
    request = compiled.create_infer_request()
    assert {port.get_any_name() for port in compiled.inputs} == {
        "input_ids", "attention_mask", "position_ids", "beam_idx"
    }  # fmt: skip
    assert len(request.query_state()) == 7, "layer 1 has no key"
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    beams = np.arange(3, dtype=np.int32)
    arrays = {name: value.numpy() for name, value in batch.items()}
    request.infer(arrays | {"position_ids": positions.numpy(), "beam_idx": beams})
    new = {"input_ids": torch.tensor([[7], [8]]), "position_ids": positions[[2, 0], -1:] + 1}
    longer = torch.cat([mask[[2, 0]], torch.ones(2, 1, dtype=torch.int64)], 1)
    found = request.infer(
        {name: value.numpy() for name, value in new.items()}
        | {"attention_mask": longer.numpy(), "beam_idx": np.array([2, 0], np.int32)}
    )["logits"]
    whole = torch.cat([batch["input_ids"][[2, 0]], new["input_ids"]], 1)
    positions = torch.cat([positions[[2, 0]], new["position_ids"]], 1)
    with torch.no_grad():
        expected = converted("llama", plan)(input_ids=whole, attention_mask=longer, position_ids=positions)
    torch.testing.assert_close(torch.from_numpy(found)[:, 0], expected.logits[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("runtime", ["openvino", pytest.param("onnx", marks=pytest.mark.full)])
@pytest.mark.parametrize("int8", ["weights", pytest.param("calibrated", marks=pytest.mark.full)])
def test_int8_reports_the_error_of_the_logits(runtime, int8, tmp_path):
    model = converted("llama", GROUPS)
    torch.manual_seed(0)
    example = {"input_ids": torch.randint(3, 50, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    given = "weights" if int8 == "weights" else [example] * 4
    description = mr.export(model, tmp_path / "int8", example, runtime=runtime, int8=given)
    with torch.no_grad():
        expected = model(**example).logits
    found = open_exported(tmp_path / "int8")(example)["logits"]
    error = ((found - expected).norm() / expected.norm()).item()
    assert description["int8_error"]["logits"] == pytest.approx(error, rel=1e-3)
    assert 0 < error < 0.1


def test_the_command_stores_weights_in_8_bits(tmp_path, monkeypatch, capsys):
    original("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(SENTENCES))
    command = ("export", tmp_path / "model", "--calibration", texts, "--out", tmp_path / "out", "--int8-weights")
    assert run_command(main, "mapreuse", monkeypatch, capsys, *command)[0] == 0
    types = {str(node.get_element_type()) for node in _nodes(tmp_path / "out") if node.get_type_name() == "Constant"}
    assert "<Type: 'uint8_t'>" in types
    assert json.loads((tmp_path / "out/mapreuse_export.json").read_text())["precision"] == "int8 weights"
    status, _, error = run_command(main, "mapreuse", monkeypatch, capsys, *command, "--int8")
    assert (status, error.count("\n")) == (2, 1)
    assert "--int8 and --int8-weights exclude each other; choose one" in error


def _nodes(directory):
    return openvino.Core().read_model(directory / "openvino_model.xml").get_ordered_ops()


def without_head():
    return original("llama").model


def with_cross_attention():
    model = converted("gpt2", GROUPS)
    model.config.add_cross_attention = True
    return model


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (without_head, {}, "LlamaModel is a decoder without a language-model head; export the …ForCausalLM model"),
        (with_cross_attention, {}, "is a decoder with cross-attention"),
        (lambda: original("llama"), {"kernels": True}, "the kernels are for encoders; use kernels=False"),
        (
            lambda: converted("llama", mr.ReusePlan.parse("2x2", share="keys", keys=4)),
            {},
            "LlamaForCausalLM shares keys, and export writes decoders that share maps only",
        ),
        (lambda: original("llama"), {"int8": "weight"}, 'int8 must be calibration batches, "weights" or None'),
    ],
)
def test_decoders_that_cannot_be_exported_are_refused_on_one_line(made, options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        mr.export(made(), tmp_path / "out", inputs(PROMPTS[PROMPT]), **options)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
