"""uvicorn, with a port that is taken before the model is loaded, and a plain line when it is asked to stop."""

import os
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from sparsekv_pl.serve.turns import ModelTurns


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, which does not listen yet.

    Raises ``ValueError`` if the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ValueError(
            f"--host {host} --port {port}: {error.strerror or error}: give another --port, or 0 for a free one"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """Return the address for clients."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


class DrainingServer(uvicorn.Server):
    """Runs the application until a signal; then takes no more requests, and ends when those under way have.

    Parameters
    ----------
    app
        The application.
    turns
        Its requests, for the line that says what is waited for.
    drain_seconds
        Most seconds that are waited; then requests are cancelled.
    """

    def __init__(self, app: FastAPI, turns: ModelTurns, drain_seconds: int) -> None:
        super().__init__(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=drain_seconds)
        )
        self.turns = turns

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Begin to stop. uvicorn would raise the signal again at the end, and a drained server ends well."""
        self.should_exit = True
        count = len(self.turns)
        what = f"finishing {count} request{'s' * (count != 1)}; a second one stops at once" if count else "stopping"
        line = f"{signal.Signals(sig).name}: {what}\n"
        os.write(2, line.encode())  # not print: the signal may have interrupted one
