"""The key that clients must send: read from the environment, compared in constant time, and never shown."""

import os
import secrets
from collections.abc import Mapping

from fastapi.security.utils import get_authorization_scheme_param

from sparsekv_pl.serve.refusals import Refusal

GUARDED = "/v1"
"""Beginning of the paths that ask for the key; /health and /metrics are for the machine's own watchers."""


class ApiKey:
    """A server's key.

    Parameters
    ----------
    variable
        The environment variable that holds it; it is read once, here.
    """

    def __init__(self, variable: str) -> None:
        self._key = os.environ[variable].strip().encode()

    def refusal(self, path: str, headers: Mapping[bytes, bytes]) -> Refusal | None:
        """Return why a request to ``path`` with ``headers`` is not answered; None if it may be."""
        if not (path == GUARDED or path.startswith(f"{GUARDED}/")):
            return None
        scheme, given = get_authorization_scheme_param(headers.get(b"authorization", b"").decode("latin-1"))
        if scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode("latin-1"), self._key):
            return None
        what = "is not this server's" if given else "is missing"
        return Refusal(
            f"the API key {what}: send it as the header 'Authorization: Bearer KEY' (api_key of OpenAI's clients)",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
