class CorpusError(ValueError):
    """A corpus that cannot be opened; the message is one line that says what was wrong and what to do."""


def in_short(problem: Exception) -> str:
    """What an exception says, in one line of 200 characters at most."""
    return " ".join(str(problem).split())[:200]
