"""Convert a text classifier, then fine-tune it on labelled texts with the Trainer of transformers.

python examples/trainer.py my-classifier labelled.tsv faster --plan 1x6,2x3      (a line: label, tab, text)
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import mapreuse as mr


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="name or directory of a text classifier")
    parser.add_argument("labelled", type=Path, help="text file with a label number, a tab and a text per line")
    parser.add_argument("out", type=Path, help="directory for the converted, fine-tuned model")
    parser.add_argument("--plan", required=True, help="which layers share a map")
    parser.add_argument("--epochs", type=float, default=1.0)
    given = parser.parse_args(arguments)

    original = AutoModelForSequenceClassification.from_pretrained(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    collator = DataCollatorWithPadding(tokenizer)
    examples = []
    for line in given.labelled.read_text().splitlines():
        label, text = line.split("\t", 1)
        examples.append({**tokenizer(text, truncation=True), "labels": int(label)})

    batches = [collator(examples[i : i + 8]) for i in range(0, min(len(examples), 512), 8)]
    model = mr.convert(original, mr.ReusePlan.parse(given.plan), batches)

    settings = TrainingArguments(
        output_dir=str(given.out / "trainer"),
        num_train_epochs=given.epochs,
        save_strategy="no",  # a checkpoint would go through save_pretrained; mr.save saves the result
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model, settings, train_dataset=examples, data_collator=collator)
    loss = trainer.train().training_loss
    mr.save(model, given.out)
    tokenizer.save_pretrained(given.out)
    return loss


if __name__ == "__main__":
    main()
