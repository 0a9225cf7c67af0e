import torch
from jaxtyping import Float, Int
from torch import Tensor


def greedy(logits: Float[Tensor, "batch frames outputs"], lengths: Int[Tensor, "batch"]) -> list[list[int]]:
    """Best path decoding: the likeliest output of every frame, repeats merged, blanks (output 0) removed."""
    decoded = []
    for path, length in zip(logits.argmax(-1).cpu(), lengths.tolist(), strict=True):
        numbers = torch.unique_consecutive(path[:length])
        decoded.append(numbers[numbers != 0].tolist())
    return decoded
