"""Addresses of hosted models: their check, and the part that may be shown."""

import ipaddress
import re

import httpx

from sparsekv_pl.reporting.redaction import check_no_secret


def is_loopback(base_url: str) -> bool:
    """Whether requests to ``base_url`` stay on this machine."""
    host = httpx.URL(base_url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(base_url: str) -> str:
    """``scheme://host:port`` without the path, which may hold a key of any shape."""
    address = httpx.URL(base_url)
    return f"{address.scheme}://{address.netloc.decode()}"


def check_address(base_url: str) -> None:
    """Raise ``ValueError`` unless ``base_url`` is a plain web address. The message hides it: it may hold a key."""
    try:
        address = httpx.URL(base_url)
        plain = re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#]*)?", base_url) and 0 < (address.port or 80) < 2**16
    except (httpx.InvalidURL, ValueError):  # ValueError: a host that is no domain name
        plain = False
    if not plain:
        raise ValueError(
            "hosted.base_url must be http(s)://host[:port]/path, without credentials, ? or #; "
            "a key belongs in the environment variable that hosted.key_variable names"
        )
    check_no_secret("hosted.base_url", base_url)
