"""The cost that each technique's file states is the one that PyTorch counts, and grows with length as it should."""

import math

import pytest
import torch
from small_encoders import HEAD_DIM, NUM_HEADS, WIDTH, batch, compressed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

T, C, H, D = 1000, WIDTH, NUM_HEADS, HEAD_DIM
PROJECTION = 2 * T * C**2
DISTANCES = 2 * (2 * T - 1) * C**2
CHOSEN = math.ceil(3 * math.log(T))

COSTS = {
    ("full", 0): 4 * PROJECTION + DISTANCES + 6 * T**2 * C,
    ("reuse-2x2", 1): 2 * PROJECTION + 2 * T**2 * C,
    ("reuse-2x2-partial-2", 1): 3 * PROJECTION + DISTANCES / 2 + 4 * T**2 * C,
    ("heads-1", 0): 4 * PROJECTION / H + DISTANCES / H + 6 * T**2 * D,
    ("wide-heads-2", 0): 4 * PROJECTION + DISTANCES + 6 * T**2 * C,
    ("qk-dim-4", 0): 3 * PROJECTION + DISTANCES / 2 + T**2 * H * (4 * 4 + 2 * D),
    ("gqa-1", 0): 2.5 * PROJECTION + DISTANCES + 6 * T**2 * C,
    ("cla-2", 1): 2 * PROJECTION + DISTANCES + 6 * T**2 * C,
    ("window-40", 0): 4 * PROJECTION + 4 * T * (40 + 80) * C + 2 * T * 81 * C + 2 * 81 * C**2,
    ("window-3-global-5", 0): 4 * PROJECTION + 4 * T * (32 + 6) * C + 2 * T * 7 * C + 2 * 7 * C**2 + 8 * 5 * T * C,
    ("window-40+reuse-2x2", 1): 2 * PROJECTION + 2 * T * (40 + 80) * C,
    ("grouped-2", 0): 4 * PROJECTION + DISTANCES / 2 + 6 * T**2 * C / 2,
    ("strided-4", 0): 3.25 * PROJECTION + DISTANCES + 6 * T**2 * C / 4 + 128 * T * C,
    ("pool-2", 0): 3 * PROJECTION + DISTANCES / 2 + 6 * T**2 * C / 2,
    ("linformer-20", 0): 2 * PROJECTION + 2 * 2 * 20 * C**2 + 2 * 20 * T * C + 4 * 20 * T * C,
    ("linear", 0): 4 * PROJECTION + 4 * T * C * (D + 1),
    ("performer-64", 0): 4 * PROJECTION + 4 * T * H * 64 * D + 4 * T * H * 64 * (D + 1),
    ("nystrom-32", 0): 4 * PROJECTION + 8 * T * 32 * C + 48 * H * 32**3,
    ("probsparse-3", 0): 4 * PROJECTION + DISTANCES + 2 * T * CHOSEN * C + 8 * CHOSEN * T * C,
    ("skip-2", 2): 0,
    ("gaussian-2", 0): 2 * PROJECTION + 2 * T * 25 * C,
    ("diagonal", 0): 2 * PROJECTION,
}


def counted(model, layer, frames):
    """FLOPs of one layer's attention; fused attention is counted as the products that it is made of."""
    inputs = batch(frames)["input_features"]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_features=inputs)
    by_module = counter.get_flop_counts()
    return sum(by_module.get(f"ParakeetEncoder.layers.{layer}.self_attn", {}).values())


@pytest.mark.parametrize(("name", "layer"), COSTS)
def test_the_stated_cost_is_the_counted_one(name, layer):
    stated = COSTS[name, layer]
    found = counted(compressed(name), layer, T)
    assert abs(found - stated) <= 0.1 * stated, f"{found / 1e6:.1f} million, {stated / 1e6:.1f} stated"


LINEAR = (
    "window-8 window-8-global-2 window-8+reuse-2x2 linformer-20 linear performer-16 nystrom-8 gaussian-2 diagonal"
)


@pytest.mark.parametrize("name", LINEAR.split())
def test_twice_the_length_costs_twice_as_much(name):
    model = compressed(name)
    short, long = (counted(model, 1, frames) for frames in (500, 1000))
    assert 1.9 * short <= long <= 2.1 * short
