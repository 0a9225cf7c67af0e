"""Settings of the full study."""

from __future__ import annotations

from dataclasses import dataclass, field

from mapreuse.console import check_device
from mapreuse_lab.study._runs import LongRecipe, Recipe, Run
from mapreuse_lab.techniques import study_techniques


@dataclass(frozen=True)
class FullConfig:
    """Settings of the full study.

    Attributes:
        corpus: name of the corpus that every technique is trained on.
        other_corpus: name of a corpus in another language, for the techniques in `elsewhere`.
        techniques: names of the techniques; empty for those of `study_techniques`.
        repeated: techniques that are trained with `seeds` seeds on `corpus`; the others are trained with one.
        elsewhere: techniques that are also trained on `other_corpus`, with `seeds` seeds.
        seeds: number of seeds, counted from 0.
        shown: full attention, and the reuse technique whose maps and breakdown the report shows beside it.
        recipe: model size and training of every run.
        longer: techniques that are also trained by `longer_recipe` on `corpus`. None for a default selection if the
            corpus is one voice's prompts, and for no technique otherwise: a larger corpus needs no longer recipe.
        longer_repeated: techniques of `longer` that are trained with `longer_seeds` seeds. If `longer` is None, a
            default selection.
        longer_seeds: number of seeds of the longer recipe.
        longer_recipe: model size and training of the longer runs.
        lengths: encoder frames for latency.
        memory_length: encoder frames for peak memory.
        repeats: number of repeats of each timing.
        device: "cpu" or "cuda", for timing; training uses what `accelerate` finds.

    Raises:
        ValueError: if `repeated`, `elsewhere`, `shown` or `longer` has a name that is not in `techniques`, the two
            corpora are the same, or the device is unknown or missing.
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
            prompts = self.corpus.startswith("prompts:")
            longer = ("full", "reuse-2x3", "reuse-6x1", "heads-2", "window-16", "diagonal") if prompts else ()
            object.__setattr__(self, "longer", longer)
            repeated = ("full", "reuse-2x3", "heads-2", "diagonal") if prompts else ()
            object.__setattr__(self, "longer_repeated", repeated)
        named = {*self.repeated, *self.elsewhere, *self.shown, *(self.longer or ()), *self.longer_repeated}
        if unknown := sorted(named - set(self.techniques)):
            raise ValueError(f"{', '.join(unknown)}: not among the study's techniques, {', '.join(self.techniques)}")
        if self.corpus == self.other_corpus:
            raise ValueError(f"--corpus and --other-corpus are both {self.corpus}; the study needs two corpora")
        check_device(self.device)

    def runs(self) -> list[Run]:
        """All runs with the standard recipe that do not depend on results, the most important ones first."""
        names = self.techniques
        first = [name for name in names if name in self.repeated]
        runs = [Run(name, self.corpus, 0, self.recipe) for name in dict.fromkeys([*first, *names])]
        runs += [Run(name, self.other_corpus, 0, self.recipe) for name in self.elsewhere]
        for seed in range(1, self.seeds):
            runs += [Run(name, self.corpus, seed, self.recipe) for name in self.repeated]
            runs += [Run(name, self.other_corpus, seed, self.recipe) for name in self.elsewhere]
        return runs

    def longer_runs(self) -> list[Run]:
        """The runs with the longer recipe, seed by seed."""
        runs = [Run(name, self.corpus, 0, self.longer_recipe) for name in self.longer or ()]
        for seed in range(1, self.longer_seeds):
            runs += [Run(name, self.corpus, seed, self.longer_recipe) for name in self.longer_repeated]
        return runs
