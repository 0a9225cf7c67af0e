"""What the full study runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mapreuse_lab.study._runs import LongRecipe, Recipe, Run
from mapreuse_lab.techniques import study_techniques

_LONGER = ("full", "reuse-2x3", "reuse-6x1", "heads-2", "window-16", "diagonal")
_LONGER_REPEATED = ("full", "reuse-2x3", "heads-2", "diagonal")


@dataclass(frozen=True)
class FullConfig:
    """What the full study runs.

    Attributes:
        corpus: name of the corpus that every technique trains on.
        other_corpus: name of a second one, in another language, for `elsewhere`.
        techniques: names of the rows of the table; those of `study_techniques` where empty.
        repeated: techniques that train with `seeds` seeds; the others with one.
        elsewhere: techniques that train on the second corpus too, with as many.
        seeds: how many, counted from 0.
        shown: full attention, and a reuse technique whose maps and breakdown are shown beside its own.
        recipe: how every run trains.
        longer: techniques that also train by `longer_recipe`, on `corpus`; where None, some of one voice's recordings
            (`prompts:…`), which it puts sentences together from, and none of another corpus.
        longer_repeated: those of them that do so with `longer_seeds` seeds, the others with one; where `longer` is
            None, some of one voice's recordings.
        longer_seeds: how many, counted from 0.
        longer_recipe: how.
        lengths: encoder frames at which latency is measured.
        memory_length: encoder frames at which peak memory is.
        repeats: rounds of the interleaved timing.
        device: "cpu" or "cuda", of the timing; training takes what `accelerate` finds.

    Raises:
        ValueError: where `repeated`, `elsewhere`, `shown` or `longer` names what is not among the techniques, both
            corpora are the same, or the device is not one that is here.
    """

    corpus: str = "prompts:en"
    other_corpus: str = "prompts:es"
    techniques: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ("full", "reuse-2x3", "reuse-4x1,2x1", "reuse-6x1")
    elsewhere: tuple[str, ...] = ("full", "reuse-2x3", "reuse-6x1")
    seeds: int = 3
    shown: tuple[str, str] = ("full", "reuse-2x3")
    recipe: Recipe = field(default_factory=Recipe)
    longer: tuple[str, ...] | None = None
    longer_repeated: tuple[str, ...] = ()
    longer_seeds: int = 2
    longer_recipe: LongRecipe = field(default_factory=LongRecipe)
    lengths: tuple[int, ...] = (250, 500, 1000, 2000, 4000, 8000)
    memory_length: int = 3000
    repeats: int = 5
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.techniques:
            names = tuple(technique.name for technique in study_techniques(self.recipe.num_layers))
            object.__setattr__(self, "techniques", names)
        if self.longer is None:
            of_one_voice = self.corpus.startswith("prompts:")
            object.__setattr__(self, "longer", _LONGER if of_one_voice else ())
            object.__setattr__(self, "longer_repeated", _LONGER_REPEATED if of_one_voice else ())
        named = {*self.repeated, *self.elsewhere, *self.shown, *(self.longer or ()), *self.longer_repeated}
        if unknown := sorted(named - set(self.techniques)):
            raise ValueError(f"{', '.join(unknown)}: not among the study's techniques, {', '.join(self.techniques)}")
        if self.corpus == self.other_corpus:
            raise ValueError(f"the study needs two corpora: --corpus is {self.corpus}, which is the second one, too")
        check_device(self.device)

    def runs(self) -> list[Run]:
        """All training runs that are known beforehand, the most important first."""
        names = self.techniques
        first = [name for name in names if name in self.repeated]
        runs = [Run(name, self.corpus, 0, self.recipe) for name in dict.fromkeys([*first, *names])]
        runs += [Run(name, self.other_corpus, 0, self.recipe) for name in self.elsewhere]
        for seed in range(1, self.seeds):
            runs += [Run(name, self.corpus, seed, self.recipe) for name in self.repeated]
            runs += [Run(name, self.other_corpus, seed, self.recipe) for name in self.elsewhere]
        return runs

    def longer_runs(self) -> list[Run]:
        """The runs by the longer recipe, seed by seed."""
        runs = [Run(name, self.corpus, 0, self.longer_recipe) for name in self.longer or ()]
        for seed in range(1, self.longer_seeds):
            runs += [Run(name, self.corpus, seed, self.longer_recipe) for name in self.longer_repeated]
        return runs


def check_device(device: str) -> None:
    """Raises `ValueError` where there is no such device, or it is not here."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA GPU; leave the option out to run on the CPU")
