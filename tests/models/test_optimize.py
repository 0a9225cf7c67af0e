"""`optimize` makes convolutions and linear layers faster and changes no result."""

import copy
import pickle
import warnings

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import disagreement, valid_rows
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2BertConfig
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertConvolutionModule

import mapreuse as mr
from mapreuse.models import _linear, optimized

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(params=[pytest.param(True, marks=needs_onednn), False], ids=["oneDNN", "default"])
def faster(request, monkeypatch):
    """Whether oneDNN is taken to be faster."""
    monkeypatch.setattr(_linear, "onednn_is_faster", lambda threads: request.param)
    return request.param


@pytest.fixture
def by_onednn(monkeypatch):
    """The shapes of the inputs of calls of oneDNN, which is taken to be faster."""
    seen = []
    original = torch.ops.mkldnn._linear_pointwise

    def spy(input, *rest):
        seen.append(tuple(input.shape))
        return original(input, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    monkeypatch.setattr(_linear, "onednn_is_faster", lambda threads: True)
    return seen


class Convolution(nn.Module):
    """The convolutions of a Conformer layer."""

    def __init__(self, channels=8, kernel_size=5, padding=2, bias=True, **depthwise):
        super().__init__()
        self.pointwise_conv1 = nn.Conv1d(channels, 2 * channels, 1, bias=bias)
        self.depthwise_conv = nn.Conv1d(
            channels, channels, kernel_size, padding=padding, groups=channels, bias=bias, **depthwise
        )
        self.pointwise_conv2 = nn.Conv1d(channels, channels, 1, bias=bias)

    def forward(self, x):
        gated = nn.functional.glu(self.pointwise_conv1(x), dim=1)
        return self.pointwise_conv2(self.depthwise_conv(gated))


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    rows=st.sampled_from(["contiguous", "transposed", "every other"]),
    columns=st.booleans(),
)
def test_a_linear_layer_of_any_shape_and_memory_order_gives_the_original_sums(
    shape, inputs, outputs, bias, rows, columns
):
    torch.manual_seed(0)
    original = nn.Linear(inputs, outputs, bias=bias)
    if columns:
        original.weight = nn.Parameter(torch.randn(inputs, outputs).mT)
    x = torch.randn(*shape, inputs)
    if rows == "transposed":
        x = torch.randn(inputs, *shape).movedim(0, -1)
    elif rows == "every other":
        x = torch.randn(*shape, 2 * inputs)[..., ::2]
    expected = (x.double() @ original.weight.double().mT + (original.bias.double() if bias else 0)).detach()
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(_linear, "onednn_is_faster", lambda threads: torch.backends.mkldnn.is_available())
        patch.setattr(_linear, "_MIN_ROWS", 1)
        found = mr.optimize(original)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 19),
    time=st.integers(1, 40),
    kernel=st.integers(0, 7).map(lambda half: 2 * half + 1),
    same=st.booleans(),
    bias=st.booleans(),
    transposed=st.booleans(),
)
def test_convolutions_of_any_shape_give_the_original_sums(batch, channels, time, kernel, same, bias, transposed):
    torch.manual_seed(0)
    model = Convolution(channels, kernel, "same" if same else kernel // 2, bias)
    inputs = torch.randn(batch, time, channels).transpose(1, 2) if transposed else torch.randn(batch, channels, time)
    with torch.inference_mode():
        expected = model(inputs)
        found = mr.optimize(model)(inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_onednn
def test_only_inputs_with_many_rows_are_multiplied_by_onednn(by_onednn):
    linear = mr.optimize(nn.Linear(8, 5))
    with torch.no_grad():
        linear(torch.randn(2, 16, 8))
        linear(torch.randn(31, 8))
        linear(torch.randn(8))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Intel GPUs
            with torch.backends.mkldnn.flags(enabled=False):
                linear(torch.randn(40, 8))
    assert by_onednn == [(2, 16, 8)]


@needs_onednn
def test_gradients_counters_autocast_vmap_export_and_tracing_use_the_operators_of_torch(by_onednn):
    linear = mr.optimize(nn.Linear(8, 5))
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
        torch.export.export(mr.optimize(nn.Linear(8, 5)), (x,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated, and its shape checks are not part of the trace
            torch.jit.trace(mr.optimize(nn.Linear(8, 5)), (x,), check_trace=False)
    assert by_onednn == []


def test_the_outputs_of_all_convolutions_are_channels_last():
    convolution = mr.optimize(Convolution())
    strides = []
    for child in convolution.children():
        child.register_forward_hook(lambda module, args, output: strides.append(output.stride(1)))
    with torch.inference_mode():
        convolution(torch.randn(1, 30, 8).transpose(1, 2))
    assert strides == [1, 1, 1]


@pytest.mark.parametrize("depthwise", [{"stride": 2}, {"dilation": 2}, {"padding_mode": "reflect"}])
def test_a_convolution_of_another_kind_keeps_its_class(depthwise):
    assert all(type(child) is nn.Conv1d for child in mr.optimize(Convolution(**depthwise)).children())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_convolutions_in_other_types_give_the_bits_of_torch(dtype):
    torch.manual_seed(0)
    original = Convolution().to(dtype)
    inputs = torch.randn(2, 8, 30, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(mr.optimize(copy.deepcopy(original))(inputs), original(inputs))


def test_gradients_are_bit_for_bit_those_of_the_original():
    torch.manual_seed(0)
    original = Convolution()
    faster = mr.optimize(copy.deepcopy(original))
    inputs = torch.randn(2, 8, 30)
    for module in (original, faster):
        module(inputs).square().sum().backward()
    for expected, found in zip(original.parameters(), faster.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)


def test_the_convolutions_of_other_conformers_become_channels_last():
    module = Wav2Vec2BertConvolutionModule(Wav2Vec2BertConfig(hidden_size=32, conv_depthwise_kernel_size=7)).eval()
    inputs = torch.randn(2, 20, 32)
    with torch.inference_mode():
        expected = module(inputs)
        found = mr.optimize(module)(inputs)
    assert type(module.depthwise_conv).__name__ == "ChannelsLastConv1d"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def classes(model):
    return [type(module) for module in model.modules()]


def test_layers_stay_instances_of_their_classes_and_subclasses_are_left_alone():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8), Convolution())
    names, before = list(model.state_dict()), classes(model)
    assert mr.optimize(model) is model
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), before, strict=True))
    assert type(model[1]) is Own
    assert list(model.state_dict()) == names
    once = classes(model)
    assert classes(mr.optimize(model)) == once != before


def test_optimized_restores_the_classes_at_its_end():
    model = nn.Sequential(nn.Linear(8, 8), Convolution())
    before = classes(model)
    with optimized(model):
        assert classes(model) != before
    assert classes(model) == before


def test_an_optimized_model_can_be_copied_and_pickled(faster):
    model = mr.optimize(nn.Sequential(nn.Linear(8, 8)))
    x = torch.randn(40, 8)
    with torch.inference_mode():
        for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert classes(one) == classes(model)
            assert torch.equal(one(x), model(x))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "parakeet", "wav2vec2-conformer-relative"])
def test_apply_and_optimize_agree_in_either_order_and_apply_alone_changes_no_class(name, faster, monkeypatch):
    monkeypatch.setattr(_linear, "_MIN_ROWS", 1)
    heads = mr.ReusePlan.from_sources([0, 0, 2, 2], {1: [None, 0, 1, None]})
    plan = mr.ReusePlan.parse("2x2") if name == "llama" else heads

    def output(*changes):
        model, batch = families.build(name)
        for change in changes:
            change(model)
        with torch.inference_mode():
            found = model(**batch)
        return model, found.last_hidden_state, valid_rows(model, batch, found)

    def share(model):
        mr.apply(model, plan)

    plain, expected, rows = output(share)
    kinds = {type(module).__name__ for module in plain.modules()}
    assert not kinds & {"OptimizedLinear", "ChannelsLastConv1d", "ChannelsLastConv2d"}
    models = []
    for changes in ((share, mr.optimize), (mr.optimize, share)):
        model, found, _ = output(*changes)
        models.append(model)
        assert disagreement(found, expected, rows) < 1e-5
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())
    kinds = [{type(module).__name__ for module in model.modules()} for model in models]
    assert kinds[0] == kinds[1]
    assert "OptimizedLinear" in kinds[0] or name == "gpt2"
    assert ("ChannelsLastConv1d" in kinds[0]) == (name in ("parakeet", "wav2vec2-conformer-relative"))
    assert ("ChannelsLastConv2d" in kinds[0]) == (name == "parakeet")


def test_a_saved_model_is_opened_without_optimize(tmp_path):
    model, batch = families.build("bert")
    mr.save(mr.optimize(mr.apply(model, mr.ReusePlan.parse("2x2"))), tmp_path)
    loaded = mr.load(tmp_path)
    assert not any(type(module).__name__ == "OptimizedLinear" for module in loaded.modules())
    with torch.inference_mode():
        found, expected = mr.optimize(loaded)(**batch), model(**batch)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
