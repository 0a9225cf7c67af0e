"""What the full study runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from mapreuse.study._runs import Recipe, Run
from mapreuse.techniques import study_techniques


@dataclass(frozen=True)
class FullConfig:
    """What the full study runs.

    Attributes:
        corpus: name of the corpus that every technique trains on.
        other_corpus: name of a second one, in another language, for `elsewhere`.
        repeated: techniques that train with `seeds` seeds; the others with one.
        elsewhere: techniques that train on the second corpus too.
        seeds: how many, counted from 0.
        recipe: how every run trains.
        lengths: encoder frames (40 ms each) at which latency is measured.
        memory_length: encoder frames at which peak memory is.
        repeats: rounds of the interleaved timing.
        device: "cpu" or "cuda", of the timing; training takes what `accelerate` finds.
    """

    corpus: str = "prompts:en"
    other_corpus: str = "prompts:es"
    repeated: tuple[str, ...] = ("full", "reuse-2x3", "reuse-4x1,2x1", "reuse-6x1")
    elsewhere: tuple[str, ...] = ("full", "reuse-2x3", "reuse-6x1")
    seeds: int = 3
    recipe: Recipe = field(default_factory=Recipe)
    lengths: tuple[int, ...] = (250, 500, 1000, 2000, 4000, 8000)
    memory_length: int = 3000
    repeats: int = 3
    device: str = "cpu"

    def runs(self) -> list[Run]:
        """All training runs that are known beforehand, the most important first.

        Raises `ValueError` where `repeated` or `elsewhere` names what is not among the techniques.
        """
        names = [technique.name for technique in study_techniques(self.recipe.num_layers)]
        if unknown := sorted({*self.repeated, *self.elsewhere} - set(names)):
            raise ValueError(f"{', '.join(unknown)}: not among the study's techniques")
        first = [name for name in names if name in self.repeated]
        runs = [Run(name, self.corpus, 0, self.recipe) for name in dict.fromkeys([*first, *names])]
        runs += [Run(name, self.other_corpus, 0, self.recipe) for name in self.elsewhere]
        return runs + [
            Run(name, self.corpus, seed, self.recipe) for seed in range(1, self.seeds) for name in self.repeated
        ]
