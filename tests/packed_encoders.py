"""A `torch.nn.TransformerEncoder` with weights that make peaked maps."""

import warnings

import torch
from torch import nn

WIDTH, HEADS, LAYERS = 32, 4, 4


def peaked(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "pos_embed" not in name:
                nn.init.normal_(parameter, std=0.35)
    return model.eval()


def encoder(dropout=0.0, norm=True, bias=True, **settings):
    """A `TransformerEncoder` in evaluation mode, in which it takes its fast path if it can."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=dropout, bias=bias, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about nested tensors
        return peaked(nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH) if norm else None))
