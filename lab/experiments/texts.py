"""Print three times sixteen texts of Python's language reference: of about 20, 80 and 200 words, one per line."""

import pydoc_data.topics

paragraphs = [" ".join(text.split()) for topic in pydoc_data.topics.topics.values() for text in topic.split("\n\n")]
words = " ".join(paragraphs).split()
for number in (20, 80, 200):
    starts = range(0, 16 * number, number)
    print("\n".join(" ".join(words[start : start + number]) for start in starts))
