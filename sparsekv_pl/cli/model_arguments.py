"""Arguments of ``sparsekv_pl.ask`` and ``sparsekv_pl.serve`` that choose model and eviction; imports nothing heavy."""

import argparse
from typing import NoReturn


class LineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print ``message`` and the way to help, and exit with code 2."""
        self.exit(2, f"error: {message} ({self.prog} --help)\n")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add what chooses the model and its adapter."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained",
        metavar="MODEL",
        default="smollm2-135m-instruct",
        help="the embedded model (default), a hub id, a folder or a .gguf file",
    )
    group.add_argument("--revision", help="git revision of a hub model")
    group.add_argument("--adapter", metavar="FOLDER", help="a trained adapter, such as adapters/smollm2-135m-instruct")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    group.add_argument("--dtype", default="auto", choices=dtypes, help="of the weights; auto: what is native here")
    group.add_argument("--load_in_4bit", action="store_true", help="quantise the weights to 4 bits (NF4)")


def add_eviction(parser: argparse.ArgumentParser, title: str) -> None:
    """Add what chooses the press, under the heading ``title``."""
    group = parser.add_argument_group(title)
    group.add_argument("--press", help="what selects the pairs that stay; without one all stay")
    group.add_argument("--compression_ratio", metavar="R", type=float, help="share of pairs that is removed, 0 to 1")
    group.add_argument("--budget", metavar="TOKENS", type=int, help="most pairs a head that stay")
    group.add_argument("--chunk_tokens", metavar="TOKENS", type=int, help="read in chunks and evict after each")


def check_eviction(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    """Refuse a ratio or a budget without a press."""
    if asked.press is None and (asked.compression_ratio is not None or asked.budget is not None):
        parser.error("--compression_ratio and --budget need a --press, such as KeyDiff")
