from collections.abc import Sequence

from lhotse.cut import Cut

from mapreuse.speech._evaluation import logits_of, score, text_of
from mapreuse.speech._language_model import LanguageModel
from mapreuse.speech._recogniser import Fusion, Recogniser

_TIMES = 5  # each transcript counts
_WEIGHTS = (0.3, 0.5, 0.7, 0.9, 1.1)
_BONUSES = (0.0, 0.5, 1.0, 1.5, 2.0)


def add_language_model(
    recogniser: Recogniser,
    transcripts: Sequence[str],
    sentences: Sequence[str],
    dev: Sequence[Cut],
    language: str,
) -> None:
    """Gives the recogniser a language model of training texts, its weight and bonus tuned on `dev`.

    Recorded `transcripts` count five times, so that the model keeps what it reads in one of them; generated
    `sentences` count once. The pair of weight and bonus with the least
    (WER, CER) on dev is taken, the smallest of equals; without dev utterances the defaults of `Fusion` stay.
    """
    texts = [*transcripts] * _TIMES + [*sentences]
    recogniser.language_model = LanguageModel.train(texts, recogniser.vocabulary, language)
    if not dev:
        return
    references = [cut.supervisions[0].text for cut in dev]
    logits = logits_of(recogniser, dev)

    def errors(fusion: Fusion) -> tuple[float, float]:
        recogniser.fusion = fusion
        scores = score(references, [text_of(recogniser, frames, "beam+lm") for frames in logits])
        return scores.wer, scores.cer

    grid = [Fusion(weight, bonus) for weight in _WEIGHTS for bonus in _BONUSES]
    recogniser.fusion = min(grid, key=errors)
