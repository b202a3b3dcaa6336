"""Whether the model hub answers. Without a network its client tries for half a minute; one question tells sooner."""

from __future__ import annotations

import socket
import threading
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

# Seconds for a connection, name resolution among them.
_PATIENCE_S = 2.5

_PORTS = {"http": 80, "https": 443}


def is_hub_reachable() -> bool:
    """Whether somebody listens where the hub is, or where the proxy is that leads to it."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []
    listener = _next_hop(constants.ENDPOINT)
    # Name resolution knows no time limit, so somebody else waits for it.
    asking = threading.Thread(target=lambda: answers.append(_listens(listener)), daemon=True)
    asking.start()
    asking.join(_PATIENCE_S)
    return bool(answers) and answers[0]


def _next_hop(endpoint: str) -> SplitResult:
    """The hub, or the proxy that the environment names for it."""
    hub = urlsplit(endpoint)
    if hub.hostname and proxy_bypass(hub.hostname):
        return hub
    proxies = getproxies()
    proxy = proxies.get(hub.scheme) or proxies.get("all")
    if not proxy:
        return hub
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")


def _listens(at: SplitResult) -> bool:
    port = at.port or _PORTS.get(at.scheme)
    if not at.hostname or not port:
        # Nothing that we could ask; let the hub's client try.
        return True
    try:
        socket.create_connection((at.hostname, port), timeout=_PATIENCE_S).close()
    except OSError:
        return False
    return True
