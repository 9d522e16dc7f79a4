"""Chat completions over HTTP: time-outs, retries, a budget, a cache on disk. The protocol is that
of OpenAI: POST {url}/chat/completions.

Each request is answered once: by the cache, or by the server, and then it is in the cache before
anyone sees it. What fails is tried again with growing pauses. A key comes from the environment
alone, and is taken out of all that a server says.

Left out: streaming, proxies, redirects (a key would follow them), a limit on tokens.
"""

import contextlib
import email.utils
import hashlib
import http.client
import json
import math
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import cache_directory, file_errors
from minirlhf.engine.terminal import printable

KEYS = "MINIRLHF_JUDGE_KEY", "OPENAI_API_KEY"  # environment variables, the first that is set
LOCAL = "127.0.0.1", "localhost", "::1"
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_WAIT = 0.5, 30.0, 600.0  # seconds
LARGEST = 2**22  # bytes of an answer
AGAIN = (408, 409, 425, 429)  # and from 500 on: statuses that may pass


class Answer(NamedTuple):
    """A reply, and of each of its first tokens the likeliest ones there: {token: log-prob}; no
    tokens where the server gives no log-probs."""

    text: str
    top: list[dict[str, float]]


@dataclass
class Settings:
    """Where to ask, and how: the words behind the address of a source."""

    url: str
    model: str = ""  # as the server calls it
    budget: int = 0  # most requests of a process, retries included; 0: no limit
    concurrency: int = 4  # requests at a time
    timeout: float = 30.0  # seconds for an answer
    retries: int = 5  # after a failure that may pass
    rationale: bool = False  # reasons first, at the price of a second request
    principles: str = ""  # a file, one a line, or `default`: (A) or (B) under each of them


def read_settings(source):
    """Settings of "judge:URL?name=value&...". Raises UserError, without the values of what it does
    not know, as one may be a key."""
    address = source.removeprefix("judge:")
    fix = "expected judge:http://HOST:PORT/v1?model=NAME"
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UserError(f"judge: no such address: {fix}") from None
    if not address.isascii() or not address.isprintable() or " " in address:
        raise UserError(f"judge: no such address: {fix}")
    if parts.username or parts.password:
        raise UserError(f"judge: a name or key in the address: put the key into {KEYS[0]}")
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"judge: no such address: {fix}")
    given = {"url": f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"}
    kinds = {name: field.type for name, field in Settings.__dataclass_fields__.items()}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name == "url" or name not in kinds or name in given:
            known = ", ".join(list(kinds)[1:])
            raise UserError(f"judge: {name!r}: expected some of {known}, each once")
        given[name] = value_of(name, value, kinds[name])
    settings = Settings(**given)
    if settings.concurrency < 1 or not settings.timeout > 0:
        raise UserError("judge: expected concurrency of at least 1, and a timeout above 0")
    return settings


def value_of(name, value, kind):
    if kind is bool and value in ("0", "1"):
        return value == "1"
    with contextlib.suppress(ValueError):
        number = kind(value) if kind is not bool else math.nan
        if kind is str or 0 <= number < math.inf:
            return number
    expected = "0 or 1" if kind is bool else f"{kind.__name__}, at least 0"
    raise UserError(f"judge: {name}: expected {expected}")


class Passing(Exception):
    """A failure that may not be there the next time; `wait`: seconds that the server asks for."""

    def __init__(self, cause, wait=0.0):
        super().__init__(cause)
        self.wait = wait


class Endpoint:
    """A server, and what it has answered so far.

    `asked` counts the HTTP requests that were sent, retries included, `found` the answers that the
    cache had. Raises UserError for an environment's key that no header can hold, or that would be
    sent in the clear.
    """

    def __init__(self, settings):
        self.settings = settings
        self.key = key_of_environment()
        parts = urlsplit(settings.url)
        if self.key and parts.scheme == "http" and parts.hostname not in LOCAL:
            fix = f"take https, or leave {' and '.join(KEYS)} unset"
            raise UserError(f"judge {settings.url}: a key would be sent in the clear: {fix}")
        self.cache = Cache(cache_directory() / "judge.jsonl")
        self.asked = self.found = 0
        self.lock = threading.Lock()
        self.not_before = 0.0  # of the monotonic clock: the server asked for quiet until then

    def chat(self, bodies):
        """An Answer to each request body, a dict without the model; equal ones are asked once.

        Raises UserError where the server refuses, still fails after the last retry, or the budget
        is spent; what was answered by then is in the cache, and costs nothing the next time.
        """
        if self.settings.model:
            bodies = [body | {"model": self.settings.model} for body in bodies]
        names = [self.name_of(body) for body in bodies]
        wanted = dict(zip(names, bodies, strict=True))
        new = [name for name in wanted if name not in self.cache.answers]
        self.found += len(wanted) - len(new)
        stop = threading.Event()
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            jobs = [pool.submit(self.answer, name, wanted[name], stop) for name in new]
            try:
                for job in jobs:
                    job.result()
            except UserError as e:
                stop.set()
                pool.shutdown(cancel_futures=True)
                there = sum(name in self.cache.answers for name in wanted)
                kept = f"{there} of {len(wanted)} answers are in {self.cache.path}"
                raise UserError(f"{e}; {kept}, and the same command goes on from there") from None
            finally:
                stop.set()  # also of Ctrl-C
        return [self.cache.answers[name] for name in names]

    def name_of(self, body):
        """SHA-256 of the model and of all that is asked. Where no model is named, the server stands
        for it."""
        who = body.get("model") or self.settings.url
        content = json.dumps([who, body], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def answer(self, name, body, stop):
        """Asks until there is an answer, and keeps it. Returns early where others gave up."""
        for attempt in range(self.settings.retries + 1):
            quiet = self.not_before - time.monotonic()
            stop.wait(max(0.0, quiet, pause(attempt) if attempt else 0.0))
            if stop.is_set():
                return
            try:
                self.pay()
                answer = self.send(body)
            except Passing as e:
                cause = e
                self.not_before = max(self.not_before, time.monotonic() + e.wait)
                continue
            except UserError:
                stop.set()
                raise
            with self.lock:
                self.cache.keep(name, answer)
            return
        stop.set()
        tries = f"{self.settings.retries + 1} tries"
        raise UserError(f"judge {self.settings.url}: no answer in {tries}: {cause}")

    def pay(self):
        """Counts a request before it is sent."""
        with self.lock:
            budget = self.settings.budget
            if budget and self.asked >= budget:
                fix = "a higher budget, or another run, can ask more"
                raise UserError(f"judge: its budget of {budget} requests is spent: {fix}")
            self.asked += 1

    def send(self, body):
        """The Answer to one request. Raises Passing, or UserError for what will stay so."""
        try:
            status, headers, text = self.post(json.dumps(body).encode())
        except (OSError, http.client.HTTPException) as e:
            what = "no answer in time" if isinstance(e, TimeoutError) else str(e)
            raise Passing(self.clean(what or type(e).__name__)) from None
        if status == 200:
            return self.parse(text)
        said = f"status {status}: {self.short(text)}"
        if status in AGAIN or status >= 500:
            wait = seconds_to_wait(headers.get("Retry-After"))
            if wait <= LONGEST_WAIT:
                raise Passing(said, wait)
            said += f" (come back in {wait:.0f} s)"
        raise UserError(f"judge {self.settings.url}: {said}")

    def post(self, data):
        """(status, headers, text) of one request, in at most about `timeout` seconds."""
        limit = self.settings.timeout
        end = time.monotonic() + limit
        parts = urlsplit(self.settings.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        with contextlib.closing(kind(parts.hostname, parts.port, timeout=limit)) as connection:
            connection.request("POST", f"{parts.path}/chat/completions", data, headers)
            socket = connection.sock
            response = connection.getresponse()
            text = b""
            while chunk := response.read1(65536):
                text += chunk
                left = end - time.monotonic()
                if left <= 0:  # a server that drips never lets a socket's own time run out
                    raise TimeoutError
                if len(text) > LARGEST:
                    raise http.client.HTTPException("a longer answer than any that was asked for")
                if not response.isclosed():  # from Python 3.13 on it closes the socket at its end
                    socket.settimeout(left)
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
        return response.status, response.headers, text.decode(errors="replace")

    def parse(self, text):
        """The Answer in a JSON text. Raises Passing where there is none."""
        try:
            choice = json.loads(text)["choices"][0]
            said = choice["message"]["content"]
            if not isinstance(said, str):
                raise TypeError
            top = tops_of(choice.get("logprobs"))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise Passing(f"not a chat completion: {self.short(text)}") from None
        return Answer(self.clean(said), [self.clean_tokens(tokens) for tokens in top])

    def clean_tokens(self, tokens):
        return {self.clean(token): logprob for token, logprob in tokens.items()}

    def clean(self, text):
        """The text without the key, plain or as JSON writes it, and without half characters, which
        no file takes."""
        text = text.encode("utf-8", "replace").decode()
        if self.key:
            quoted = json.dumps(self.key)[1:-1]
            for form in (self.key, quoted, quoted.replace("/", "\\/")):
                text = text.replace(form, "[key]")
        return text

    def short(self, text):
        """The start of a stranger's text, in one line that steers no terminal."""
        return printable(" ".join(self.clean(text).split())[:200])


def key_of_environment():
    """The key, or "" where there is none."""
    name = next((name for name in KEYS if os.environ.get(name)), None)
    key = os.environ[name].strip() if name else ""
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the environment's {name} is no key: expected letters, digits and signs")
    return key


def tops_of(logprobs):
    """A list of {token: log-prob} out of choices[0].logprobs; [] where it has none."""
    tops = []
    for place in (logprobs or {}).get("content") or []:
        found = {}
        for entry in place.get("top_logprobs") or [place]:
            token, logprob = entry["token"], entry["logprob"]
            if not isinstance(token, str) or not -math.inf <= float(logprob) < 1e-3:
                raise ValueError
            found[token] = max(float(logprob), -1e4)  # JSON has no infinity
        tops.append(found)
    return tops


def seconds_to_wait(retry_after):
    """Of a header Retry-After: seconds, or a date; 0 where it says neither."""
    if not retry_after:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(retry_after)
            seconds = date.timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, seconds) if seconds < math.inf else 0.0


def pause(attempt):
    """Seconds before try number `attempt`, from 1 on: twice as many each time, less up to a half at
    random, so that many who failed together do not come back together."""
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))
    return longest * random.uniform(0.5, 1)


class Cache:
    """Answers on disk, a JSON object a line, each on the disk before it counts.

    A line that was cut short, as by a crash, is passed over: its answer is asked for again.
    """

    def __init__(self, path):
        self.path, self.answers = Path(path), {}
        with file_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                file.seek(0)
                for line in file:
                    self.read(line)

    def read(self, line):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            self.answers[row["key"]] = Answer(row["text"], row["top"])

    def keep(self, name, answer):
        row = {"key": name, "text": answer.text, "top": answer.top}
        line = json.dumps(row).encode() + b"\n"
        with file_errors(self.path), open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
                line = b"\n" * torn + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.answers[name] = answer
