"""Linear layers by oneDNN compute what `torch.nn.Linear` does, and only where nobody looks on."""

import copy
import pickle
import warnings

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import kinds_after_a_full_plan
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from mapreuse import ReusePlan, apply
from mapreuse.maps import _microbenchmark, are_unobserved
from mapreuse.models import _linear, tune

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(params=[pytest.param(True, marks=needs_onednn), False], ids=["oneDNN", "own"])
def faster(request, monkeypatch):
    """As if the one or the other had been measured to be faster."""
    monkeypatch.setattr(_linear, "onednn_is_faster", lambda threads: request.param)
    return request.param


@pytest.fixture
def by_onednn(monkeypatch):
    """The shapes of inputs that were given to oneDNN."""
    seen = []
    given_to = torch.ops.mkldnn._linear_pointwise

    def spy(input, *rest):
        seen.append(tuple(input.shape))
        return given_to(input, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    monkeypatch.setattr(_linear, "onednn_is_faster", lambda threads: True)
    return seen


def tuned(linear):
    module = nn.Sequential(copy.deepcopy(linear))
    tune(module)
    return module[0]


@settings(deadline=None, max_examples=80)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    rows=st.sampled_from(["contiguous", "transposed", "every other"]),
    columns=st.booleans(),
)
def test_any_shape_and_memory_gives_the_sums_of_the_original(shape, inputs, outputs, bias, rows, columns):
    torch.manual_seed(0)
    original = nn.Linear(inputs, outputs, bias=bias)
    if columns:
        original.weight = nn.Parameter(torch.randn(inputs, outputs).mT)
    x = torch.randn(*shape, inputs)
    if rows == "transposed":
        x = torch.randn(inputs, *shape).movedim(0, -1)
    elif rows == "every other":
        x = torch.randn(*shape, 2 * inputs)[..., ::2]
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(_linear, "onednn_is_faster", lambda threads: torch.backends.mkldnn.is_available())
        patch.setattr(_linear, "_FEWEST_ROWS", 1)
        found = tuned(original)(x)
    wanted = (x.double() @ original.weight.double().mT + (original.bias.double() if bias else 0)).detach()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-5)


@needs_onednn
def test_many_rows_without_gradients_go_to_onednn_and_few_do_not(by_onednn):
    linear = tuned(nn.Linear(8, 5))
    with torch.no_grad():
        linear(torch.randn(2, 16, 8))
        linear(torch.randn(31, 8))
        linear(torch.randn(8))
    assert by_onednn == [(2, 16, 8)]


@needs_onednn
def test_onednn_can_be_switched_off(by_onednn):
    linear = tuned(nn.Linear(8, 5))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Intel's GPUs, which have nothing to do with it
        with torch.backends.mkldnn.flags(enabled=False):
            linear(torch.randn(40, 8))
    assert by_onednn == []


def test_nested_tensors_are_left_to_torch():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are a prototype
        assert not are_unobserved(torch.nested.nested_tensor([torch.randn(40, 8), torch.randn(50, 8)]))
        assert are_unobserved(torch.randn(40, 8))


@needs_onednn
def test_whoever_follows_operators_sees_those_of_torch(by_onednn):
    linear = tuned(nn.Linear(8, 5))
    x = torch.randn(40, 8)
    linear(x).sum().backward()
    assert linear.weight.grad is not None
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            linear(x)
        assert counter.get_total_flops() == 2 * 40 * 8 * 5
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x).dtype == torch.bfloat16
        assert torch.vmap(linear)(torch.randn(3, 40, 8)).shape == (3, 40, 5)
        assert linear.double()(x.double()).dtype == torch.float64
    with torch.no_grad():
        torch.export.export(tuned(nn.Linear(8, 5)), (x,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated, and checks of shapes are no part of the trace
            torch.jit.trace(tuned(nn.Linear(8, 5)), (x,), check_trace=False)
    assert by_onednn == []


@pytest.mark.parametrize(("times", "wanted"), [((1.0, 2.0), True), ((0.95, 1.0), False), ((2.0, 1.0), False)])
@needs_onednn
def test_onednn_is_taken_where_it_takes_clearly_less_time(monkeypatch, times, wanted):
    called = []
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: called.append(times[0]))
    monkeypatch.setattr(functional, "linear", lambda *args: called.append(times[1]))
    monkeypatch.setattr(_microbenchmark, "_seconds", lambda call: call() or called[-1])
    assert _linear.onednn_is_faster.__wrapped__(1) is wanted


def test_a_subclass_is_left_alone_and_a_tuned_model_can_be_copied_and_pickled(faster):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8))
    names = list(model.state_dict())
    tune(model)
    assert [type(module).__name__ for module in model] == ["FastLinear", "Own"]
    assert isinstance(model[0], nn.Linear)
    assert list(model.state_dict()) == names
    model = nn.Sequential(model[0])
    x = torch.randn(40, 8)
    with torch.inference_mode():
        for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(one(x), model(x))


def test_a_tuned_model_can_be_given_a_plan():
    model, inputs = families.build("bert")
    tune(model)
    apply(model, ReusePlan.parse("2x2"))
    with torch.inference_mode():
        assert model(**inputs).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "parakeet"])
def test_apply_changes_neither_weights_nor_outputs(name, faster, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(_linear, "_FEWEST_ROWS", 1)
    assert "FastLinear" in kinds_after_a_full_plan(*families.build(name))
