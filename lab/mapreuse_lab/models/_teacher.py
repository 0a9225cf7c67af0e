"""Speech with the hidden states of a teacher, a pretrained recogniser, to train a smaller one on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import soundfile
import torch
from lhotse import CutSet, Recording
from lhotse.cut import Cut
from safetensors.torch import save_file

from mapreuse.console import tracked
from mapreuse.data import resample
from mapreuse_lab.models._pauses import MAX_PIECE_SECONDS
from mapreuse_lab.models._speech import SpeechModel
from mapreuse_lab.models._varied_speech import varied_speech
from mapreuse_lab.training import Corpus, cache_dir, synthetic_speech, whole_cut, write_whole


def taught_corpus(teacher: SpeechModel, name: str, number: int, seed: int = 0) -> Corpus:
    """The teacher's corpus with `taught_speech` as its train part; dev and test stay as they are.

    Half of the samples are from the recordings of the train part, half from as many synthetic sentences.

    Args:
        teacher: the recogniser with the encoder.
        name: of the teacher, for the directory of the samples in the cache.
        number: number of samples.
        seed: of the sentences and of all choices.
    """
    corpus = teacher.corpus
    sources = [corpus.part("train"), synthetic_speech(corpus, number, seed, corpus.sampling_rate)]
    key = "-".join(map(str, (Path(name).name, corpus.name.replace(":", "-").replace("/", "-"), number, seed)))
    train = taught_speech(teacher, sources, number, cache_dir() / "taught" / key, seed)
    return replace(corpus, name=f"{corpus.name}, taught by {key}", train=train)


def taught_speech(
    teacher: SpeechModel, sources: Sequence[Sequence[Cut]], number: int, directory: Path, seed: int = 0
) -> CutSet:
    """Samples of `varied_speech` with their transcripts and the states of the teacher's encoder.

    A sample is a wav file at the sampling rate of the teacher's corpus. Beside it, a `.safetensors` file has
    `states`, (positions, channels), with mean 0 and variance 1 in each channel over all samples. Samples cut at
    `MAX_PIECE_SECONDS` are left out, because their transcripts are too long.

    Args:
        teacher: the recogniser with the encoder.
        sources: recordings with transcripts, see `varied_speech`.
        number: number of samples, with those that are left out.
        directory: of the files. If it has the samples of an earlier call, they are returned.
        seed: of all choices.
    """
    manifest = directory / "cuts.jsonl"
    if not manifest.exists():
        directory.mkdir(parents=True, exist_ok=True)
        rate, teacher_rate = teacher.corpus.sampling_rate, teacher.extractor.sampling_rate
        encoder = teacher.model.get_encoder()
        cuts, states = [], []
        varied = varied_speech(sources, teacher_rate, number, seed)
        for index, (samples, recordings) in enumerate(tracked("states of the teacher", varied)):
            if len(samples) < round(MAX_PIECE_SECONDS * teacher_rate):
                file = directory / f"{index}.wav"
                soundfile.write(file, resample(samples, teacher_rate, rate), rate, subtype="PCM_16")
                text = " ".join(one.supervisions[0].text or "" for one in recordings)
                cuts.append(whole_cut(Recording.from_file(file, recording_id=f"taught-{seed}-{index}"), text))
                with torch.no_grad():
                    states.append(encoder(**teacher.inputs(samples)).last_hidden_state[0])
        every = torch.cat(states)
        mean, deviation = every.mean(0), every.std(0)
        for cut, one in zip(cuts, states, strict=True):
            file = Path(cut.recording.sources[0].source).with_suffix(".safetensors")
            save_file({"states": ((one - mean) / deviation).half()}, file)
        text = "".join(json.dumps(cut.to_dict()) + "\n" for cut in cuts)
        write_whole(manifest, lambda unfinished: unfinished.write_text(text))
    return CutSet.from_file(manifest).to_eager()
