"""Maps on a GPU, as far as a CPU can tell: devices of new tensors, nothing that waits for the GPU, and results."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from map_cases import cases, defined_map, make_case
from oracle import as_it_is, in_eight_bits, in_sixteen_bits

from mapreuse.maps import (
    STORAGES,
    DenseMap,
    MapCounts,
    RelativePositions,
    _blocked,
    _operators,
    _scores,
    attend,
    compute,
)
from mapreuse.maps._storage_choice import _measured_seconds, choose_storage

KINDS = [
    {"mask": "keys"},
    {"mask": "queries and keys", "bias": "heads", "is_causal": True},
    {"relative": True},
    {"relative": True, "mask": "keys", "bias": "shared"},
]


def on_other_device(value):
    """The same tensors on the device "meta", which has no data."""
    if isinstance(value, RelativePositions):
        return RelativePositions(on_other_device(value.query), on_other_device(value.key))
    return value.to("meta") if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_stay_on_the_device_and_read_nothing_from_it(kind, dtype):
    """Meta tensors refuse operands on two devices, and whatever would wait for a number from a GPU."""
    case = make_case(num_queries=130, num_keys=130, dtype=dtype, **kind)
    fields = {one.name: on_other_device(getattr(case.scores, one.name)) for one in dataclasses.fields(case.scores)}
    scores, values = type(case.scores)(**fields), case.values.to("meta")
    arguments, lengths = _operators.arguments_of(scores, values), torch.tensor([[130, 130]] * 2)
    context, found, weights = _operators._attention(*arguments, True, 0.0, None)
    assert found.equal(lengths)
    assert {one.device.type for one in (context, weights)} == {"meta"}
    for stored in (torch.float16, torch.uint8):
        compressed = torch.empty(scores.shape, dtype=stored, device="meta")
        scales = torch.empty(*scores.shape[:3], 1, device="meta")
        _operators._store_attention(*arguments, 0.0, None, compressed, scales)
        applied = _operators._apply_map(compressed, scales, values, lengths, [0, 2], [1, 1])
        assert (applied.device.type, applied.dtype, applied.shape) == ("meta", dtype, (2, 2, 130, 5))
    assert _operators._apply_map(weights, None, values, lengths, [2, 0], [0, 1]).device.type == "meta"
    for kept in (weights, None):
        gradients = _blocked.blocked_gradients(scores, values, kept, None, context, weights)
        assert {one.device.type for one in gradients} == {"meta"}


@given(cases(), st.sampled_from(STORAGES), st.booleans())
def test_the_code_for_gpus_computes_the_same(case, storage, in_blocks):
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for module in (_scores, _blocked):
            patch.setattr(module, "on_gpu", lambda tensor: True)
        patch.setattr(_blocked, "_GPU_ROWS", 48)
        patch.setattr(_blocked, "_MAX_SHORT_ON_GPU", 0 if in_blocks else 1 << 25)
        patch.setattr(_operators._c_kernel, "library", lambda: None)
        context, stored = compute(case.scores, case.values, storage)
        applied = stored.apply(case.values, tuple((0, head) for head in range(case.values.shape[1])))
    tolerance = {"dense16": 2e-3, "dense8": 3e-2}.get(storage, 1e-5)
    torch.testing.assert_close(context, case.context, atol=1e-5, rtol=1e-5)
    expected = case.map[:, :1] @ case.values
    torch.testing.assert_close(applied, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("storage", STORAGES)
def test_another_default_device_changes_nothing(storage):
    """`torch.set_default_device("cuda")` must not move what belongs on the CPU; "meta" stands for it."""
    case = make_case(num_queries=130, num_keys=130, relative=True, mask="keys")

    def outputs():
        torch.manual_seed(0)
        with torch.no_grad():
            context, stored = compute(case.scores, case.values, storage)
            dropped, _ = attend(case.scores, case.values, keep=False, dropout_p=0.5)
            kernel = _operators._c_kernel
            kernel._memory.kept = None
            direct = kernel.compute(case.scores, case.values) if kernel.library() is not None else context
            return context, stored.apply(case.values), dropped, DenseMap(case.map).apply(case.values), direct

    expected = outputs()
    with torch.device("meta"):
        found = outputs()
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_storage_is_chosen_under_another_default_device():
    case = make_case(num_queries=130, num_keys=130, relative=True)
    _measured_seconds.cache_clear()
    with torch.device("meta"):
        choice = choose_storage(case.scores, case.values, MapCounts(1, 1, 3, 3))
    assert {cost.storage for cost in choice.costs} == set(STORAGES)
    assert all(cost.seconds > 0 for cost in choice.costs)


HAS_GPU = torch.cuda.is_available()
GPU = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not HAS_GPU, reason="no CUDA GPU on this machine")]
)
DEVICES = ["cpu", GPU]
"""The tests below are meant for a GPU. On the CPU, they show that their code runs."""


def moved(case, device, dtype):
    """Scores and values on a device."""
    fields = {one.name: getattr(case.scores, one.name) for one in dataclasses.fields(case.scores)}
    for name, value in fields.items():
        if isinstance(value, torch.Tensor):
            fields[name] = value.to(device)
        if isinstance(value, RelativePositions):
            fields[name] = RelativePositions(value.query.to(device), value.key.to(device))
    return type(case.scores)(**fields).to(dtype), case.values.to(device, dtype)


def distance(output, expected):
    """‖output − expected‖ / ‖expected‖."""
    return (output.cpu().float() - expected).norm() / expected.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("whole", [True, False])
def test_a_device_computes_the_map_of_the_definition(device, kind, dtype, storage, whole, monkeypatch):
    monkeypatch.setattr(_blocked, "_MAX_SHORT_ON_GPU", 1 << 25 if whole else 0)
    case = make_case(num_queries=130, num_keys=130, **kind)
    scores, values = moved(case, device, dtype)
    with torch.no_grad():
        context, stored = compute(scores, values, storage)
        applied = stored.apply(values, ((2, 0), (0, 2)))
    assert (context.dtype, context.device.type) == (dtype, device)
    rounded, values = moved(case, "cpu", dtype)
    expected, values = defined_map(rounded.to(torch.float32)), values.float()
    kept = {"dense8": in_eight_bits, "dense16": in_sixteen_bits}.get(storage, as_it_is)(expected)
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-3
    assert distance(context, expected @ values) < tolerance
    assert distance(applied, kept[:, [2, 0]] @ values[:, [0, 2]]) < tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_device_has_the_gradients_of_the_definition(device, kind, dropout_p):
    case = make_case(num_queries=130, num_keys=130, **kind)
    scores, values = moved(case, device, torch.float32)
    query = scores.query.requires_grad_()
    torch.manual_seed(0)
    context, weights = attend(scores, values, keep=True, dropout_p=dropout_p)
    context.sin().sum().backward()
    assert query.grad is not None
    assert query.grad.device.type == device
    torch.testing.assert_close(weights.detach().cpu(), case.map, atol=1e-3, rtol=1e-3)
    if dropout_p == 0.0:
        reference, leaf = case.scores, case.scores.query.detach().clone().requires_grad_()
        (defined_map(dataclasses.replace(reference, query=leaf)) @ case.values).sin().sum().backward()
        torch.testing.assert_close(query.grad.cpu(), leaf.grad, atol=2e-3, rtol=2e-3)
    else:  # the backward pass drops the same weights, so another run with the same seed has the same gradients
        first, query.grad = query.grad, None
        torch.manual_seed(0)
        attend(scores, values, keep=True, dropout_p=dropout_p)[0].sin().sum().backward()
        torch.testing.assert_close(query.grad, first)


@pytest.mark.parametrize("device", DEVICES)
def test_the_fastest_storage_is_chosen_on_the_device_itself(device):
    case = make_case(num_queries=130, num_keys=130, relative=True)
    choice = choose_storage(*moved(case, device, torch.float32), MapCounts(1, 1, 3, 3))
    assert all(cost.seconds > 0 for cost in choice.costs)
    if device == "cuda":
        assert choice.budget == torch.cuda.get_device_properties(0).total_memory // 4
