"""Reads a language model from a GGUF file."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def convert_gguf(folder: Path, out: Path) -> None:
    """Write the model and the tokenizer of the only GGUF file in a folder, as float32 safetensors.

    `transformers` reads the file, with the package `gguf`. It refuses to save a model that it read so, although the
    weights are plain float32 by then. They are loaded into a new model, which is saved.
    """
    (file,) = folder.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    config = read.config
    del config.quantization_config, config._name_or_path
    model = type(read)(config).float()
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
