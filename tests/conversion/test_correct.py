"""Fits of the low-rank terms of share mode "corrected"."""

import copy
from dataclasses import replace

import pytest
import torch
from families import build
from torch.nn import functional

import mapreuse as mr
from mapreuse.conversion._refit import RefitCache, refit_layers
from mapreuse.conversion._targets import Targets
from mapreuse.models import MapRecorder

PLAN = mr.ReusePlan.parse("1x2,2x1", share="corrected", rank=8)


def batches(number=8):
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(number):
        mask = torch.ones(4, 16, dtype=torch.long)
        mask[0, 16 - index :] = 0
        ids = torch.randint(3, 50, mask.shape, generator=generator)
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found


def divergence(model, original, batch, layer):
    """KL(original's map ‖ map), by the maps of whole passes."""
    one, other = (MapRecorder(each, under_plan=True)(batch) for each in (original, model))
    found = functional.kl_div(other.maps[layer].clamp(min=1e-30).log(), one.maps[layer], reduction="none").sum(-1)
    return float(found.transpose(1, 2)[one.valid].mean())


@pytest.fixture(scope="module")
def refitted():
    original = build("llama")[0]
    model = mr.apply(copy.deepcopy(original), PLAN)
    return original, model, mr.refit(model, original, batches())


def test_a_refit_brings_maps_closer_to_those_of_the_original(refitted):
    original, model, (report,) = refitted
    before, after = report.divergence
    assert after < 0.8 * before
    unfitted = mr.apply(copy.deepcopy(original), PLAN)
    held_out = [batches()[3], batches()[7]]
    errors = [sum(divergence(one, original, batch, 3) for batch in held_out) for one in (unfitted, model)]
    assert errors[1] < 0.8 * errors[0]


def test_a_refitted_correction_loses_less_than_refitted_maps(refitted):
    original, _, (report,) = refitted
    by_maps = mr.apply(copy.deepcopy(original), replace(PLAN, share="map", rank=None))
    (report_of_maps,) = mr.refit(by_maps, original, batches())
    assert report.after < report_of_maps.after


def test_kept_refits_restore_the_correction(tmp_path):
    original = build("llama")[0]
    models = []
    for _ in range(2):
        model = mr.apply(copy.deepcopy(original), PLAN)
        refit_layers(model, Targets(original, batches()), RefitCache(10**9, tmp_path))
        models.append(model)
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name)), name
    assert models[0].layers[3].self_attn.correction.query.weight.abs().max() > 0
