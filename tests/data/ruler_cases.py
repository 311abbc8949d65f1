"""Settings for the tests of RULER's tasks."""

from data.cases import CaseTask
from data.ruler import CommonWords, FrequentWords, Niah, VariableTracking
from data.ruler_needles import PRESETS

LENGTH = 1400
PLAIN = 9000
"""For one token per byte."""
TASKS: dict[str, CaseTask] = {
    **{name: Niah(name) for name in PRESETS},
    "vt": VariableTracking(),
    "vt_noise": VariableTracking(haystack="noise"),
    "two chains": VariableTracking(chains=2, example_tokens=0),
    "cwe": CommonWords(),
    "cwe without": CommonWords(repeats=(8, 2), example=False),
    "fwe": FrequentWords(),
}
WITH_DEPTH = [name for name, task in TASKS.items() if task.uses_depth]
