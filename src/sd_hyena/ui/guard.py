"""Who may talk to the page: a browser on this machine that was sent here by nobody else.

The address is this machine's own, but any page that the browser has open may send requests to it, and a name that
resolves to it makes them look like this page's own (DNS rebinding). The headers tell.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from .settings import HOST

_NAMES = (HOST, "localhost")


class Guard:
    """ASGI middleware: answers 403 unless Host, and Origin where there is one, are this page's at ``port``."""

    def __init__(self, app: Callable[..., Awaitable[None]], port: int) -> None:
        self.app = app
        self.hosts = {f"{name}:{port}".encode() for name in _NAMES}
        self.origins = {b"http://" + host for host in self.hosts}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket") or self.admits(scope["headers"]):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"text/plain"), (b"content-length", b"9")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": b"not here\n"})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def admits(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether a request's headers, names in lower case, are those of the page itself."""
        hosts = [value for name, value in headers if name == b"host"]
        origins = [value for name, value in headers if name == b"origin"]
        return len(hosts) == 1 and hosts[0] in self.hosts and all(origin in self.origins for origin in origins)
