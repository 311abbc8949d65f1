"""Where a hosted model is: addresses that can be asked, and what of them may be shown."""

import ipaddress
from urllib.parse import urlsplit

from sparsekv_pl.redaction import check_no_secret


def is_loopback(base_url: str) -> bool:
    """Whether requests to it stay on this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(base_url: str) -> str:
    """scheme://host:port: a gateway's path may hold a key of any shape."""
    address = urlsplit(base_url)
    return f"{address.scheme}://{address.netloc}"


def check_address(base_url: str) -> None:
    """Raise ``ValueError`` for what is no plain web address; it is not shown, for it may hold a key."""
    try:
        address = urlsplit(base_url)
        plain = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:
        plain = False
    if not plain or address.username or address.password or address.query or address.fragment:
        raise ValueError(
            "hosted.base_url must be http(s)://host[:port]/path, without credentials, ? or #; "
            "a key belongs in the environment variable that hosted.key_variable names"
        )
    check_no_secret("hosted.base_url", base_url)
