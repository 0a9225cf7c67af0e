"""What surrounds attention, as a CPU computes it fastest."""

from torch import nn

from mapreuse.models._convolutions import lay_out_convolutions
from mapreuse.models._linear import speed_up_linear_layers


def tune(model: nn.Module) -> None:
    """Have convolutions run in the layout, and linear layers in the library, in which they are fast, in place.

    Weights, parameters' names and results (but for rounding) stay the same. It holds on a CPU, in float32, where no
    gradient is needed and nothing is compiled; everything else is left to PyTorch.
    """
    lay_out_convolutions(model)
    speed_up_linear_layers(model)
