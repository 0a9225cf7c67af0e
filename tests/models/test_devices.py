"""Models under plans on another device, as far as a machine without a GPU can tell."""

import pytest
import torch
from agreement import PLANS
from families import build
from oracle import disagreement, valid_rows

import mapreuse as mr
from mapreuse.maps import _blocked

SAMPLE = ["parakeet", "bert", "vit"]
FAMILIES = ["wav2vec2-conformer-relative", "wav2vec2", "distilbert", "modernbert", "whisper-encoder", "clip-vision"]


@pytest.mark.parametrize("family", [*SAMPLE, *(pytest.param(one, marks=pytest.mark.full) for one in FAMILIES)])
@pytest.mark.parametrize("plan", ["in part", pytest.param("two sources", marks=pytest.mark.full)])
@pytest.mark.parametrize("storage", ["dense", "dense8", pytest.param("recompute", marks=pytest.mark.full)])
def test_a_forward_pass_stays_on_its_device_and_reads_nothing_from_it(family, plan, storage, monkeypatch):
    """Meta tensors refuse operands on two devices, and whatever would wait for a number from a GPU.

    Without a mask: transformers itself reads masks.
    """
    monkeypatch.setattr(_blocked, "_MAX_SHORT", 0)
    monkeypatch.setattr(_blocked, "_MAX_SHORT_ON_GPU", 0)
    model, batch = build(family)
    mr.optimize(mr.apply(model, PLANS[plan], storage=storage)).to("meta", torch.bfloat16)
    inputs = {name: one for name, one in batch.items() if "mask" not in name}
    with torch.no_grad():
        output = model(
            **{
                name: one.to("meta", torch.bfloat16 if one.is_floating_point() else None)
                for name, one in inputs.items()
            }
        ).last_hidden_state
    assert (output.device.type, output.dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("family", [*SAMPLE, *(pytest.param(one, marks=pytest.mark.full) for one in FAMILIES)])
@pytest.mark.parametrize("storage", ["dense", "dense8", "auto"])
def test_a_device_gives_the_outputs_of_the_cpu(device, family, storage):
    """With padding; in float32 and, within its precision, in bfloat16."""
    model, batch = build(family)
    mr.apply(model, PLANS["in part"])
    with torch.no_grad():
        reference = model(**batch)
    expected, rows = reference.last_hidden_state, valid_rows(model, batch, reference)
    original, _ = build(family)
    there = mr.apply(original.to(device), PLANS["in part"], storage=storage)
    moved = {name: one.to(device) for name, one in batch.items()}
    with torch.no_grad():
        found = there(**moved).last_hidden_state
    assert found.device.type == device
    assert disagreement(found.cpu(), expected, rows) < (5e-2 if storage == "dense8" else 2e-3)
    half = {name: one.bfloat16() if one.is_floating_point() else one for name, one in moved.items()}
    with torch.no_grad():
        rounded = there.bfloat16()(**half).last_hidden_state
    assert rounded.dtype == torch.bfloat16
    assert disagreement(rounded.cpu().float(), expected, rows) < 0.3
