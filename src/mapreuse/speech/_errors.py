class CorpusError(ValueError):
    """A corpus that cannot be opened; the message is one line that says what was wrong and what to do."""
