"""Batches of random token ids; half of the first sentence of each is padding."""

import torch


def random_batches(number, seed=0, size=4, length=9):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(number):
        ids = torch.randint(3, 50, (size, length), generator=generator)
        mask = torch.ones(size, length, dtype=torch.long)
        mask[0, length // 2 :] = 0
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches
