"""Exports with mapreuse's operators for OpenVINO give PyTorch's outputs; in 8 bits they stay close to them."""

import subprocess
import sys

import openvino
import pytest
import torch
from agreement import PLANS
from families import build

import mapreuse as mr
from mapreuse.exporting import _export, _library, open_exported


def features(batch, frames, valid=None):
    mask = torch.ones(batch, frames, dtype=torch.int64)
    mask[-1, valid or frames :] = 0
    return {"input_features": torch.randn(batch, frames, 16) * mask[..., None], "attention_mask": mask}


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch).last_hidden_state


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "family", ["parakeet", *(pytest.param(name, marks=pytest.mark.full) for name in ("bert", "vit", "modernbert"))]
)
@pytest.mark.parametrize("plan", ["groups of 2", pytest.param("two sources", marks=pytest.mark.full)])
def test_an_export_with_kernels_gives_the_outputs_of_pytorch(family, plan, tmp_path):
    model, batch = build(family)
    mr.apply(model, PLANS[plan])
    description = mr.export(model, tmp_path / "out", batch, kernels=True)
    assert description["kernels"]
    assert description["difference"] < 1e-4
    assert "mapreuse" in (tmp_path / "out/openvino_model.xml").read_text()
    if family == "parakeet":
        run = open_exported(tmp_path / "out", threads=1)
        for other in (features(1, 1), features(1, 5), features(3, 100, 33), features(2, 801, 800)):
            valid = other["attention_mask"].bool()[:, ::4]
            found, expected = run(other)["last_hidden_state"], outputs(model, other)
            torch.testing.assert_close(found[valid], expected[valid], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [5, pytest.param(260, marks=pytest.mark.full), 400])
def test_products_of_8_bits_stay_close_to_float32(length, tmp_path):
    """Only attention has 8 bits here."""
    config = type(build("parakeet")[0].config)(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_mel_bins=16,
        subsampling_factor=4, subsampling_conv_channels=8, layerdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = type(build("parakeet")[0])(config).eval()
    mr.apply(model, mr.ReusePlan.parse("1x2"))
    batch = features(2, 4 * length, 3 * length)
    file = tmp_path / "attention.onnx"
    with _export._evaluation(model, False) as copy, mr.maps.runtime_operators("int8"):
        program, names = _export._exported(copy, batch, _export._dynamic_dims(batch))
        _export._write_onnx(program, list(batch), names, file)
    _library.build_library(openvino, tmp_path / _library.LIBRARY)
    core = openvino.Core()
    core.add_extension(tmp_path / _library.LIBRARY)
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled({name: one.numpy() for name, one in batch.items()})["last_hidden_state"].copy())
    valid = batch["attention_mask"].bool()[:, ::4]
    assert 0 < relative_error(found[valid], outputs(model, batch)[valid]) < 0.01


def test_kernels_without_a_compiler_are_refused_on_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(_library.shutil, "which", lambda name: None)
    model, batch = build("bert")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler: apt install g\+\+") as raised:
        mr.export(model, tmp_path / "out", batch, kernels=True)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_is_quoted_on_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="a.cpp: note\na.cpp: error: no such header\nmore")
    monkeypatch.setattr(_library.subprocess, "run", lambda *args, **options: failed)
    model, batch = build("bert")
    with pytest.raises(ValueError, match=r"operators for OpenVINO do not compile: a\.cpp: error: no such header$"):
        mr.export(model, tmp_path / "out", batch, kernels=True)
    assert list(tmp_path.iterdir()) == []


def test_kernels_are_refused_for_onnx_and_on_other_systems(tmp_path, monkeypatch):
    model, batch = build("bert")
    with pytest.raises(ValueError, match="kernels=True is for runtime='openvino'"):
        mr.export(model, tmp_path / "out", batch, runtime="onnx", kernels=True)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="works on Linux only, not on darwin"):
        mr.export(model, tmp_path / "out", batch, kernels=True)
    assert list(tmp_path.iterdir()) == []
