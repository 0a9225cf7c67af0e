"""Convert a sentence-transformers model to share attention maps, and compare its embeddings with the original's.

python examples/embeddings.py sentence-transformers/all-MiniLM-L6-v2 sentences.txt faster --plan 1x2,2x2
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

import mapreuse as mr


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="name or directory of a sentence-transformers model")
    parser.add_argument("sentences", type=Path, help="text file, one sentence per line, like those you will encode")
    parser.add_argument("out", type=Path, help="directory for the converted transformer")
    parser.add_argument("--plan", default="1x2,2x2", help="which layers share a map")
    given = parser.parse_args(arguments)

    sentences = given.sentences.read_text().splitlines()
    held_out, calibration = sentences[::4], [text for number, text in enumerate(sentences) if number % 4]
    encoder = SentenceTransformer(given.model, device="cpu")
    groups = [calibration[i : i + 16] for i in range(0, len(calibration), 16)]
    batches = [encoder.tokenizer(group, padding=True, truncation=True, return_tensors="pt") for group in groups]
    before, seconds_before = encode(encoder, held_out)

    original = encoder[0].model
    converted = mr.convert(original, mr.ReusePlan.parse(given.plan), batches)
    mr.save(converted, given.out)

    faster = copy.deepcopy(encoder)
    faster[0].model = mr.load(given.out)
    after, seconds_after = encode(faster, held_out)
    similarity = torch.cosine_similarity(before, after).mean().item()
    print(f"cosine similarity of {len(held_out)} embeddings: {similarity:.4f}")
    print(f"speed-up: {seconds_before / seconds_after:.2f}×")
    return similarity


def encode(encoder: SentenceTransformer, sentences: list[str]) -> tuple[torch.Tensor, float]:
    """Embeddings, and the seconds they took after a warm-up."""
    encoder.encode(sentences[:4])
    start = time.perf_counter()
    embeddings = encoder.encode(sentences, convert_to_tensor=True)
    return embeddings, time.perf_counter() - start


if __name__ == "__main__":
    main()
