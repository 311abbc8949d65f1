"""Keeping keys, tokens and passwords out of saved settings and out of messages."""

import logging
import os
import sys
import traceback
import warnings
from functools import wraps
from inspect import unwrap
from types import TracebackType
from typing import Any

from sparsekv_pl.reporting.secret_shapes import HIDDEN, is_secret_name, without_secrets

SHORTEST = 8
"""Shorter values of environment variables are not treated as keys: they may be part of any word."""


def redacted(text: str) -> str:
    """Hide in ``text`` what looks like a credential, and the secrets in this process's environment.

    >>> redacted("no answer from https://me:pa55word@host/v1?token=abc")
    'no answer from https://[hidden]@host/v1?token=[hidden]'
    """
    for secret in _environment_secrets():
        text = text.replace(secret, HIDDEN)
    return without_secrets(text)


def check_no_secret(key: str, text: str) -> None:
    """Raise ``ValueError`` if the setting ``key`` holds a credential: configurations are saved, also in checkpoints.

    An address with a part that was hidden when a configuration was saved is refused too.
    """
    if HIDDEN in text and text.startswith(("http://", "https://")):
        raise ValueError(f"{key}={text}: a part was hidden when this configuration was saved; give the whole address")
    if (text and is_secret_name(key)) or redacted(text) != text:
        raise ValueError(
            f"{key} holds a key, token or password (not shown), and configurations are saved beside their results: "
            "put it in the environment, where its library looks for it (HF_TOKEN, WANDB_API_KEY, ...)"
        )


class RedactedRecord(logging.LogRecord):
    """A log record whose message shows no credential."""

    def getMessage(self) -> str:
        """The message, redacted."""
        return redacted(super().getMessage())


def redact_output() -> None:
    """From now on, hide credentials in this process's log records, warnings and final traceback."""
    form = unwrap(warnings.formatwarning)

    @wraps(form)
    def warning(*args: Any, **kwargs: Any) -> str:
        return redacted(form(*args, **kwargs))

    warnings.formatwarning = warning
    logging.setLogRecordFactory(RedactedRecord)
    sys.excepthook = _uncaught


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))


def _environment_secrets() -> list[str]:
    """Secrets of the environment, longest first: a shorter one may be part of a longer one."""
    found = {value.strip() for name, value in os.environ.items() if _holds_secret(name)}
    return sorted((value for value in found if len(value) >= SHORTEST), key=len, reverse=True)


def _holds_secret(variable: str) -> bool:
    if variable in ("PWD", "OLDPWD"):  # the shell's working directory
        return False
    return is_secret_name(variable.lower()) or variable.upper().endswith(("KEY", "TOKEN", "SECRET"))
