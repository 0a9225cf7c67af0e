"""Directories of tiny models as people have them, with tokenizers or feature extractors made here."""

import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

SENTENCES = [
    "maps are alike",
    "a layer computes one map and the next applies it",
    "heads",
    "the next layer applies the map of the layer before it",
    "one head is alike the next",
    "values are projected in every layer and the map is not",
]
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


def tokenizer():
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def save_bert(directory, *, vocab_size=40, dtype=torch.float32):
    """A BERT for masked words with its tokenizer."""
    torch.manual_seed(0)
    config = tf.BertConfig(**SIZE, vocab_size=vocab_size, max_position_embeddings=8)
    tf.BertForMaskedLM(config).to(dtype).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def save_llama(directory):
    """A causal language model with its tokenizer."""
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, vocab_size=40, max_position_embeddings=8)).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def save_wav2vec2(directory):
    """A Wav2Vec2 with its feature extractor, for audio at 16 kHz."""
    torch.manual_seed(0)
    front = {"conv_dim": (16, 16), "conv_stride": (16, 16), "conv_kernel": (16, 16), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = tf.Wav2Vec2Config(**SIZE, **front, **positions, layerdrop=0.0, vocab_size=20)
    tf.Wav2Vec2ForCTC(config).save_pretrained(directory)
    tf.Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=16000).save_pretrained(directory)
    return directory


def write(folder, name, contents=b""):
    """Write a file of text or bytes; returns its folder."""
    (folder / name).write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return folder


def without(folder, pattern):
    """Delete the files of a folder that match a pattern; returns the folder."""
    for file in folder.glob(pattern):
        file.unlink()
    return folder
