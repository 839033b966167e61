"""Server of the page of ``gpt2-pl demo``: only the requests of the page pass, and no file is served."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

import uvicorn

from gpt2_pl.errors import InputError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

FIRST_PORT = 7860
_TRIED_PORTS = 100
_MAX_BODY = 1 << 22  # bytes of a request
_PATHS = {  # what the page requests; the files are Gradio's own scripts, styles and pictures
    "GET": re.compile(
        r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/[\w./@-]+|"
        r"/gradio_api/(startup-events|app_id|info|queue/data|heartbeat/\w+)/?"
    ),
    "HEAD": re.compile(r"/"),
    "POST": re.compile(r"/gradio_api/(queue/join|cancel|reset)/?"),
}
_POLICY = (  # of the browser: scripts, styles, pictures and requests of this server alone
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Application that passes on only the requests that the page needs.

    Gradio also has routes for uploads, files, proxies, and more. Behind this application they do not exist. With names
    of hosts, a request for another one is refused, so that a site of another name that resolves to this machine cannot
    use the model (DNS rebinding).

    Args:
        application: the application of the page.
        hosts: names of this server; None for any.
    """

    def __init__(self, application: Application, hosts: Collection[str] | None) -> None:
        self.application, self.hosts = application, hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self.application(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
        paths = _PATHS.get(scope["method"])
        if not self._is_own(headers.get(b"host", "")):
            await _refuse(send, 403, "this server has another name")
        elif paths is None or not paths.fullmatch(scope["path"]) or ".." in scope["path"]:
            await _refuse(send, 404, "there is no such page")
        elif (body := await _body(headers, receive)) is None:
            await _refuse(send, 413, f"a request must have at most {_MAX_BODY:,} bytes")
        else:
            await self.application(scope, _replay(body, receive), _with_headers(send))

    def _is_own(self, host: str) -> bool:
        """Return whether a request is for this server."""
        return self.hosts is None or re.sub(r":\d+$", "", host).strip("[]").lower() in self.hosts


async def _body(headers: dict[bytes, str], receive: Receive) -> bytes | None:
    """Return the body of a request, or None if it is too long."""
    length = headers.get(b"content-length", "0")
    if not length.isdecimal() or int(length[:20]) > _MAX_BODY:
        return None
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message["type"] == "http.request" and message.get("more_body", False)
        if len(body) > _MAX_BODY:
            return None
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a function that receives a body that has been read, and then what follows it."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


def _with_headers(send: Send) -> Send:
    """Return a function that sends a response with the headers of this server."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *_HEADERS]
        await send(message)

    return sent


async def _refuse(send: Send, status: int, sentence: str) -> None:
    """Send a sentence and the status of an error."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": sentence.encode()})


def listen(host: str, port: int | None) -> socket.socket:
    """Open the socket of the server.

    Args:
        host: address or name of this machine.
        port: the port; 0 for any, None for the first free one from 7860.

    Raises:
        InputError: the host does not belong to this machine, or the port is in use.
    """
    ports = range(FIRST_PORT, FIRST_PORT + _TRIED_PORTS) if port is None else [port]
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(key="host", value=host, expected=f"an address of this machine ({error.strerror})") from None
    reason = ""
    for number in ports:
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((address[0], number, *address[2:]))
            found.listen(128)
        except OSError as error:
            found.close()
            reason = error.strerror or str(error)
            continue
        return found
    key, value = ("port", ports[-1]) if port is not None else ("host", host)
    raise InputError(f"{key} {value}: the server cannot listen there: {reason}", key=key, value=value)


class Server(uvicorn.Server):
    """Server of the page.

    Args:
        application: the application of the page.
        host: address or name of this machine.
        on_start: is called when the page can be requested.
    """

    def __init__(self, application: Application, host: str, on_start: Callable[[], object]) -> None:
        names = {"localhost", "127.0.0.1", "::1", host.strip("[]").lower()} if is_loopback(host) else None
        guard: Any = Guard(application, names)
        super().__init__(uvicorn.Config(guard, log_level="warning", access_log=False, ws="none", lifespan="on",
                                        timeout_graceful_shutdown=1, proxy_headers=True))  # fmt: skip
        self.on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to serve."""
        await super().startup(sockets)
        if self.started:
            self.on_start()


def serve(application: Application, host: str, opened: socket.socket, on_start: Callable[[], object]) -> None:
    """Serve a page until Ctrl-C.

    Args:
        application: the application of the page.
        host: address or name of this machine.
        opened: socket that :func:`listen` has opened.
        on_start: is called when the page can be requested.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    server = Server(application, host, on_start)
    server.run(sockets=[opened])
