"""RULER's retrieval tasks (https://arxiv.org/abs/2404.06654) in its published prompt shapes.

Templates, needle sentence, noise, answer prefixes, numbers of keys, values, queries and repeats, and answer lengths are
those of https://github.com/NVIDIA/RULER. Deviations, most of them for exact lengths and depths:

- A context has exactly the length asked for (RULER counts the answer's tokens in), and the first asked needle stands
  after exactly round(depth * filler) filler tokens. RULER puts needles between sentences; here they stand between
  words, or between lines where the haystack has lines.
- Answer prefixes and lines have no outer spaces, as in lm-evaluation-harness: the chat template's break stands before
  the answer prefix.
- Words come from data.ruler_vocabulary, and the essays are whatever text the evaluation is given.
- No other needle repeats an asked key, or any value.
"""

from data.ruler_needles import Niah
from data.ruler_variables import VariableTracking
from data.ruler_words import CommonWords, FrequentWords

__all__ = ["CommonWords", "FrequentWords", "Niah", "VariableTracking"]
