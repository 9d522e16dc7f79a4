"""A local server that speaks as much of the chat protocol as a judge needs, and fails on demand."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def tokens(**chances):
    """{token: log-prob} as the protocol lists it."""
    named = [(token.replace("_", " "), p) for token, p in chances.items()]
    return [{"token": token, "logprob": math.log(p)} for token, p in named]


def completion(text, *tops):
    """The JSON of an answer; tops: of each token what `tokens` gives."""
    choice = {"message": {"role": "assistant", "content": text}}
    if tops:
        content = [{**top[0], "top_logprobs": top} for top in tops]
        choice["logprobs"] = {"content": content}
    return json.dumps({"choices": [choice]})


def choice(p, options=("1", "2")):
    """An answer that names the first option with chance p."""
    p = min(max(p, 1e-6), 1 - 1e-6)
    tops = tokens(**dict(zip([f"_{options[0]}", options[1]], [p, 1 - p], strict=True)))
    return completion(options[p < 0.5], tops)


class JudgeServer:
    """answer(talk) -> the JSON of a reply, of the messages so far as texts. `faults` are taken
    first, one a request: "429", "500", "401", "json", "shape", "drop", "cut", "slow", "drip".
    `seen` are the request bodies, `keys` what came as Authorization."""

    def __init__(self, answer, faults=(), retry_after=None):
        self.answer, self.faults, self.retry_after = answer, list(faults), retry_after
        self.seen, self.keys, self.busy, self.busiest = [], [], 0, 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.handle(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.source = f"judge:{self.url}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def handle(self, request):
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self.lock:
            self.seen.append(body)
            self.keys.append(request.headers["Authorization"])
            self.busy += 1
            self.busiest = max(self.busy, self.busiest)
            fault = self.faults.pop(0) if self.faults else None
        try:
            self.reply(request, body, fault)
        except OSError:
            pass  # nobody waits any more
        finally:
            with self.lock:
                self.busy -= 1

    def reply(self, request, body, fault):
        if fault == "drop":
            return request.connection.close()
        status, text = 200, self.answer([message["content"] for message in body["messages"]])
        if fault in ("429", "500", "401"):
            status, text = int(fault), f"no: {request.headers['Authorization']}"
        elif fault == "json":
            text = '{"choices": [{'
        elif fault == "shape":
            text = '{"choices": []}'
        elif fault == "slow":
            time.sleep(0.6)
        request.send_response(status)
        if status == 429 and self.retry_after:
            request.send_header("Retry-After", self.retry_after)
        data = text.encode()
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if fault == "cut":
            data = data[: len(data) // 2]
        if fault == "drip":
            for byte in data:
                request.wfile.write(bytes([byte]))
                time.sleep(0.05)
        request.wfile.write(data)
