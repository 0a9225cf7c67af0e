"""Transcribe a long recording with exact attention that never stores a T×T positional term. No training.

python examples/long_audio.py nvidia/parakeet-ctc-0.6b recording.wav
python examples/long_audio.py      (without arguments: a small random model on a minute of noise)
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import soundfile
import torch
import transformers as tf

import mapreuse as mr
from mapreuse.models import find_stack


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="name or directory of a CTC recogniser with relative positions")
    parser.add_argument("recording", nargs="?", help="wav or flac file at the model's sampling rate")
    given = parser.parse_args(arguments)

    if given.model is None:
        model, processor = small_model()
        samples, sampling_rate = torch.rand(60 * 16000, 1).numpy() - 0.5, 16000
    else:
        model = tf.AutoModelForCTC.from_pretrained(given.model).eval()
        processor = tf.AutoProcessor.from_pretrained(given.model)
        samples, sampling_rate = soundfile.read(given.recording, dtype="float32", always_2d=True)

    mr.optimize(mr.apply(model, mr.ReusePlan.full(len(find_stack(model).layers))))  # without sharing
    inputs = processor(samples.mean(axis=1), sampling_rate=sampling_rate, return_tensors="pt")
    start = time.perf_counter()
    with torch.inference_mode():
        tokens = model(**inputs).logits.argmax(dim=-1)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts kilobytes
    print(f"{len(samples) / sampling_rate:.0f} s of audio in {seconds:.1f} s; peak memory {peak:.1f} GB")
    (text,) = processor.batch_decode(tokens)
    print(text)
    return text


def small_model() -> tuple[tf.PreTrainedModel, tf.Wav2Vec2Processor]:
    """A random Wav2Vec2-Conformer with an alphabet of two letters."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = tf.Wav2Vec2ConformerConfig(vocab_size=4, **sizes, conv_dim=[32] * 7, position_embeddings_type="relative")
    letters = Path(tempfile.mkdtemp(), "vocab.json")
    letters.write_text('{"<pad>": 0, "|": 1, "a": 2, "b": 3}')
    tokenizer = tf.Wav2Vec2CTCTokenizer(letters, unk_token="<pad>")
    return tf.Wav2Vec2ConformerForCTC(config).eval(), tf.Wav2Vec2Processor(tf.Wav2Vec2FeatureExtractor(), tokenizer)


if __name__ == "__main__":
    main()
