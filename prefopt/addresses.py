"""Where services may be, and the token they want. Nothing here opens a connection."""

from __future__ import annotations

import os
from ipaddress import ip_address, ip_network
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from prefopt.errors import ConfigError

METADATA: Final = tuple(map(ip_network, ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128")))
"""Where clouds keep the credentials of a machine."""


def _address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("write it as https://host/path")
    if parts.username or parts.password:
        raise ValueError("leave user and password out; `token` names an environment variable")
    try:
        host = ip_address(parts.hostname)
    except ValueError:
        return url
    if any(host in network for network in METADATA if network.version == host.version):
        raise ValueError("this address belongs to the machine's own network card, not to a service")
    return url


ServiceURL = Annotated[str, AfterValidator(_address)]
"""The address of a service, without a password in it."""
TokenName = Annotated[str, Field(pattern=r"^env:\w+$")]
"""The environment variable that holds a token, as `env:NAME`."""


def unencrypted(url: str) -> bool:
    """Whether what is sent there leaves this machine for everyone to read.

    >>> unencrypted("http://judge.example/"), unencrypted("http://127.0.0.1:8000/"), unencrypted("https://a.example/")
    (True, False, False)
    """
    host = urlsplit(url).hostname or ""
    try:
        here = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        here = False
    return url.startswith("http:") and not here


def secret(name: str, where: str) -> str:
    """The value of the variable that `env:NAME` names. Raises `ConfigError` when it is not set."""
    variable = name.removeprefix("env:")
    if not os.environ.get(variable):
        raise ConfigError(f"the environment variable {variable} is not set", where=where, fix=f"Set {variable}.")
    return os.environ[variable]
