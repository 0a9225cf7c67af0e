"""Convert a sentence-transformers model to share attention maps, and compare its embeddings with the original's.

python examples/embeddings.py sentence-transformers/all-MiniLM-L6-v2 sentences.txt --plan 1x2,2x2 --out faster
python examples/embeddings.py      (without arguments: a small random model, to see how it works)
"""

import argparse
import copy
import tempfile
from functools import partial
from pathlib import Path
from timeit import timeit

import torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, BertTokenizer

import mapreuse as mr


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="name or directory of a sentence-transformers model")
    parser.add_argument("sentences", nargs="?", type=Path, help="text file, one sentence per line, like your inputs")
    parser.add_argument("--plan", default="1x2,2x2", help="which layers share a map")
    parser.add_argument("--out", help="directory for the converted model")
    given = parser.parse_args(arguments)
    if given.model is None:
        given.model, sentences = small_model()
    else:
        sentences = given.sentences.read_text().splitlines()
    encoder = SentenceTransformer(given.model, device="cpu")
    held_out, calibration = sentences[:30], sentences[30:]
    groups = [calibration[i : i + 16] for i in range(0, len(calibration), 16)]
    batches = [encoder.tokenizer(group, padding=True, truncation=True, return_tensors="pt") for group in groups]
    faster = copy.deepcopy(encoder)
    faster[0].model = mr.convert(encoder[0].model, mr.ReusePlan.parse(given.plan), batches)
    if given.out is not None:
        faster.save_pretrained(given.out)  # SentenceTransformer(given.out) opens it after `import mapreuse`
    embeddings = (model.encode(held_out, convert_to_tensor=True) for model in (encoder, faster))
    similarity = torch.cosine_similarity(*embeddings).mean().item()
    before, after = (timeit(partial(model.encode, held_out), number=3) for model in (encoder, faster))
    print(f"mean cosine similarity {similarity:.4f}, speed-up {before / after:.2f}×")
    return similarity


def small_model() -> tuple[str, list[str]]:
    """A directory with a random BERT and its tokenizer, and sentences."""
    sentences = [f"a sentence about {n % 7} and {n}" for n in range(120)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(sentences).split()))]
    config = BertConfig(vocab_size=len(words), hidden_size=64, num_hidden_layers=6, num_attention_heads=4)
    directory = tempfile.mkdtemp()
    BertModel(config).save_pretrained(directory)
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(directory)
    return directory, sentences


if __name__ == "__main__":
    main()
