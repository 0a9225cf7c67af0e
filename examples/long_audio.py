"""Transcribe a long recording with exact attention that never stores a T×T positional term. No training.

python examples/long_audio.py nvidia/parakeet-ctc-0.6b recording.wav
"""

import argparse
import resource
import time
from pathlib import Path

import soundfile
import torch
from transformers import AutoModelForCTC, AutoProcessor

import mapreuse as mr
from mapreuse.models import find_stack


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="name or directory of a CTC recogniser with relative positions")
    parser.add_argument("recording", type=Path, help="wav or flac file at the model's sampling rate")
    given = parser.parse_args(arguments)

    processor = AutoProcessor.from_pretrained(given.model)
    model = AutoModelForCTC.from_pretrained(given.model).eval()
    mr.apply(model, mr.ReusePlan.full(len(find_stack(model).layers)))  # each layer computes its own map
    mr.optimize(model)

    samples, sampling_rate = soundfile.read(given.recording, dtype="float32", always_2d=True)
    inputs = processor(samples.mean(axis=1), sampling_rate=sampling_rate, return_tensors="pt")
    start = time.perf_counter()
    with torch.inference_mode():
        logits = model(**inputs).logits
    seconds = time.perf_counter() - start
    (text,) = processor.batch_decode(logits.argmax(dim=-1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts kilobytes
    print(
        f"{len(samples) / sampling_rate:.0f} s of audio in {seconds:.1f} s; peak memory of the process {peak:.1f} GB"
    )
    print(text)
    return text


if __name__ == "__main__":
    main()
