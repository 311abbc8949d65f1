"""Patterns and names of keys, tokens and passwords: those of detect-secrets, and further ones."""

import importlib
import logging
import re
import warnings
from base64 import b64decode
from functools import cache

HIDDEN = "[hidden]"

PLUGINS = (
    *("aws", "azure_storage_key", "discord", "github_token", "gitlab_token", "mailchimp", "npm", "openai"),
    *("pypi_token", "sendgrid", "slack", "square_oauth", "stripe", "telegram_token", "twilio"),
)
"""Plugins of detect-secrets that recognise a key by its prefix and length."""

SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<=://)[^/\s@'\"]+(?=@)"  # http://user:password@host
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"  # a JSON web token; detect-secrets' pattern leaves its signature
    r"|(?<=(?i:bearer) )[\w.~+/=-]{8,}"
    r"|\b(?:hf_|gsk_|xai-|pplx-|r8_|fw_|csk-|sk_|dapi)[A-Za-z0-9]{16,}"
    r"|\b(?:sk-|nvapi-|glpat-|xapp-|xox[a-z]-|lsv2_[a-z]{2}_|tgp_v1_|ya29\.)[\w-]{16,}"
    r"|\b(?:github_pat_|gh[pousr]_)\w{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}|\bAIza[\w-]{30,}"
)
"""Credentials in addresses, PEM blocks and headers, and keys of Hugging Face, Groq, xAI, Perplexity, Replicate,
Fireworks, Cerebras, ElevenLabs, Databricks, OpenAI, Anthropic, NVIDIA, GitLab, Slack, LangSmith, Together, GitHub, AWS
and Google."""

COOKIES = re.compile(
    r"""(?P<name>cookie2?(?:\\?["']?\s{0,3}(?:=>|[:=])\s{0,3}b?)|--[\w.-]*cookie2? +)"""
    r"""(?:(?P<quote>["'])(?:\\.|(?!(?P=quote))[^\\\n])*|[^\n]+)""",
    re.IGNORECASE,
)
"""A cookie header, up to its closing quote or the end of the line."""

BASIC = re.compile(r"(?<=\bbasic )[A-Za-z0-9+/_-]{6,}={0,2}", re.IGNORECASE)
"""Basic authorization: base64 of name:password."""

NAME = re.compile(
    r"(?:^|_)(?:(?:api|access|secret|private|account|subscription|auth|encryption|signing|master|session|shared|ssh)_?key"
    r"|auth|authorization|bearer|credentials?|cookie|passphrase|passwd|password|pwd|secret|token)$"
)
ORDINARY = re.compile(r"(?:bos|eos|pad|unk|sep|cls|mask|image|special|start|end|stop|next|first|last|new)_token$")
"""Names of the vocabulary's special tokens, which are no secrets."""
IN_ADDRESSES = {"key", "sig", "signature", "code"}

NAMED = re.compile(
    r"""(?P<name>(?:[?&]|(?<![\w.-]))[\w.-]*(?:key|auth|authorization|bearer|credentials?|cookie|passphrase|passwd|password|pwd"""
    r"""|secret|token|sig|signature|code))"""
    r"""(?:(?P<between>(?:\[\d+\])?\\?["']?\s{0,3}(?:=>|[:=])\s{0,3}b?)"""
    r"""(?P<value>"[^"\n]*"|'[^'\n]*'|\\"[^"\n]*\\"|"""
    r"""(?:(?:basic|bearer|token|digest) )?[^\s"'`,;&<>(){}\[\]\\]{1,2000})"""
    r"""|(?P<space> +)(?P<given>[^\s-]\S{0,2000}))""",
    re.IGNORECASE,
)
"""``name: value``, ``name=value``, ``'name': 'value'``, and the option ``--name value``."""
NO_VALUE = {"", "true", "false", "none", "null", "..."}


def is_secret_name(name: str) -> bool:
    """Whether a setting, header, parameter or variable of this name holds a credential.

    >>> [is_secret_name(name) for name in ("X-Api-Key", "logger.apiKey", "key_variable", "pad_token")]
    [True, True, False, False]
    """
    last = re.sub(r"\[\d+\]$", "", name).rpartition(".")[2].strip("?&-")
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", last).replace("-", "_").lower()
    return bool(NAME.search(plain)) and not ORDINARY.search(plain)


def without_secrets(text: str) -> str:
    """Hide in ``text`` what looks like a credential or has the name of one."""
    text = COOKIES.sub(rf"\g<name>\g<quote>{HIDDEN}", text)
    text = BASIC.sub(_basic, SHAPES.sub(HIDDEN, text))
    for pattern in _library_patterns():
        text = pattern.sub(HIDDEN, text)
    return _without_named(text)


@cache
def _library_patterns() -> list[re.Pattern[str]]:
    shown = warnings.showwarning
    from detect_secrets.plugins.base import RegexBasedDetector

    if warnings.showwarning is not shown:
        logging.captureWarnings(False)  # its log module captures warnings, which would then not be shown
    modules = [importlib.import_module(f"detect_secrets.plugins.{name}") for name in PLUGINS]
    detectors = {kind.__module__: kind for kind in RegexBasedDetector.__subclasses__()}
    return [pattern for module in modules for pattern in detectors[module.__name__]().denylist]


def _basic(match: re.Match[str]) -> str:
    try:
        decoded = b64decode(
            match[0] + "=" * (-len(match[0].rstrip("=")) % 4), altchars=b"-_" if "-" in match[0] else None
        )
        return HIDDEN if b":" in decoded and decoded.decode().isprintable() else match[0]
    except ValueError:
        return match[0]


def _without_named(text: str) -> str:
    kept, done, place = [], 0, 0
    while match := NAMED.search(text, place):
        group = "value" if match["value"] else "given"
        name, bare = match["name"], match[group].strip("\\\"'")
        place = match.start(group)
        secret = is_secret_name(name) and (group == "value" or name.startswith("--"))
        parameter = name[0] in "?&" and name.lower().rpartition("-")[2].strip("?&") in IN_ADDRESSES
        if (secret or parameter) and bare.lower().rstrip(".") not in NO_VALUE:
            start = text.index(bare, place)
            kept += [text[done:start], HIDDEN]
            done = place = start + len(bare)
    return "".join([*kept, text[done:]])
