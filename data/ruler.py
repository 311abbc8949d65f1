"""RULER's retrieval tasks (https://arxiv.org/abs/2404.06654) with the published prompts.

Templates, needle sentence, noise, answer prefixes, numbers of keys, values, queries and repeats, and answer lengths are
those of https://github.com/NVIDIA/RULER. Deviations, most of them for exact lengths and depths:

- A context has exactly the requested length (RULER includes the answer's tokens), and the first asked needle comes
  after exactly round(depth * filler) filler tokens. RULER puts needles between sentences; here they are between words,
  or between lines if the haystack has lines.
- Answer prefixes and lines have no outer spaces, as in lm-evaluation-harness: the chat template's break comes before
  the answer prefix.
- Words come from data.ruler_vocabulary, and the evaluation's text replaces the essays.
- No other needle repeats an asked key, or any value.
"""

from data.ruler_needles import Niah
from data.ruler_variables import VariableTracking
from data.ruler_words import CommonWords, FrequentWords

__all__ = ["CommonWords", "FrequentWords", "Niah", "VariableTracking"]
