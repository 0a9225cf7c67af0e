"""Search for reuse plans within an error budget, and build the fastest model.

python examples/search_budget.py my-encoder sentences.txt --error 0.02 --out faster
python examples/search_budget.py      (without arguments: a small random model, to see how it works)
"""

import argparse

import torch
from transformers import BertConfig, BertModel

import mapreuse as mr
from mapreuse.data import open_batches, open_model


def main(arguments: list[str] | None = None) -> torch.nn.Module:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="directory of a model with its tokenizer or processor")
    parser.add_argument("data", nargs="?", help="text file, or folder of recordings or images, like your inputs")
    parser.add_argument("--error", type=float, default=0.05, help="maximum of 1 − cosine of the last hidden states")
    parser.add_argument("--out", help="new directory for the converted model")
    given = parser.parse_args(arguments)

    if given.model is None:
        original, batches = small_model()
    else:
        opened = open_model(given.model, float32=True)
        original, batches = opened.model, open_batches(opened, given.data, min_batches=16, min_samples=16)

    found = mr.search(original, batches, error=given.error)  # from the smallest error to the lowest latency
    for candidate in found:
        reusing = sum(candidate.plan.reuses(layer) for layer in range(candidate.plan.num_layers))
        print(f"{reusing} reusing layers: error {candidate.error:.4f}, latency {candidate.latency:.2f}×")
    fastest = found[-1]
    print(fastest.plan)
    model = fastest.build()
    if given.out is not None:
        mr.save(model, given.out)
    return model


def small_model() -> tuple[BertModel, list[dict[str, torch.Tensor]]]:
    """A random BERT and 16 batches of random tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertModel(BertConfig(**sizes, vocab_size=1000, initializer_range=0.1)).eval()
    return model, [{"input_ids": tokens} for tokens in torch.randint(1, 1000, (16, 1, 256))]


if __name__ == "__main__":
    main()
