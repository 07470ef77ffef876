"""The page of blind votes, on this machine alone.

Only this address can be asked (127.0.0.1), by its own name (a page elsewhere cannot make a name of its own point here),
and only who has the token that is in the printed address behind the #, which browsers do not send: the page puts it
into a header. Videos are named by number and side, so no path is ever taken from a request.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jinja2
from pydantic import ValidationError

from lingen.errors import UserError
from lingen.evaluation.votes import Pair, VoteFile

ADDRESS = "127.0.0.1"
MOST_BYTES = 4096  # of a vote
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; media-src blob:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class VoteServer(ThreadingHTTPServer):
    """Serves until it is shut down; ``url`` is for the browser, and holds the token."""

    daemon_threads = True

    def __init__(self, found: list[Pair], votes: VoteFile, *, port: int, question: str) -> None:
        """``port`` 0 takes any that is free.

        Raises:
            UserError: the port is taken, or not ours to take.
        """
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise UserError(f"port={port} cannot be opened: {error.strerror}; give another, or 0 for any") from error
        self.pairs, self.votes = {pair.video: pair for pair in found}, votes
        self.token = secrets.token_urlsafe(24)
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}
        self.url = f"http://{ADDRESS}:{self.server_port}/#{self.token}"
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
        )
        file = found[0].left.file
        self.page = environment.get_template("vote.html.j2").render(
            question=question, aspect=f"{file.width} / {file.height}", small=max(file.height, file.width) <= 128
        )

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of a video is nothing to report."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: VoteServer
    server_version, sys_version = "votes", ""
    timeout = 30

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, make: Any) -> None:
        try:
            self._check_origin()
            kind, content = make()
            status = HTTPStatus.OK
        except _Refused as error:
            status, kind, content = error.status, "application/json", json.dumps({"error": str(error)}).encode()
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _check_origin(self) -> None:
        host = self.headers.get("Host", "")
        if host not in self.server.hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, "this server has another name")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            raise _Refused(HTTPStatus.FORBIDDEN, "the request comes from another page")

    def _check_token(self) -> None:
        given = self.headers.get("X-Token", "")
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN, "open the address that vote.py has printed, to its end")

    def _get(self) -> tuple[str, bytes]:
        url = urlsplit(self.path)
        if url.path == "/":
            return "text/html; charset=utf-8", self.server.page.encode()
        self._check_token()
        if url.path == "/pairs":
            voter = parse_qs(url.query).get("voter", [""])[0]
            done = self.server.votes.voted(voter)
            shown = [{"video": n, "prompt": _prompt(pair), "done": n in done} for n, pair in self.server.pairs.items()]
            return "application/json", json.dumps(shown).encode()
        asked = re.fullmatch(r"/video/(\d{1,9})/(left|right)", url.path)
        pair = self.server.pairs.get(int(asked[1])) if asked else None
        if asked is None or pair is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such thing here")
        try:
            return "video/mp4", (pair.left if asked[2] == "left" else pair.right).mp4(pair.video)
        except UserError as error:
            raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "the video cannot be read") from error

    def _post(self) -> tuple[str, bytes]:
        self._check_token()
        length = self.headers.get("Content-Length", "")
        if self.path != "/vote" or not length.isdecimal() or int(length) > MOST_BYTES:
            raise _Refused(HTTPStatus.BAD_REQUEST, "this is no vote")
        try:
            vote = json.loads(self.rfile.read(int(length)))
            self.server.votes.add(**{key: vote[key] for key in ("voter", "video", "choice", "seconds")})
        except (ValueError, TypeError, KeyError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "this is no vote"
            raise _Refused(HTTPStatus.BAD_REQUEST, why) from error
        except OSError as error:
            why = f"the vote was not written: {error.strerror or error}"
            raise _Refused(HTTPStatus.INSUFFICIENT_STORAGE, why) from error
        return "application/json", b"{}"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: votes are in their file."""


def _prompt(pair: Pair) -> str:
    return pair.left.file.videos[pair.video].prompt
