"""Serve a model with evicted documents: ``python -m sparsekv_pl.serve --help``."""

import sys
from argparse import Namespace

from sparsekv_pl.serve.serve_arguments import parsed


def main(asked: Namespace) -> None:
    """Take the port, load the model, and serve until a signal."""
    from sparsekv_pl.serve.building import built
    from sparsekv_pl.serve.draining_server import DrainingServer, address_of, bound_socket

    with bound_socket(asked.host, asked.port) as bound:
        served, turns, app = built(asked)
        try:
            bound.listen()  # whoever reads the address may connect
            print(f"{served.name} ({served.documents.origin}) at {address_of(bound)}", file=sys.stderr, flush=True)
            DrainingServer(app, turns, asked.drain_seconds).run([bound])
        finally:
            turns.close()


if __name__ == "__main__":
    given = parsed()

    from sparsekv_pl.cli.command_line import run

    run(lambda: main(given))
