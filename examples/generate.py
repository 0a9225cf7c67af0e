"""Generate text with a decoder whose layers share attention maps: a chat of two turns that keeps its cache.

python examples/generate.py my-decoder texts.txt --plan 1x10,2x10 --out smaller
python examples/generate.py      (without arguments: a small random model, to see how it works)
"""

import argparse

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import mapreuse as mr
from mapreuse.data import open_batches, open_model


def main(arguments: list[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="directory of a decoder with its tokenizer")
    parser.add_argument("data", nargs="?", help="text file like your inputs, to recover quality")
    parser.add_argument("--plan", default="1x2,2x1", help="the plan, such as 1x10,2x10")
    parser.add_argument("--out", help="new directory for the converted model")
    given = parser.parse_args(arguments)

    if given.model is None:
        original, batches, turns = small_model()
    else:
        opened = open_model(given.model, float32=True)
        original, batches = opened.model, open_batches(opened, given.data, min_batches=4, min_samples=4)
        turns = [batch["input_ids"][:1] for batch in batches[:2]]

    plan = mr.ReusePlan.parse(given.plan)
    print(mr.cache_bytes(original, plan))
    model = mr.convert(original, plan, batches)
    cache, text = DynamicCache(config=model.config), turns[0][:, :0]
    for turn in turns:
        text = torch.cat([text, turn], 1)
        mask = torch.ones_like(text)
        text = model.generate(text, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False)
    print(f"{text.shape[1]} tokens, of which {cache.get_seq_length()} are in the cache")
    if given.out is not None:
        mr.save(model, given.out)
    return text


def small_model() -> tuple[LlamaForCausalLM, list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """A random Llama, batches of random tokens, and two turns of a chat."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=100, eos_token_id=None, pad_token_id=0)
    tokens = torch.randint(1, 100, (8, 1, 32))
    return LlamaForCausalLM(config).eval(), [{"input_ids": one} for one in tokens], [tokens[0], tokens[1, :, :5]]


if __name__ == "__main__":
    main()
