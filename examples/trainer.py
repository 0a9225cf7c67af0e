"""Convert a text classifier, then fine-tune it on labelled texts with the Trainer of transformers.

python examples/trainer.py my-classifier labelled.tsv --plan 1x6,2x3 --out faster     (a line: label, tab, text)
python examples/trainer.py      (without arguments: a small random model and random texts)
"""

import argparse
import tempfile
from pathlib import Path

import torch
import transformers as tf

import mapreuse as mr


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="name or directory of a text classifier")
    parser.add_argument("labelled", nargs="?", type=Path, help="text file, lines like the one above")
    parser.add_argument("--plan", default="1x2,2x1", help="which layers share a map")
    parser.add_argument("--out", type=Path, help="directory for checkpoints and the converted, fine-tuned model")
    given = parser.parse_args(arguments)

    if given.model is None:
        original, collator, examples = small_model()
    else:
        original = tf.AutoModelForSequenceClassification.from_pretrained(given.model)
        tokenizer = tf.AutoTokenizer.from_pretrained(given.model)
        collator = tf.DataCollatorWithPadding(tokenizer)
        lines = (line.split("\t", 1) for line in given.labelled.read_text().splitlines())
        examples = [{**tokenizer(text, truncation=True), "labels": int(label)} for label, text in lines]

    batches = [collator(examples[i : i + 8]) for i in range(0, min(len(examples), 512), 8)]
    model = mr.convert(original, mr.ReusePlan.parse(given.plan), batches)
    settings = tf.TrainingArguments(
        output_dir=given.out or tempfile.mkdtemp(),
        num_train_epochs=1,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = tf.Trainer(model, settings, train_dataset=examples, data_collator=collator)
    loss = trainer.train().training_loss
    print(f"mean loss of the fine-tuning: {loss:.3f}")
    trainer.save_model()  # with its plan: after `import mapreuse`, from_pretrained and pipeline open it
    return loss


def small_model() -> tuple[tf.PreTrainedModel, tf.DefaultDataCollator, list[dict]]:
    """A random BERT classifier, and random tokens with labels."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    model = tf.BertForSequenceClassification(tf.BertConfig(**sizes, vocab_size=1000))
    examples = [{"input_ids": row, "labels": row[0] % 2} for row in torch.randint(1, 1000, (128, 24)).tolist()]
    return model, tf.DefaultDataCollator(), examples


if __name__ == "__main__":
    main()
