"""Keys, tokens and passwords: found in settings, so that none is saved, and blotted out of messages."""

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
"""A variable's value with fewer characters is no key, and may be part of any word."""


def redacted(text: str) -> str:
    """``text`` without what looks like a credential, and without the secrets that this process's environment holds.

    >>> redacted("no answer from https://me:pa55word@host/v1?token=abc")
    'no answer from https://[hidden]@host/v1?token=[hidden]'
    """
    for secret in _environment_secrets():
        text = text.replace(secret, HIDDEN)
    return without_secrets(text)


def check_no_secret(key: str, text: str) -> None:
    """Raise ``ValueError`` if the setting ``key`` holds a credential: configurations are saved, also in checkpoints.

    So is an address of which the part was hidden that was no one else's business.
    """
    if HIDDEN in text and text.startswith(("http://", "https://")):
        raise ValueError(f"{key}={text}: a part was hidden when this configuration was saved; give the whole address")
    if (text and is_secret_name(key)) or redacted(text) != text:
        raise ValueError(
            f"{key} holds a key, token or password (not shown), and configurations are saved with what they make: "
            "put it in the environment, where its library looks for it (HF_TOKEN, WANDB_API_KEY, ...)"
        )


class RedactedRecord(logging.LogRecord):
    """A log record whose message shows no credential."""

    def getMessage(self) -> str:
        """The message, blotted."""
        return redacted(super().getMessage())


def redact_output() -> None:
    """Blot credentials out of whatever this process logs from now on, warns of, or ends with."""
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
    """Longest first, so that no part of one is left over by another."""
    found = {value.strip() for name, value in os.environ.items() if _holds_secret(name)}
    return sorted((value for value in found if len(value) >= SHORTEST), key=len, reverse=True)


def _holds_secret(variable: str) -> bool:
    if variable in ("PWD", "OLDPWD"):  # where the shell is
        return False
    return is_secret_name(variable.lower()) or variable.upper().endswith(("KEY", "TOKEN", "SECRET"))


__all__ = ["check_no_secret", "redact_output", "redacted"]
