"""The command line of ``python -m sparsekv_pl.ask``. It imports nothing heavy, so that --help is there at once."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsekv_pl.cli.model_arguments import LineParser, add_eviction, add_model, check_eviction

DESCRIPTION = """\
Read a document once, throw most of its KV cache away, and ask it any number of questions.
The answers go to stdout as they arrive, everything else to stderr."""

EXAMPLES = """\
examples:
  python -m sparsekv_pl.ask README.md "What is a press?" --press KeyDiff --compression_ratio 0.75
  python -m sparsekv_pl.ask README.md --adapter adapters/smollm2-135m-instruct --press KeyDiff \\
      --compression_ratio 0.75 --save readme.safetensors
  python -m sparsekv_pl.ask readme.safetensors --adapter adapters/smollm2-135m-instruct < questions.txt

Without questions they are read line by line from stdin; an empty line or Ctrl-D ends a dialogue.
A press is written as in reports, with its settings: KeyDiff, "SnapKV(window_size=32)", "KeyRerotation(KeyDiff)".
KeyDiff, Knorm and LagKV need keys alone; KeyRerotation also lets a document be longer than the model's positions.
A saved cache belongs to the model and adapter that made it; give the same ones when you ask it."""


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments ``given``, by default the process's."""
    parser = LineParser(
        prog="python -m sparsekv_pl.ask",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("document", metavar="DOCUMENT", help="a text file, - for stdin, or a cache that --save wrote (.safetensors)")
    add("questions", metavar="QUESTION", nargs="*", help="questions about it, each from the untouched cache")

    add_model(parser)
    add_eviction(parser, "eviction, for a text")
    group = parser.add_argument_group("storage, for a text")
    group.add_argument("--bits", type=int, choices=[8, 4, 2], help="of each kept number; default: the model's own")

    group = parser.add_argument_group("more text")
    more: dict[str, Any] = {"metavar": "FILE", "action": "append", "default": []}
    group.add_argument("--append", **more, help="read a text behind the document and evict again; may be repeated")
    group.add_argument("--merge", **more, help="put another text's or cache's pairs behind; may be repeated")
    group.add_argument("--save", metavar="FILE", help="write the cache, evicted, to a .safetensors file")

    group = parser.add_argument_group("answers")
    group.add_argument("--max_new_tokens", metavar="N", type=int, default=64, help="most tokens of an answer (64)")
    group.add_argument("--stop", metavar="TEXT", action="append", default=[], help="ends an answer; may be repeated")
    group.add_argument("--together", action="store_true", help="answer all questions as one batch, without streaming")
    group.add_argument("--temperature", metavar="T", type=float, help="sample at this temperature; default: greedy")
    group.add_argument("--top_p", metavar="P", type=float, help="sample from the most likely tokens of this share")
    group.add_argument("--seed", metavar="N", type=int, default=0, help="of sampling (0)")
    return _checked(parser, parser.parse_args(given))


def _checked(parser: LineParser, asked: argparse.Namespace) -> argparse.Namespace:
    """Refuse, before anything is imported or loaded, what cannot go together."""
    evicts = ("press", "compression_ratio", "budget", "chunk_tokens", "bits")
    given = [f"--{name}" for name in evicts if getattr(asked, name) is not None]
    if asked.document.endswith(".safetensors") and given:
        parser.error(f"{asked.document} is evicted already: leave {', '.join(given)} out")
    check_eviction(parser, asked)
    for name in asked.append:
        if name.endswith(".safetensors"):
            parser.error(f"--append {name}: only a text can be read behind the document; --merge takes caches")
    if "" in asked.stop:
        parser.error("--stop is empty, which would end every answer at once: leave it out")
    if asked.document == "-" and not asked.questions and not asked.save:
        parser.error("the document comes from stdin, so give questions on the command line, or --save")
    if asked.save is not None and not asked.save.endswith(".safetensors"):
        parser.error(f"--save {asked.save}: a cache is a .safetensors file")
    if asked.save is not None and (refusing := _unwritable(Path(asked.save).expanduser())):
        parser.error(f"--save {asked.save}: {refusing} cannot be written: give another place")
    if asked.temperature is not None and not 0 < asked.temperature < float("inf"):
        parser.error(
            f"--temperature {asked.temperature} must be a number above 0; leave it out for the most likely answer"
        )
    if asked.top_p is not None and not 0 < asked.top_p <= 1:
        parser.error(f"--top_p {asked.top_p} must lie above 0 and at most at 1")
    if asked.together and (asked.temperature is not None or asked.top_p is not None):
        parser.error("--together answers greedily: leave --temperature and --top_p out")
    if asked.max_new_tokens < 1:
        parser.error(f"--max_new_tokens {asked.max_new_tokens} must be at least 1")
    return asked


def _unwritable(path: Path) -> Path | None:
    """Return the existing part of ``path`` that keeps a file from being written there; None if nothing does."""
    place, *_ = (part for part in (path.absolute(), *path.absolute().parents) if part.exists())
    fits = place.is_dir() != (place == path.absolute())
    return None if fits and os.access(place, os.W_OK) else place
