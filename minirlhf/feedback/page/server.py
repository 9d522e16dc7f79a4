"""The page's server: this machine alone, one address that holds a secret, texts as JSON.

Who may speak to it: the secret stands in the path and is compared in constant time; Host must be
this server's own, so that no other name leads here (DNS rebinding); whatever changes something must
come as JSON from this origin, so that no other page can send it. There are no cookies. Whatever is
not allowed gets the same answer as what is not there.

Left out: other machines (use ssh -L, or --terminal), TLS, several raters at once on one server.
"""

import hmac
import json
import secrets
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import atomic_write, parse_json

SCRIPTS = ("page", "gestures", "elements", "sorting", "words", "panels")
FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
} | {f"{name}.js": (f"{name}.js", "text/javascript; charset=utf-8") for name in SCRIPTS}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LARGEST = 2**20  # bytes of a request


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a connection may say nothing
    disable_nagle_algorithm = True

    def do_GET(self):
        self.handle_call(self.server.reads, needs_origin=False)

    def do_POST(self):
        self.handle_call(self.server.writes, needs_origin=True)

    def handle_call(self, calls, needs_origin):
        body = self.body()
        name = self.name() if body is not None and self.is_ours(needs_origin) else None
        if not needs_origin and name in FILES:
            file, kind = FILES[name]
            return self.send(200, kind, (Path(__file__).parent / file).read_bytes())
        if name not in calls:
            self.close_connection = True
            return self.send(404, "text/plain; charset=utf-8", b"not found\n")
        try:
            asked = parse_json(body, "the request") if needs_origin else {}
            if not isinstance(asked, dict):
                raise UserError("the request: expected an object")
            status, answer = 200, calls[name](asked)
        except UserError as e:
            status, answer = 400, {"error": str(e)}
        self.send(status, "application/json", json.dumps(answer).encode())

    def body(self):
        """The bytes of a request; None where there are too many, or nobody says how many."""
        length = self.headers.get("Content-Length", "0")
        if not (length.isascii() and length.isdigit()) or int(length) > LARGEST:
            return None
        return None if "Transfer-Encoding" in self.headers else self.rfile.read(int(length))

    def is_ours(self, needs_origin):
        """Whether a request is for this server and, where it changes something, from its page."""
        port = self.server.server_address[1]
        hosts = [f"127.0.0.1:{port}", f"localhost:{port}"]
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host not in hosts or (origin or f"http://{host}") != f"http://{host}":
            return False
        kind = self.headers.get("Content-Type", "")
        return not needs_origin or (origin is not None and kind == "application/json")

    def name(self):
        """What is asked for, behind the secret; None for another path."""
        secret, _, name = self.path.removeprefix("/").partition("/")
        given = secret.encode("utf-8", "replace")
        return name if hmac.compare_digest(given, self.server.secret.encode()) else None

    def send(self, status, kind, content):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def version_string(self):
        return "minirlhf"

    def log_message(self, *_):  # the path holds the secret
        pass


class Server(ThreadingHTTPServer):
    """Serves until `shutdown`. reads and writes: {name: function of a dict that gives a dict}."""

    daemon_threads = True

    def __init__(self, reads, writes, port, secret):
        self.reads, self.writes, self.secret = reads, writes, secret
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as e:
            raise UserError(f"--port {port}: {e.strerror}: give another one, or 0") from None

    def handle_error(self, request, client_address):
        """A browser that goes away in the middle of an answer is no mistake of ours."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}/{self.secret}/"


def start(reads, writes, port, remembered):
    """A Server on a port, 0 for any that is free.

    The secret and the port stay in the file `remembered`, which only its owner can read, so that a
    tab that is open goes on when the server has been ended and started again.
    """
    old_port, secret = recall(remembered)
    try:
        server = Server(reads, writes, port or old_port, secret)
    except UserError:
        if port or not old_port:
            raise
        server = Server(reads, writes, 0, secret)
    with atomic_write(remembered) as tmp:
        tmp.touch(mode=0o600)
        tmp.write_text(json.dumps({"port": server.server_address[1], "secret": secret}))
    return server


def recall(remembered):
    """(port, secret) of the file; (0, a new secret) where it is missing or says something else."""
    try:
        found = json.loads(Path(remembered).read_text(encoding="utf-8"))
        port, secret = found["port"], found["secret"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0, secrets.token_urlsafe(32)
    known = type(port) is int and 0 < port < 2**16 and isinstance(secret, str)
    known = known and len(secret) == 43 and secret.replace("-", "").replace("_", "").isalnum()
    return (port, secret) if known and secret.isascii() else (0, secrets.token_urlsafe(32))
