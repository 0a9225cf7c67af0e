"""Convolutions with their channels adjacent compute what `torch.nn`'s own do."""

import copy

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import kinds_after_a_full_plan
from torch import nn
from transformers import SeamlessM4TConfig, Wav2Vec2BertConfig
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TConformerConvolutionModule
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertConvolutionModule

from mapreuse.models._convolutions import lay_out_convolutions

CONFORMERS = [name for name in families.FAMILIES if "parakeet" in name or "conformer" in name]


class Convolution(nn.Module):
    """As a Conformer has it, for any of its settings."""

    def __init__(self, channels: int, kernel_size: int, padding: int | str, bias: bool, **depthwise) -> None:
        super().__init__()
        self.pointwise_conv1 = nn.Conv1d(channels, 2 * channels, 1, bias=bias)
        self.depthwise_conv = nn.Conv1d(
            channels, channels, kernel_size, padding=padding, groups=channels, bias=bias, **depthwise
        )
        self.pointwise_conv2 = nn.Conv1d(channels, channels, 1, bias=bias)

    def forward(self, x):
        gated = nn.functional.glu(self.pointwise_conv1(x), dim=1)
        return self.pointwise_conv2(self.depthwise_conv(gated))


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 19),
    time=st.integers(1, 40),
    kernel=st.integers(0, 7).map(lambda half: 2 * half + 1),
    same=st.booleans(),
    bias=st.booleans(),
    transposed=st.booleans(),
)
def test_any_shape_gives_the_sums_of_the_original(batch, channels, time, kernel, same, bias, transposed):
    torch.manual_seed(0)
    original = Convolution(channels, kernel, "same" if same else kernel // 2, bias)
    inputs = torch.randn(batch, time, channels).transpose(1, 2) if transposed else torch.randn(batch, channels, time)
    with torch.inference_mode():
        wanted = original(inputs)
        lay_out_convolutions(original)
        found = original(inputs)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_without_gradients_channels_are_adjacent_from_one_end_to_the_other():
    convolution = Convolution(8, 5, 2, True)
    lay_out_convolutions(convolution)
    strides = []
    for child in convolution.children():
        child.register_forward_hook(lambda module, args, output: strides.append(output.stride(1)))
    with torch.inference_mode():
        convolution(torch.randn(1, 30, 8).transpose(1, 2))
    assert strides == [1, 1, 1]


@pytest.mark.parametrize("depthwise", [{"stride": 2}, {"dilation": 2}, {"padding_mode": "reflect"}])
def test_a_convolution_of_another_kind_is_left_alone(depthwise):
    convolution = Convolution(8, 3, 1, True, **depthwise)
    lay_out_convolutions(convolution)
    assert all(type(child) is nn.Conv1d for child in convolution.children())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_of_numbers_are_left_to_torch(dtype):
    torch.manual_seed(0)
    original = Convolution(8, 5, 2, True).to(dtype)
    laid_out = copy.deepcopy(original)
    lay_out_convolutions(laid_out)
    inputs = torch.randn(2, 8, 30, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(laid_out(inputs), original(inputs))


def test_gradients_are_bit_for_bit_those_of_the_original():
    torch.manual_seed(0)
    original = Convolution(8, 5, 2, True)
    laid_out = copy.deepcopy(original)
    lay_out_convolutions(laid_out)
    inputs = torch.randn(2, 8, 30)
    for module in (original, laid_out):
        module(inputs).square().sum().backward()
    for wanted, found in zip(original.parameters(), laid_out.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad)


@pytest.mark.parametrize("name", CONFORMERS)
def test_apply_lays_out_a_conformer_and_changes_neither_weights_nor_outputs(name):
    torch.manual_seed(0)
    kinds = kinds_after_a_full_plan(*families.build(name))
    assert "ChannelsLastConv1d" in kinds
    assert ("ChannelsLastConv2d" in kinds) == (name == "parakeet"), "Parakeet's subsampling has such"


@pytest.mark.parametrize(
    "module",
    [
        Wav2Vec2BertConvolutionModule(Wav2Vec2BertConfig(hidden_size=32, conv_depthwise_kernel_size=7)),
        SeamlessM4TConformerConvolutionModule(SeamlessM4TConfig(hidden_size=32, conv_depthwise_kernel_size=7)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_conformers_convolutions_are_served_too(module):
    module.eval()
    inputs = torch.randn(2, 20, 32)
    with torch.inference_mode():
        wanted = module(inputs)
        lay_out_convolutions(module)
        found = module(inputs)
    assert type(module.depthwise_conv).__name__ == "ChannelsLastConv1d"
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
