"""Read a document under a press, ask it, keep it: ``python -m sparsekv_pl.ask --help``."""

import sys
from argparse import Namespace
from pathlib import Path

from sparsekv_pl.ask.arguments import parsed


def main(asked: Namespace) -> None:
    """Make or load the cache, show its bytes, save it, and answer the questions."""
    from sparsekv_pl.ask.dialogue import answer_all, say
    from sparsekv_pl.ask.reading import cache_for

    cache = cache_for(asked)
    planned = cache.plan()
    whole = " with whole pairs" * (cache.origin.quantisation is not None)
    say(
        f"{cache.tokens:,} tokens read, {cache.kept_pairs:,.0f} pairs a head kept ({cache.origin}): "
        f"{_mib(cache.kv_bytes)}, planned{whole} {_mib(planned.kv_bytes_kept)}, without eviction "
        f"{_mib(planned.kv_bytes_full)}"
    )
    if asked.save is not None:
        cache.save(asked.save)
        say(f"saved: {asked.save}, {_mib(Path(asked.save).expanduser().stat().st_size)}")
        if not asked.questions and sys.stdin.isatty():
            return
    answer_all(cache, asked)


def _mib(size: float) -> str:
    return f"{size / 2**20:,.2f} MiB"


if __name__ == "__main__":
    given = parsed()

    from sparsekv_pl.cli.command_line import run

    run(lambda: main(given))
