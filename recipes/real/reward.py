"A reward of one's own: answers in short sentences are worth more."
import re


def short_sentences(prompt, completion):
    "Minus the mean number of words per sentence, in tens: 15 words per sentence give -1.5."
    sentences = [s for s in re.split(r"[.!?:]\s+|\n+", completion) if s.strip()]
    return -sum(len(s.split()) for s in sentences) / max(len(sentences), 1) / 10
