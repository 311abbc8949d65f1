"""Keys, tokens and passwords: found in settings, so that none is saved, and blotted out of messages."""

import logging
import os
import re
import sys
import traceback
import warnings
from functools import wraps
from inspect import unwrap
from types import TracebackType
from typing import Any

HIDDEN = "[hidden]"
SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
SECRET_SETTING = re.compile(
    r"(^|_)(api_?key|access_key|auth|bearer|hf_token|token|secret|password|passwd)$", re.IGNORECASE
)
SHAPES = re.compile(
    r"(?<=://)[^/\s@'\"]+(?=@)"  # http://user:password@host
    r"|(?<=[?&](?:sig|key)=)[^&\s'\"]+|(?<=[?&]token=)[^&\s'\"]+|(?<=[?&]api_key=)[^&\s'\"]+"
    r"|(?<=[?&]X-Amz-Signature=)[^&\s'\"]+|(?<=[Bb]earer )[\w.~+/=-]{8,}"
    r"|\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}|AIza[\w-]{30,})"
)
"""How credentials look in addresses and headers, and the beginnings of those of Hugging Face, OpenAI, GitHub, AWS and
Google."""
SHORTEST = 8
"""A variable's value with fewer characters is no key, and may be part of any word."""


def redacted(text: str) -> str:
    """``text`` without what looks like a credential, and without the secrets that this process's environment holds.

    >>> redacted("no answer from https://me:pa55word@host/v1?token=abc")
    'no answer from https://[hidden]@host/v1?token=[hidden]'
    """
    for secret in _environment_secrets():
        text = text.replace(secret, HIDDEN)
    return SHAPES.sub(HIDDEN, text)


def check_no_secret(key: str, text: str) -> None:
    """Raise ``ValueError`` if the setting ``key`` holds a credential: configurations are saved, also in checkpoints."""
    name = key.rpartition(".")[2]
    if (text and SECRET_SETTING.search(name)) or redacted(text) != text:
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
    found = {value.strip() for name, value in os.environ.items() if SECRET_VARIABLE.search(name.upper())}
    return sorted((value for value in found if len(value) >= SHORTEST), key=len, reverse=True)


__all__ = ["check_no_secret", "redact_output", "redacted"]
