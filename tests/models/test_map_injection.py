"""Models whose modules pass no keyword arguments on: `apply` injects the maps into every attention module."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from agreement import PLANS
from packed_encoders import LAYERS, WIDTH, encoder, peaked
from vision_blocks import VisionTransformer

import mapreuse as mr
from mapreuse.models import MapRecorder, find_stack

MODELS = {
    "torch": (lambda: encoder(batch_first=True), "src", (3, 9, WIDTH)),
    "timm": (lambda: peaked(VisionTransformer()), "pixel_values", (2, 3, 16, 16)),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param][0]()


@pytest.fixture
def batches(request, model):
    """Four batches."""
    name, shape = next((name, shape) for make, name, shape in MODELS.values() if type(make()) is type(model))
    generator = torch.Generator().manual_seed(1)
    return [{name: torch.randn(shape, generator=generator)} for _ in range(4)]


def test_the_stack_is_found_again_under_a_plan(model):
    before = find_stack(model)
    after = find_stack(mr.apply(model, PLANS["groups of 2"]))
    assert (after.list_name, len(after.layers)) == (before.list_name, LAYERS)


def test_a_recorder_returns_every_map(model, batches):
    maps = MapRecorder(model)(batches[0]).maps
    assert len(maps) == LAYERS
    for weights in maps:
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)


def test_threads_can_run_one_model_at_once(model, batches):
    mr.apply(model, PLANS["two sources"])
    with torch.no_grad():
        expected = [model(**batch) for batch in batches]
    wrong = []

    def work(index):
        with torch.no_grad():
            wrong.extend(index for _ in range(20) if not torch.equal(model(**batches[index]), expected[index]))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert not wrong


def test_a_copy_gives_the_same_output_and_shares_nothing(model, batches):
    mr.apply(model, PLANS["in part"])
    with torch.no_grad():
        expected = model(**batches[0])
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert mr.plan_of(copied) == PLANS["in part"]
            assert torch.equal(copied(**batches[0]), expected)
            for parameter in copied.parameters():
                parameter.zero_()
        assert torch.equal(model(**batches[0]), expected)


def test_a_pass_calls_every_layers_hooks_once_and_leaves_no_map_on_the_modules(model, batches):
    mr.apply(model, PLANS["groups of 2"])
    seen = []
    for layer in find_stack(model).layers:
        layer.layer.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    model(**batches[0])
    assert seen == [type(layer.layer) for layer in find_stack(model).layers]
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}
