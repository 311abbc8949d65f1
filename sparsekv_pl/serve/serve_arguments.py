"""The command line of ``python -m sparsekv_pl.serve``. It imports nothing heavy, so that --help is there at once."""

import argparse
import os
from collections.abc import Sequence
from importlib.util import find_spec

from sparsekv_pl.cli.model_arguments import LineParser, add_eviction, add_model, check_eviction

DESCRIPTION = """\
Serve a model over HTTP as OpenAI does, with documents evicted by a press: one that is sent again with another question
is not read again. The document is what stands before the last paragraph of the first user's message."""

EXAMPLES = """\
examples:
  python -m sparsekv_pl.serve --press KeyDiff --compression_ratio 0.75 --adapter adapters/smollm2-135m-instruct
  python -m sparsekv_pl.serve --press "KeyRerotation(KeyDiff)" --compression_ratio 0.75 --max_prompt_tokens 30000

Then: OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"). Ctrl-C or SIGTERM lets requests under way end;
a second one stops at once. Without --api_key nobody is asked for a key: --host 0.0.0.0 then opens the server to all."""

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
"""Packages of the extra ``serve``."""


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments ``given``, by default the process's."""
    parser = LineParser(
        prog="python -m sparsekv_pl.serve",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add_eviction(parser, "eviction, for documents")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    group.add_argument("--port", type=int, default=8000, help="8000; 0 takes a free one, which is printed")
    group.add_argument("--name", help="the model's name at the endpoint; default: that of --pretrained")
    group.add_argument(
        "--api_key",
        metavar="VARIABLE",
        help="name of the environment variable with the key that clients must send; default: none is asked for",
    )
    group.add_argument(
        "--document",
        metavar="FILE",
        action="append",
        default=[],
        help="keep a document's cache that sparsekv_pl.ask --save wrote from the beginning; may be repeated",
    )
    group = parser.add_argument_group("limits")
    group.add_argument("--max_requests", metavar="N", type=int, default=8, help="that run or wait at a time (8)")
    group.add_argument(
        "--max_prompt_tokens", metavar="N", type=int, help="of document and question; default: the model's positions"
    )
    group.add_argument("--max_new_tokens", metavar="N", type=int, default=512, help="of an answer (512)")
    group.add_argument("--kept_mib", metavar="MIB", type=float, default=1024, help="of documents' caches (1024)")
    group.add_argument(
        "--drain_seconds", metavar="S", type=int, default=60, help="that requests under way have to end (60)"
    )
    return _checked(parser, parser.parse_args(given))


def _checked(parser: LineParser, asked: argparse.Namespace) -> argparse.Namespace:
    """Refuse, before anything is imported or loaded, what cannot be."""
    check_eviction(parser, asked)
    for name in ("max_requests", "max_new_tokens", "max_prompt_tokens", "drain_seconds"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    if not 0 <= asked.kept_mib < float("inf"):
        parser.error(f"--kept_mib {asked.kept_mib} must be a number of 0 or more")
    if not 0 <= asked.port < 65536:
        parser.error(f"--port {asked.port} must be 0 to 65535")
    if asked.api_key is not None and not os.environ.get(asked.api_key, "").strip():
        # What was given is not shown: it may be the key itself.
        parser.error("--api_key names an environment variable that holds the key, and that one is not set: export it")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} is not installed: pip install --constraint constraints.txt '.[serve]'")
    return asked
