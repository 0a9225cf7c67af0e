"""Exported models give PyTorch's outputs in OpenVINO and ONNX Runtime, for other shapes than the example's."""

import json
import os
import subprocess
import sys

import openvino
import pytest
import torch
from agreement import PLANS
from families import build
from transformers import AutoConfig

import mapreuse as mr
from mapreuse.exporting import RUNTIMES, open_exported

SAMPLE = ["parakeet", "bert"]
FAMILIES = [
    "wav2vec2-conformer-relative", "wav2vec2-conformer-rotary", "roberta", "distilbert", "electra", "modernbert",
    "vit", "deit", "dinov2", "wav2vec2", "hubert", "wavlm", "whisper-encoder", "moonshine-encoder", "ast",
    "clip-vision", "clip-text", "deberta-v2", "t5-encoder",
]  # fmt: skip


def tokens(batch, length, valid=None):
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, valid or length :] = 0
    return {"input_ids": torch.randint(0, 50, (batch, length)), "attention_mask": mask}


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch).last_hidden_state


@pytest.mark.parametrize("family", [*SAMPLE, *(pytest.param(family, marks=pytest.mark.full) for family in FAMILIES)])
@pytest.mark.parametrize("runtime", ["openvino", pytest.param("onnx", marks=pytest.mark.full)])
@pytest.mark.parametrize("plan", ["groups of 2", pytest.param(None, marks=pytest.mark.full)])
def test_an_export_gives_the_outputs_of_pytorch(family, runtime, plan, tmp_path):
    model, batch = build(family)
    original_class = type(model)
    if plan is not None:
        mr.apply(model, PLANS[plan])
    description = mr.export(model, tmp_path / "out", batch, runtime=runtime)
    assert description["difference"] < 1e-4
    assert json.loads((tmp_path / "out/mapreuse_export.json").read_text()) == description
    assert description["plan"] == (None if plan is None else json.loads(PLANS[plan].to_json()))
    assert type(model) is original_class
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "out"), type(model.config)), "without plans"

    full = {name: torch.ones_like(one) if "mask" in name else one for name, one in batch.items()}
    found = open_exported(tmp_path / "out", threads=1)(full)["last_hidden_state"]
    torch.testing.assert_close(found, outputs(model, full), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", ["groups of 2", pytest.param("other heads", marks=pytest.mark.full)])
def test_shared_maps_are_applied_in_float_in_int8(plan, tmp_path):
    """8 bits for all lengths would lose the small weights of long inputs."""
    model, batch = build("parakeet")
    mr.apply(model, PLANS[plan])
    mr.export(model, tmp_path / "out", batch, int8=[batch] * 4)
    nodes = openvino.Core().read_model(tmp_path / "out/openvino_model.xml").get_ordered_ops()
    of_maps, products, quantised = set(), [], 0
    for node in nodes:
        inputs = [value.get_node() for value in node.input_values()]
        quantised += node.get_type_name() == "FakeQuantize"
        reads_map = any(one.get_friendly_name() in of_maps for one in inputs)
        if node.get_type_name() == "MatMul" and reads_map:
            products.append("FakeQuantize" in {one.get_type_name() for one in inputs})
        elif node.get_type_name() == "Softmax" or reads_map:
            of_maps.add(node.get_friendly_name())
    assert quantised > 0
    assert products == [False] * 4, "one for each layer"


@pytest.mark.parametrize("runtime", ["onnx", pytest.param("openvino", marks=pytest.mark.full)])
def test_one_export_serves_every_length_and_padding(runtime, tmp_path):
    model, _ = build("bert")
    mr.apply(model, PLANS["two sources"])
    mr.export(model, tmp_path / "out", tokens(2, 15), runtime=runtime)
    run = open_exported(tmp_path / "out")
    (written,) = [file.read_bytes() for file in (tmp_path / "out").iterdir() if file.suffix in (".onnx", ".xml")]
    assert b"encoder.layer.3.attention.self.value/" in written, "profilers show the modules of operators"
    for batch in (tokens(1, 1), tokens(1, 2), tokens(3, 12, 7), tokens(2, 40, 9)):
        valid = batch["attention_mask"].bool()
        found = run(batch)["last_hidden_state"]
        torch.testing.assert_close(found[valid], outputs(model, batch)[valid], atol=1e-4, rtol=1e-4)


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 4, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, vocab_size=50)).eval()


def moonshine():
    from transformers import MoonshineForConditionalGeneration

    return MoonshineForConditionalGeneration(build("moonshine-encoder")[0].config).eval()


def sound(batch, length, valid=None):
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, valid or length :] = 0
    return {"input_values": torch.randn(batch, length) * mask, "attention_mask": mask}


@pytest.mark.parametrize(
    ("made", "runtime"),
    [
        (moonshine, "openvino"),
        (bart, "onnx"),
        pytest.param(moonshine, "onnx", marks=pytest.mark.full),
        pytest.param(bart, "openvino", marks=pytest.mark.full),
    ],
)
def test_the_encoder_of_an_encoder_decoder_is_exported_with_its_padding(made, runtime, tmp_path):
    torch.manual_seed(0)
    encoder = made().get_encoder()
    mr.apply(encoder, PLANS["groups of 2"])
    batch, size = (sound, 300) if made is moonshine else (tokens, 1)
    mr.export(encoder, tmp_path / "out", batch(2, 21 * size, 12 * size), runtime=runtime)
    run = open_exported(tmp_path / "out", threads=1)
    for other in (batch(1, 5 * size), batch(3, 35 * size, 9 * size)):
        found, expected = run(other)["last_hidden_state"], outputs(encoder, other)
        valid = other["attention_mask"].bool()
        if made is moonshine:
            valid = valid[:, ::384][:, : expected.shape[1]]
        torch.testing.assert_close(found[valid], expected[valid], atol=1e-4, rtol=1e-4)


def test_the_own_attention_of_a_model_without_a_plan_is_written_on_request(tmp_path):
    model, batch = build("bert")
    mr.export(model, tmp_path / "own", batch, runtime="onnx", own_attention=True)
    found = open_exported(tmp_path / "own")(batch)["last_hidden_state"]
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(found[valid], outputs(model, batch)[valid], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("runtime", ["openvino", pytest.param("onnx", marks=pytest.mark.full)])
def test_int8_reports_its_error(runtime, tmp_path):
    model, _ = build("bert")
    mr.apply(model, PLANS["groups of 2"])
    torch.manual_seed(1)
    batches = [tokens(4, 20) for _ in range(4)]
    description = mr.export(model, tmp_path / "int8", batches[0], runtime=runtime, int8=batches)
    run = open_exported(tmp_path / "int8")
    errors = [run(batch)["last_hidden_state"] - outputs(model, batch) for batch in batches]
    norms = [outputs(model, batch).square().sum() for batch in batches]
    expected = (sum(error.square().sum() for error in errors) / sum(norms)).sqrt().item()
    assert description["int8_error"]["last_hidden_state"] == pytest.approx(expected, rel=1e-3)
    assert 0 < expected < 0.12


# On x86 without VNNI, the sums of two 8-bit products overflow: the error was 0.35, without a message.
def test_int8_without_vnni_has_weights_of_7_bits_and_a_small_error(tmp_path, monkeypatch):
    model, _ = build("bert")
    torch.manual_seed(1)
    batches = [tokens(4, 20) for _ in range(4)]
    capabilities = {**torch.cpu.get_capabilities(), "architecture": "x86_64"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**capabilities, "avx512_vnni": True})
    mr.export(model, tmp_path / "vnni", batches[0], int8=batches)
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {**capabilities, "avx512_vnni": False, "avx_vnni": False}
    )
    with pytest.warns(UserWarning, match="export the model again on this processor"):
        open_exported(tmp_path / "vnni")
    description = mr.export(model, tmp_path / "int8", batches[0], int8=batches)
    assert description["weight_bits"] == 7
    code = (
        "import sys, torch; from mapreuse.exporting import open_exported;"
        "batch, expected = torch.load(sys.argv[2]);"
        "found = open_exported(sys.argv[1])(batch)['last_hidden_state'];"
        "print(((found - expected).norm() / expected.norm()).item())"
    )
    torch.save((batches[0], outputs(model, batches[0])), tmp_path / "batch.pt")
    errors = {}
    for name in ("int8", "vnni"):
        arguments = [sys.executable, "-c", code, tmp_path / name, tmp_path / "batch.pt"]
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}  # OpenVINO then uses no VNNI
        result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
        errors[name] = float(result.stdout)
    assert 0 < errors["int8"] < errors["vnni"] / 2


def decoder():
    return build("llama")


def encoder_decoder():
    from transformers import BartConfig, BartModel

    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return BartModel(BartConfig(**sizes, **heads, vocab_size=50)), tokens(1, 9)


def half_precision():
    model, batch = build("bert")
    return model.half(), batch


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (lambda: build("bert"), {"runtime": "tensorrt"}, "runtime must be one of openvino, onnx, got 'tensorrt'"),
        (lambda: build("bert"), {"int8": [{"input_ids": torch.ones(1, 5)}]}, "int8 batches must have the inputs of"),
        (lambda: build("bert"), {"int8": []}, "int8 needs at least one calibration batch"),
        (lambda: (build("bert")[0], {"input_ids": [1, 2]}), {}, "must be dictionaries of tensors"),
        (decoder, {}, "LlamaModel is a decoder without a language-model head"),
        (encoder_decoder, {}, "several stacks|export model.get_encoder"),
        (half_precision, {}, "is float16 on cpu, but export needs float32 on the CPU"),
    ],
)
def test_what_cannot_be_exported_is_refused_on_one_line_and_nothing_is_written(made, options, message, tmp_path):
    model, batch = made()
    with pytest.raises(ValueError, match=message) as raised:
        mr.export(model, tmp_path / "out", batch, **options)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["write", "open"])
def test_a_runtime_that_fails_is_refused_on_one_line_and_nothing_is_written(failing, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("an operator is missing\nand more")

    monkeypatch.setattr(type(RUNTIMES["onnx"]), failing, fail)
    model, batch = build("bert")
    with pytest.raises(ValueError, match="onnx cannot run this BertModel: an operator is missing and more"):
        mr.export(model, tmp_path / "out", batch, runtime="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_exists_is_kept(tmp_path):
    model, batch = build("bert")
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match="exists already; choose another directory or delete it"):
        mr.export(model, tmp_path, batch)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    model, batch = build("bert")
    with pytest.raises(ModuleNotFoundError, match=r"needs the package openvino: pip install 'mapreuse\[export\]'"):
        mr.export(model, tmp_path / "out", batch)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_without_an_export_is_named(tmp_path):
    with pytest.raises(ValueError, match="contains no exported model"):
        open_exported(tmp_path)
