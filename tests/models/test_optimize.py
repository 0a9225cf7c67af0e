"""`optimize` makes convolutions and linear layers faster and changes no result."""

import copy
import gc
import pickle
import warnings
import weakref

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
from mapreuse.models import _optimize, optimized

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(params=[pytest.param(True, marks=needs_onednn), False], ids=["oneDNN", "default"])
def faster(request, monkeypatch):
    """Whether oneDNN is taken to be faster."""
    monkeypatch.setattr(_optimize, "onednn_is_faster", lambda threads: request.param)
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
    monkeypatch.setattr(_optimize, "onednn_is_faster", lambda threads: True)
    return seen


def optimized_modules(model):
    return [path for path, module in model.named_modules() if "forward" in vars(module)]


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
        patch.setattr(_optimize, "onednn_is_faster", lambda threads: torch.backends.mkldnn.is_available())
        patch.setattr(_optimize, "_MIN_ROWS", 1)
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


class ParakeetEncoderSubsamplingConv2D(nn.Sequential):
    """Convolutions of grids, under the name by which `optimize` finds them."""


def gradients(model, x, other):
    with torch.enable_grad():
        return torch.autograd.grad(model(x).square().sum(), [*model.parameters()])


def under_autocast(model, x, other):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def traced(model, x, other):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and its shape checks are not part of the trace
        return torch.jit.trace(model, (x,), check_trace=False)(other)


def exported(model, x, other):
    changing = {next(d for d in range(x.dim()) if x.shape[d] != other.shape[d]): torch.export.Dim.DYNAMIC}
    return torch.export.export(model, (x,), dynamic_shapes=(changing,)).module()(other)


WATCHERS = {
    "gradients": gradients,
    "forward gradients": lambda model, x, other: torch.func.jvp(model, (x,), (torch.ones_like(x),)),
    "vmap": lambda model, x, other: torch.vmap(model)(torch.stack([x, 2 * x])),
    "autocast": under_autocast,
    "jit.trace": traced,
    "export": exported,
}
LAYERS = {
    "linear": (lambda: nn.Linear(8, 5), lambda rows: torch.randn(rows, 8)),
    "convolutions": (lambda: Convolution(), lambda time: torch.randn(2, 8, time)),
    "convolutions of grids": (
        lambda: ParakeetEncoderSubsamplingConv2D(nn.Conv2d(1, 4, 3, 2), nn.Conv2d(4, 4, 3, groups=4)),
        lambda time: torch.randn(2, 1, time, 12),
    ),
}


@pytest.mark.parametrize("rows", [31, 40])
def test_a_flop_counter_counts_optimized_linear_layers(rows, faster):
    linear = mr.optimize(nn.Linear(8, 5))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        linear(torch.randn(rows, 8))
    assert counter.get_total_flops() == 2 * rows * 8 * 5


@needs_onednn
@pytest.mark.parametrize("rows", [31, 40])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch.func.jvp
def test_who_watches_operators_sees_those_of_torch_and_the_same_numbers(watcher, layers, rows, by_onednn):
    torch.manual_seed(0)
    build, inputs = LAYERS[layers]
    original = build()
    x, other = inputs(rows), inputs(71 - rows)
    with torch.no_grad():
        expected = WATCHERS[watcher](original, x, other)
        found = WATCHERS[watcher](mr.optimize(copy.deepcopy(original)), x, other)
    torch.testing.assert_close(found, expected)
    assert by_onednn == []


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_multiplied_as_before(layout, by_onednn):
    original = nn.Linear(8, 5)
    x = torch.nested.nested_tensor([torch.randn(20, 8), torch.randn(30, 8)], layout=layout)
    with torch.no_grad():
        found = mr.optimize(copy.deepcopy(original))(x)
        assert all(torch.equal(*pair) for pair in zip(found.unbind(), original(x).unbind(), strict=True))
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
def test_a_convolution_of_another_kind_is_left_as_it_is(depthwise):
    assert optimized_modules(mr.optimize(Convolution(**depthwise))) == []


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
    assert "depthwise_conv" in optimized_modules(module)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_types_and_names_stay_and_subclasses_are_left_alone():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8), Convolution())
    names, types = list(model.state_dict()), [type(module) for module in model.modules()]
    assert mr.optimize(model) is model
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == names
    once = [vars(module).get("forward") for module in model.modules()]
    assert optimized_modules(model) == ["0", "2.pointwise_conv1", "2.depthwise_conv", "2.pointwise_conv2"]
    assert [vars(module).get("forward") for module in mr.optimize(model).modules()] == once


def test_a_forward_that_another_tool_put_on_a_module_stays():
    model = nn.Linear(8, 8)
    model.forward = lambda input: input + 1
    assert torch.equal(mr.optimize(model)(torch.zeros(40, 8)), torch.ones(40, 8))


def test_a_class_that_another_tool_gives_to_an_optimized_module_computes(by_onednn):
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model, x = mr.optimize(nn.Linear(8, 5)), torch.randn(40, 8)
    with torch.inference_mode():
        expected = 2 * model(x)
        model.__class__ = Doubled
        torch.testing.assert_close(model(x), expected)
    assert len(by_onednn) == 1


def test_optimized_is_undone_at_its_end_except_on_what_was_optimized_before():
    model = nn.Sequential(mr.optimize(nn.Linear(8, 8)), nn.Linear(8, 8), Convolution())
    with optimized(model):
        assert len(optimized_modules(model)) == 5
    assert optimized_modules(model) == ["0"]


def test_an_optimized_model_is_freed_without_the_garbage_collector():
    gc.disable()
    try:
        model = mr.optimize(nn.Linear(8, 8))
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_an_optimized_model_can_be_copied_and_pickled(faster):
    model = mr.optimize(nn.Sequential(nn.Linear(8, 8)))
    x = torch.randn(40, 8)
    with torch.inference_mode():
        for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert optimized_modules(one) == ["0"]
            assert torch.equal(one(x), model(x))
            one[0].weight.zero_()
            assert torch.equal(one(x), one[0].bias.expand(40, 8)), "it must not compute with the original's weights"


def as_replica(linear):
    replica = linear._replicate_for_data_parallel()
    replica.weight, replica.bias = linear.weight, linear.bias
    return replica


@pytest.mark.parametrize("copied", [copy.copy, as_replica])
def test_a_shallow_copy_computes_with_its_own_weights_and_outlives_the_original(copied, faster):
    original = mr.optimize(nn.Linear(8, 8))
    copied_once = copied(original)
    copied_once._parameters = dict(weight=nn.Parameter(torch.zeros(8, 8)), bias=nn.Parameter(torch.ones(8)))
    del original
    with torch.inference_mode():
        for one in (copied_once, copy.deepcopy(copied_once), pickle.loads(pickle.dumps(copied_once))):
            assert torch.equal(one(torch.randn(40, 8)), torch.ones(40, 8))
            assert "forward" not in vars(one)
            assert optimized_modules(mr.optimize(one)) == [""]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torch_jit_script_compiles_an_optimized_model_and_takes_the_faster_forward_off(faster):
    model, x = mr.optimize(nn.Sequential(nn.Linear(8, 5))), torch.randn(40, 8)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        torch.testing.assert_close(model(x), expected)
    assert optimized_modules(model) == []


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "parakeet", "wav2vec2-conformer-relative"])
def test_apply_and_optimize_agree_in_either_order_and_optimize_changes_no_type(name, faster, monkeypatch):
    monkeypatch.setattr(_optimize, "_MIN_ROWS", 1)
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
    assert optimized_modules(plain) == []
    models = []
    for changes in ((share, mr.optimize), (mr.optimize, share)):
        model, found, _ = output(*changes)
        models.append(model)
        assert [type(one).__name__ for one in model.modules()] == [type(one).__name__ for one in plain.modules()]
        assert disagreement(found, expected, rows) < 1e-5
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())
    assert optimized_modules(models[0]) == optimized_modules(models[1])
    kinds = {type(models[0].get_submodule(path)) for path in optimized_modules(models[0])}
    assert (nn.Linear in kinds) == (name != "gpt2")
    assert (nn.Conv1d in kinds) == (name in ("parakeet", "wav2vec2-conformer-relative"))
    assert (nn.Conv2d in kinds) == (name == "parakeet")


def test_a_saved_model_is_opened_without_optimize(tmp_path):
    model, batch = families.build("bert")
    mr.save(mr.optimize(mr.apply(model, mr.ReusePlan.parse("2x2"))), tmp_path)
    loaded = mr.load(tmp_path)
    assert optimized_modules(loaded) == []
    with torch.inference_mode():
        found, expected = mr.optimize(loaded)(**batch), model(**batch)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
