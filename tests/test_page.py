"""The labelling page's server and log: who may ask, what is written, what survives."""

import atexit
import dataclasses
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minirlhf.data import load_feedback, parse_label
from minirlhf.data.labels import KINDS
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import read_lines, write_lines
from minirlhf.feedback import answered
from minirlhf.feedback.page import learning, pool, terminal
from minirlhf.feedback.page.calls import calls, pieces
from minirlhf.feedback.page.command import Drawn, Knobs, open_session, parse
from minirlhf.feedback.page.lines import Lines
from minirlhf.feedback.page.server import FILES, recall, start
from minirlhf.look import policies

ATTACK = '<script>alert(1)</script><img src=x onerror="alert(2)">'
ANSWERS = {
    "critique": {"level": 3},
    "comparison": {"ranking": [1, 0]},
    "intertemporal": {"curve": [[2, 0.25], [5, 1]]},
    "proxy": {"weights": {"words": 1, "capitals": -0.5}},
    "social": {"reaction": "smile"},
    "improvement": {"improved": "better"},
    "language": {"utterance": "less words"},
    "estop": {"stop": 3},
    "importance": {"ranking": [0, 1], "marks": [[[0, 3]], []]},
    "trace": {"order": [2, 0, 1]},
    "similarity": {"odd": 2},
}


def write_run(folder, n=12, texts=("before", "after")):
    folder.mkdir()
    with open(folder / "samples.jsonl", "w") as file:
        for i in range(n):
            row = {"prompt": f"prompt {i}"} | {key: f"{key} text {i}" for key in texts}
            file.write(json.dumps(row) + "\n")
    return folder


def write_answers(path, n=12, k=3, words=0):
    """Prompts with k ranked responses of so many words more."""
    with open(path, "w") as file:
        for i in range(n):
            responses = [f"Text {i}, {'word ' * (j + words)}end" for j in range(k)]
            row = {"prompt": f"prompt {i}", "responses": responses, "ranking": list(range(k))}
            file.write(json.dumps(row) + "\n")
    return path


def session_of(*sources, **knobs):
    return open_session(Knobs(runs=[str(source) for source in sources], rater="Ann", **knobs))


def labels_of(session):
    """The lines of the file, read anew, each a valid label."""
    entries = [json.loads(line) for line in Path(session.knobs.out).read_text().splitlines()]
    for entry in entries:
        parse_label(entry, "test")
    return entries


class Client:
    """A page without a browser."""

    def __init__(self, session, learns=None):
        out = Path(session.knobs.out)
        self.server = start(*calls(session, learns), 0, out.with_suffix(".address"))
        self.port = self.server.server_address[1]
        self.origin = f"http://127.0.0.1:{self.port}"
        self.root = f"/{self.server.secret}/"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def request(self, method, path, body=None, **headers):
        """(status, headers, text)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.putrequest(method, path, skip_host=True)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers = {"Host": f"127.0.0.1:{self.port}"} | headers
        raw = b"" if body is None else body.encode()
        if method == "POST":
            headers = {"Content-Length": str(len(raw))} | headers
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(raw)
        reply = connection.getresponse()
        found = reply.status, reply.headers, reply.read().decode()
        connection.close()
        return found

    def post(self, name, **body):
        kind = {"Origin": self.origin, "Content_Type": "application/json"}
        status, _, text = self.request("POST", self.root + name, json.dumps(body), **kind)
        return status, json.loads(text)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def page(tmp_path):
    made = []

    def make(session, learns=None):
        made.append(Client(session, learns))
        return made[-1]

    yield make
    for client in made:
        client.close()


# Who may ask


def test_nobody_else_gets_in(tmp_path, page):
    session = session_of(write_run(tmp_path / "run"))
    client = page(session)
    asked = client.post("question", tab="t")[1]["question"]
    body = json.dumps({"tab": "t", "question": asked["name"], "said": {"ranking": [0, 1]}})
    ours = {"Origin": client.origin, "Content_Type": "application/json"}
    path, wrong = client.root + "answer", "A" * 43
    tries = {
        "another origin": (path, ours | {"Origin": "http://evil.example"}),
        "a sandboxed page": (path, ours | {"Origin": "null"}),
        "another port": (path, ours | {"Origin": "http://127.0.0.1:1"}),
        "no origin": (path, {"Content_Type": "application/json"}),
        "a form": (path, ours | {"Content_Type": "text/plain"}),
        "a wrong token": (f"/{wrong}/answer", ours),
        "a short token": (client.root[:-3] + "/answer", ours),
        "no token": ("/answer", ours),
        "another host": (path, ours | {"Host": f"evil.example:{client.port}"}),
        "a host and its origin": (path, ours | {"Host": "evil.example", "Origin":
                                                "http://evil.example"}),
        "no host": (path, ours | {"Host": ""}),
        "a path upwards": (client.root + "../answer", ours),
        "chunks": (path, ours | {"Transfer_Encoding": "chunked"}),
        "too much": (path, ours | {"Content_Length": str(2**30)}),
    }  # fmt: skip
    for name, (path, headers) in tries.items():
        status, _, text = client.request("POST", path, body, **headers)
        assert (status, text) == (404, "not found\n"), name
    assert labels_of(session) == []
    assert client.request("POST", client.root + "answer", body, **ours)[0] == 200
    assert len(labels_of(session)) == 1


@pytest.mark.parametrize(
    "path", ["../server.py", "..%2fserver.py", "../../../../etc/passwd", "server.py", "/etc/passwd",
             "page.html", "question", "%70age.js", "page.js?x", "page.js/"]
)  # fmt: skip
def test_only_the_pages_files_are_served(tmp_path, page, path):
    client = page(session_of(write_run(tmp_path / "run")))
    assert client.request("GET", client.root + path)[::2] == (404, "not found\n")


def test_a_page_may_run_its_own_files_alone(tmp_path, page):
    client = page(session_of(write_run(tmp_path / "run")))
    for name in FILES:
        status, headers, text = client.request("GET", client.root + name)
        policy = headers["Content-Security-Policy"]
        assert status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store" and "Set-Cookie" not in headers
        assert "innerHTML" not in text and "outerHTML" not in text and "eval(" not in text
        assert "insertAdjacentHTML" not in text and "document.write" not in text
        assert "//" not in text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")
        if not name:
            assert "<style" not in text and " on" not in text and text.count("<script ") == 1
    assert client.request("GET", client.root, Host="localhost:1")[0] == 404


def test_a_text_that_is_markup_stays_a_text(tmp_path, page):
    run = tmp_path / "run"
    run.mkdir()
    row = {"prompt": ATTACK, "before": ATTACK + "a", "after": "\u202eb\x1b[2J</script>"}
    (run / "samples.jsonl").write_text(json.dumps(row))
    client = page(session_of(run))
    kind = {"Origin": client.origin, "Content_Type": "application/json"}
    _, headers, text = client.request("POST", client.root + "question", '{"tab": "t"}', **kind)
    assert headers["Content-Type"] == "application/json"
    shown = json.loads(text)["question"]
    assert shown["prompt"] == ATTACK
    assert {"".join(t) for t in shown["texts"]} == {row["before"], row["after"]}


@pytest.mark.parametrize("body", ["", "[", "[]", "null", '{"a": 1, "a": 2}', "[" * 10000, "{}"])
def test_bad_requests_are_a_line(tmp_path, page, body):
    client = page(session_of(write_run(tmp_path / "run")))
    kind = {"Origin": client.origin, "Content_Type": "application/json"}
    status, _, text = client.request("POST", client.root + "answer", body, **kind)
    assert status == 400 and "\n" not in json.loads(text)["error"]


def test_the_address_stays_and_is_the_owners(tmp_path, page):
    client = page(session_of(write_run(tmp_path / "run")))
    file = tmp_path / "run" / "labels.address"
    assert file.stat().st_mode & 0o077 == 0
    assert recall(file) == (client.port, client.server.secret)
    file.write_text('{"port": 80, "secret": "short"}')
    port, secret = recall(file)
    assert port == 0 and len(secret) == 43


# What is written


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_a_label(tmp_path, page, kind):
    session = session_of(write_answers(tmp_path / "a.jsonl"), kind=kind, n=3)
    client = page(session)
    asked = client.post("question", tab="t")[1]["question"]
    said = dict(ANSWERS[kind])
    if kind == "comparison":
        said = {"ranking": [2, [0, 1]]}
    answer = {"tab": "t", "question": asked["name"], "said": said, "seconds": 1.234}
    status, found = client.post("answer", **answer, reason=" because ", remark="")
    assert status == 200 and found["written"] and found["question"]["name"] != asked["name"]
    (entry,) = labels_of(session)
    texts = ["".join(t) for t in asked["texts"]]
    expected = {"version": 1, "kind": kind, "prompt": asked["prompt"], "rater": "Ann"}
    expected |= {"question": asked["name"], "seconds": 1.23, "reason": "because"}
    assert entry.items() >= expected.items() and "remark" not in entry
    if kind == "trace":
        assert entry["responses"] == [texts[2], texts[0], texts[1]]
        assert entry["feature"] == asked["feature"] and entry["order"] == [2, 0, 1]
    else:
        assert entry.items() >= said.items()
        own = entry.get("responses") or [entry["response"], *entry.get("others", [])]
        assert own == texts
    assert sorted(entry["sides"]) == entry["sides"] or len(entry["sides"]) > 1


@pytest.mark.parametrize(
    ("kind", "said"),
    [("critique", {"level": 5}), ("critique", {"level": 1, "of": 2}), ("critique", [1]),
     ("comparison", {"ranking": [0, 0]}), ("comparison", {"ranking": [0, 1], "rater": "Bob"}),
     ("comparison", {}), ("trace", {"order": [0, 1, 1]}), ("trace", {"order": [True, 0, 2]}),
     ("proxy", {"weights": {"words": float("nan")}}), ("language", {"utterance": "more <b>"}),
     ("estop", {"stop": 10**6}), ("improvement", {"improved": 3}), ("similarity", {"odd": 3}),
     ("importance", {"ranking": [0, 1], "marks": [[[0, 999]], []]})],
)  # fmt: skip
def test_what_is_no_label_is_not_written(tmp_path, page, kind, said):
    session = session_of(write_answers(tmp_path / "a.jsonl"), kind=kind, n=3)
    client = page(session)
    asked = client.post("question", tab="t")[1]["question"]
    status, found = client.post("answer", tab="t", question=asked["name"], said=said)
    assert status == 400 and found["error"] and labels_of(session) == []
    assert client.post("question", tab="t")[1]["question"] == asked  # it is still open


def test_an_answer_counts_once(tmp_path, page):
    session = session_of(write_run(tmp_path / "run"))
    client = page(session)
    asked = client.post("question", tab="t")[1]["question"]
    answer = {"tab": "t", "question": asked["name"], "said": {"ranking": [0, 1]}}
    first = client.post("answer", **answer)[1]
    second = client.post("answer", **answer)[1]
    assert first["written"] and not second["written"]
    assert first["question"] == second["question"]
    assert len(labels_of(session)) == 1
    assert client.post("answer", **answer | {"question": "no such"})[0] == 400


def test_many_at_once_count_once(tmp_path, page):
    session = session_of(write_run(tmp_path / "run"))
    client = page(session)
    asked = client.post("question", tab="t")[1]["question"]
    answer = {"tab": "t", "question": asked["name"], "said": {"ranking": [0, 1]}}
    said = []
    threads = [
        threading.Thread(target=lambda: said.append(client.post("answer", **answer)[1]["written"]))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) == [False] * 7 + [True] and len(labels_of(session)) == 1


def test_every_question_is_asked_once_and_undo_goes_all_the_way(tmp_path):
    session = session_of(write_run(tmp_path / "run"), again=False)
    asked = []
    while question := session.ask("t"):
        asked.append(question.name)
        if len(asked) % 4:
            session.answer("t", question.name, {"ranking": [0, 1]})
        else:
            session.skip("t", question.name)
    assert len(set(asked)) == len(asked) == 12
    assert [e["question"] for e in labels_of(session)] == [
        n for i, n in enumerate(asked, 1) if i % 4
    ]
    for name in reversed(asked):
        assert session.last() == name and session.undo("t", name).name == name
        assert session.ask("t").name == name  # it is shown again
        assert session.undo("t", name) is None  # sent twice, it takes back one
    assert session.last() == "" and labels_of(session) == []
    assert session.skips.entries == [] and len(session.left) == 12


def test_whatever_happens_the_file_holds_what_was_done(tmp_path):
    """Answers, skips, undos, restarts and two tabs at random, beside a list of what was done."""
    rng = np.random.default_rng(0)
    run, done = write_run(tmp_path / "run", 40), []
    session = session_of(run)
    for _ in range(400):
        tab, action = "ab"[rng.integers(2)], rng.choice(4, p=[0.5, 0.15, 0.3, 0.05])
        asked = session.ask(tab)
        if action == 0 and asked:
            session.answer(tab, asked.name, {"ranking": [0, 1]})
            done.append(("label", asked.name))
        elif action == 1 and asked:
            session.skip(tab, asked.name)
            done.append(("skip", asked.name))
        elif action == 2:
            undone = session.undo(tab, session.last())
            assert (undone.name if undone else None) == (done.pop()[1] if done else None)
        elif action == 3:
            session.labels.close()
            session.skips.close()
            session = session_of(run)
        labels = [name for what, name in done if what == "label"]
        assert [entry["question"] for entry in session.labels.entries] == labels
        passed = {name for _, name in done}
        assert len(passed) == len(done)
        assert {session.questions[i].name for i in session.left} == set(session.by_name) - passed
    assert [entry["question"] for entry in labels_of(session)] == labels


def test_undo_leaves_what_others_said(tmp_path):
    run = write_run(tmp_path / "run")
    out = run / "labels.jsonl"
    foreign = {"version": 1, "kind": "social", "prompt": "", "response": "x", "reaction": "smile"}
    out.write_text(json.dumps(foreign) + "\n")
    session = session_of(run)
    session.answer("t", session.ask("t").name, {"ranking": [0, 1]})
    assert session.undo("t", session.last()) and session.undo("t", session.last()) is None
    assert out.read_text() == json.dumps(foreign) + "\n"


def test_sides_are_random_and_recorded(tmp_path):
    session = session_of(write_run(tmp_path / "run", 200))
    first = sum(asked.sources[0].endswith("before") for asked in session.questions)
    assert 70 < first < 130
    for asked in session.questions:
        texts = [f"{key} text {asked.prompt.split()[1]}" for key in ("before", "after")]
        assert asked.responses == [texts[i] for i in asked.sides]
    other = session_of(tmp_path / "run", seed=1, out=tmp_path / "o.jsonl")
    order = [asked.name for asked in session.questions]
    assert order != [asked.name for asked in other.questions]
    assert sorted(order) == sorted(asked.name for asked in other.questions)


def test_one_in_ten_is_asked_again_the_other_way_round(tmp_path):
    session = session_of(write_run(tmp_path / "run", 30))
    for _ in range(30):
        session.answer("t", session.ask("t").name, {"ranking": [0, 1]})
    labels = labels_of(session)
    again = [i for i, entry in enumerate(labels) if "again" in entry]
    assert again == [9, 19, 29]
    for i in again:
        first = next(e for e in labels if e["question"] == labels[i]["again"])
        assert labels[i]["responses"] == first["responses"][::-1]
        assert labels[i]["sides"] == first["sides"][::-1]
    assert len({e["question"] for e in labels}) == 30


def test_blind_until_asked_to_reveal(tmp_path, page):
    run, other = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    text = (other / "samples.jsonl").read_text()
    (other / "samples.jsonl").write_text(text.replace("after text", "new text"))
    for reveal in (False, True):
        session = session_of(run, other, reveal=reveal, out=tmp_path / f"{reveal}.jsonl")
        client = page(session)
        found = client.post("question", tab="t")[1]
        assert str(run) not in json.dumps(found) and str(other) not in json.dumps(found)
        answer = {"tab": "t", "question": found["question"]["name"], "said": {"ranking": [0, 1]}}
        shown = client.post("answer", **answer)[1]["reveal"]
        texts = {str(run): "after", str(other): "new"}
        expected = ["".join(t).split()[0] for t in found["question"]["texts"]]
        assert [texts[name] for name in shown] == (expected if reveal else [])


# What survives


def test_two_tabs_ask_nothing_twice(tmp_path, page):
    session = session_of(write_run(tmp_path / "run"), again=False)
    client = page(session)
    written, tabs = [], {tab: client.post("question", tab=tab)[1] for tab in "ab"}
    assert tabs["a"]["question"] != tabs["b"]["question"]
    for tab in "abbaabab" * 2:
        asked = tabs[tab]["question"]
        if asked:
            if len(written) < 10:  # then the last one is in both tabs
                assert client.post("question", tab=tab)[1]["question"] == asked  # a reload
            said = {"ranking": [0, 1]}
            tabs[tab] = client.post("answer", tab=tab, question=asked["name"], said=said)[1]
            written += [asked["name"]] if tabs[tab]["written"] else []
    assert len(set(written)) == 12 == len(written) == len(labels_of(session))
    assert tabs["a"]["question"] is tabs["b"]["question"] is None


def test_undo_in_one_tab_takes_nothing_of_another(tmp_path, page):
    client = page(session_of(write_run(tmp_path / "run")))
    stale = client.post("question", tab="a")[1]
    asked = client.post("question", tab="b")[1]["question"]["name"]
    client.post("answer", tab="b", question=asked, said={"ranking": [0, 1]})
    found = client.post("undo", tab="a", last=stale["last"])[1]
    assert not found["undone"] and found["last"] == asked


def serve(run, *flags):
    """(process, port, path) of the command, when it says that it is there."""
    command = [sys.executable, "-m", "minirlhf.feedback", str(run), "--rater", "Ann", *flags]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored in the background
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed)
    atexit.register(process.kill)  # where a test fails before it ends it
    for line in process.stdout:
        if line.startswith("open "):
            return process, line.split()[1]
    raise AssertionError("it did not start")


def test_marks_at_which_python_ends_a_line(tmp_path):
    """They are letters of a text."""
    row = {"prompt": "p\u2028q", "before": "a\x85b", "after": "c\x1ed"}
    write_lines(tmp_path / "samples.jsonl", [row, row | {"prompt": "r"}])
    places, rows = zip(*read_lines(tmp_path / "samples.jsonl"), strict=True)
    assert rows == (row, row | {"prompt": "r"})
    assert places[1] == f"{tmp_path}/samples.jsonl:2"
    assert answered.read_answers(tmp_path)["p\u2028q"] == ["a\x85b", "c\x1ed"]
    assert policies.answered(tmp_path / "samples.jsonl") == ["p\u2028q", "r"]


def test_a_killed_server_loses_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    process, address = serve(run)
    root = "/" + address.split("/", 3)[3]
    client = SimpleNamespace(port=int(address.split(":")[2].split("/")[0]), root=root)
    client.origin = f"http://127.0.0.1:{client.port}"
    client.request = lambda *a, **k: Client.request(client, *a, **k)

    def post(name, **body):
        return Client.post(client, name, tab="t", **body)[1]

    asked = post("question")["question"]["name"]
    upcoming = post("answer", question=asked, said={"ranking": [0, 1]})["question"]["name"]
    post("skip", question=upcoming)
    open_one = post("question")["question"]["name"]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (run / "labels.jsonl").open("a").write('{"version": 1, "ki')  # killed while it wrote
    process, again = serve(run)
    assert again == address  # the tab goes on
    assert not post("answer", question=asked, said={"ranking": [0, 1]})["written"]
    assert post("answer", question=open_one, said={"ranking": [1, 0]})["written"]
    assert post("question")["question"]["name"] not in (asked, upcoming, open_one)
    lines = (run / "labels.jsonl").read_text().splitlines()
    assert [json.loads(line)["question"] for line in lines] == [asked, open_one]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


def test_a_second_server_is_kept_off_the_file(tmp_path):
    run = write_run(tmp_path / "run")
    first = session_of(run)
    with pytest.raises(UserError, match="another process writes there"):
        session_of(run)
    assert first.ask("t")


def test_lines_shrink_and_grow(tmp_path):
    lines = Lines(tmp_path / "new" / "a.jsonl")
    for i in range(3):
        lines.append({"i": i})
    assert lines.pop() == {"i": 2}
    lines.append({"text": "\ud800é"})  # no UTF-8 has it; JSON's escapes do
    lines.close()
    again = Lines(lines.path)
    assert again.entries == [{"i": 0}, {"i": 1}, {"text": "\ud800é"}]
    while again.entries:
        again.pop()
    assert lines.path.read_bytes() == b""


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "labels.jsonl").write_text('{"no\n{}\n')
    with pytest.raises(UserError, match="labels.jsonl:1"):
        session_of(run)
    (run / "labels.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="labels.jsonl:1: no label"):
        session_of(run)


def test_ten_thousand_labels(tmp_path, page):
    run = write_run(tmp_path / "run", 10_100)
    first = session_of(run, again=False)
    lines = []
    for asked in first.questions[:10_000]:
        entry = first.label_of(asked, {"ranking": [0, 1]}, 1.0, {})
        lines.append(json.dumps(entry) + "\n")
    first.labels.close()
    first.skips.close()
    (run / "labels.jsonl").write_text("".join(lines))
    begun = time.perf_counter()
    process, _ = serve(run)
    started = time.perf_counter() - begun
    process.kill()
    process.wait()
    session = session_of(run)
    client = page(session)
    asked, spent = client.post("question", tab="t")[1]["question"]["name"], []
    for _ in range(20):
        begun = time.perf_counter()
        found = client.post("answer", tab="t", question=asked, said={"ranking": [0, 1]})[1]
        spent.append(time.perf_counter() - begun)
        asked = found["question"]["name"]
    assert found["written"] and len(labels_of(session)) == 10_020
    looks = []
    for _ in range(5):
        begun = time.perf_counter()
        assert client.request("GET", client.root + "figures")[0] == 200
        looks.append(time.perf_counter() - begun)
    print(f"started in {started:.2f} s, answers {np.median(spent):.4f} s", end=", ")
    print(f"figures {np.median(looks):.4f} s")
    assert started < 6 and np.median(spent) < 0.05 and np.median(looks) < 0.1  # on a slow core


# What can be asked


def test_pieces_are_the_text():
    for text in ("", " ", "a", " a  b\n c ", "\n\na\t", "é 👍 x", "你好 world", "abeb", "\x1c\x85"):
        assert "".join(pieces(text)) == text
    assert pieces("你好 ab") == ["你", "好", " ab"] and pieces("abe") == ["a", "b", "e"]
    assert pieces("a bc  d ") == ["a", " bc", "  d", " "]


def test_combinations_of_a_few_and_of_many(tmp_path):
    few = pool.Group("p", ["a", "b", "c", "d"], [""] * 4)
    found = {frozenset(q.responses) for q in pool.questions([few], ["comparison"], 2, 0)}
    assert len(found) == 6
    many = pool.Group("", [f"text {i}" for i in range(300)], [""] * 300)
    asked = pool.questions([many], ["comparison"], 2, 0)
    assert len({frozenset(q.responses) for q in asked}) == len(asked) >= 300


def test_no_more_questions_than_anybody_answers(monkeypatch):
    monkeypatch.setattr(pool, "MOST", 50)
    many = pool.Group("", [f"text {i}" for i in range(300)], [""] * 300)
    asked = pool.questions([many], ["comparison", "social"], 2, 0)
    assert len(asked) == 50 and {q.kind for q in asked[:2]} == {"comparison", "social"}


def test_kinds_take_turns(tmp_path):
    session = session_of(write_answers(tmp_path / "a.jsonl"), kind="all", n=3, again=False)
    seen = []
    for _ in range(22):
        asked = session.ask("t")
        seen.append(asked.kind)
        said = ANSWERS[asked.kind]
        session.answer(
            "t", asked.name, {"ranking": [0, 1, 2]} if asked.kind == "comparison" else said
        )
    assert seen == list(KINDS) * 2
    feedback = load_feedback(session.knobs.out)
    assert len(feedback.train.labels) + len(feedback.test.labels) == 22


def test_what_cannot_be_asked_is_a_line(tmp_path):
    run = write_run(tmp_path / "run")
    bad = {"--kind x": {"kind": "x"}, "3 different": {"kind": "similarity"},
           "is for --kind trace": {"feature": "words"}, "own texts": {"out": run / "f.jsonl"},
           "feature": {"kind": "trace", "feature": "wrods"}}  # fmt: skip
    write_answers(run / "f.jsonl")
    for match, knobs in bad.items():
        source = run / "f.jsonl" if match == "own texts" else run
        with pytest.raises(UserError, match=match):
            session_of(source, **knobs)
    with pytest.raises(UserError, match="given twice"):
        session_of(run, run)
    with pytest.raises(UserError, match="expected"):
        session_of(tmp_path / "nothing")
    (run / "samples.jsonl").write_text('{"before": 1}')
    with pytest.raises(UserError, match="samples.jsonl:1: expected an object with a prompt"):
        session_of(run)


def test_flags(tmp_path):
    knobs = parse(Knobs, "doc", ["a", "b", "--kind", "estop", "--no-again", "--n", "4"])
    assert dataclasses.asdict(knobs).items() >= {"runs": ["a", "b"], "n": 4, "again": False}.items()
    with pytest.raises(UserError):
        parse(Knobs, "doc", ["a", "--n", "1"])


def test_starts_without_torch(tmp_path):
    run = write_run(tmp_path / "run")
    code = f"""
import sys
from minirlhf.feedback.page import calls, learning, server, terminal
from minirlhf.feedback.page.command import Knobs, open_session
session = open_session(Knobs(runs=[{str(run)!r}]))
assert session.ask("t") and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_samples_are_drawn_once(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    (run / "config.json").write_text("{}")
    drawn = []

    def sampled(name, knobs):
        drawn.append(name)
        return [{"prompt": "p", "response": f"{i}"} for i in range(knobs.samples)]

    monkeypatch.setattr("minirlhf.feedback.page.command.sampled", sampled)
    for n in (3, 3, 4):
        session = session_of(run, samples=n, kind="similarity")
        assert len(session.questions) == {3: 1, 4: 4}[n]
        session.labels.close()
        session.skips.close()
    assert drawn == [str(run)] * 2 and Drawn(session.knobs, run / "labels.drawn.jsonl").rows


# Learning


class Learner:
    """In place of refit.Learner: longer texts are better."""

    def fit(self, labels, progress):
        for i in range(3):
            progress(i + 1, 3)
        self.n = len(labels)
        return SimpleNamespace(accuracy_by_labels=[(4, 0.5), (8, 0.75)], disagreements=[1],
                               seconds=0.1)  # fmt: skip

    def score(self, prompts, responses):
        return [float(len(response)) for response in responses]

    def write(self, prompts, n, progress):
        return [f"written to {prompt}" for prompt in prompts]

    def save(self, out):
        Path(out).mkdir(exist_ok=True)


def wait_for(found):
    until = time.monotonic() + 10
    while found.job and time.monotonic() < until:
        time.sleep(0.01)
    return found.state()


def test_train_and_write(tmp_path, page):
    run = write_run(tmp_path / "run", 12)
    text = (run / "samples.jsonl").read_text()
    (run / "samples.jsonl").write_text(text.replace("after text 7", "after text"))
    session = session_of(run, again=False)
    learns = learning.Learning(session, Learner)
    client = page(session, learns)
    assert client.post("write")[0] == 400
    for _ in range(3):
        session.answer("t", session.ask("t").name, {"ranking": [0, 1]})
    assert client.post("train")[0] == 200
    state = wait_for(learns)
    assert state["error"] == "" and state["fit"]["accuracy"] == [(4, 0.5), (8, 0.75)]
    assert state["fit"]["disagreements"][0]["prompt"] == labels_of(session)[1]["prompt"]
    assert Path(state["saved"]).is_dir()
    lengths = {i: abs(len(q.responses[0]) - len(q.responses[1]))
               for i, q in enumerate(session.questions)}  # fmt: skip
    asked = session.by_name[session.ask("u").name]
    assert lengths[asked] == min(lengths[i] for i in session.left)  # the least certain first
    before = len(session.left)
    client.post("write")
    state = wait_for(learns)
    assert len(state["written"]) == 6 and len(session.left) == before + 6
    assert state["written"][0]["new"].startswith("written to prompt")
    new = session.ask("v")
    assert "written" in new.sources and new.name in session.by_name
    session.labels.close()
    session.skips.close()
    assert len(session_of(run, again=False).left) == before + 6  # they are still there


def test_a_learner_that_cannot_is_a_line(tmp_path):
    def make():
        raise UserError("no model there")

    learns = learning.Learning(session_of(write_run(tmp_path / "run")), make)
    learns.train({})
    assert wait_for(learns)["error"] == "no model there"


def test_learning_is_offered_where_it_can_be_had(tmp_path, page, monkeypatch):
    session = session_of(write_run(tmp_path / "run"))
    monkeypatch.setattr(learning, "find_spec", lambda name: None)
    assert learning.find_learner(session, tmp_path / "run") is None
    client = page(session)
    assert not json.loads(client.request("GET", client.root + "begin")[2])["learns"]
    assert client.request("POST", client.root + "train")[0] == 404
    monkeypatch.setattr(learning, "find_spec", lambda name: name)
    assert learning.find_learner(session, tmp_path / "run") is not None
    assert learning.find_learner(session, "FILE.jsonl") is None


def test_a_second_rater_sees_the_same_questions(tmp_path, page):
    run, names = write_run(tmp_path / "run", 8), {}
    for rater in ("Ann", "Bob"):
        session = open_session(Knobs(runs=[str(run)], rater=rater))
        assert session.last() == ""  # Ann's are not Bob's to take back
        names[rater] = []
        for i in range(6):
            asked = session.ask("t")
            names[rater].append(asked.name)
            better = (i == 5 and rater == "Bob") != asked.responses[0].startswith("before")
            session.answer("t", asked.name, {"ranking": [1, 0] if better else [0, 1]})
        session.labels.close()
        session.skips.close()
    assert names["Ann"] == names["Bob"]
    client = page(open_session(Knobs(runs=[str(run)], rater="Ann")))
    found = json.loads(client.request("GET", client.root + "figures")[2])["quality"]
    # of twelve values eleven are one: 1 - 11 * (2 that differ) / (11 + 11 expected ones)
    (alpha,) = found["agreement"]
    assert alpha["units"] == 6 and alpha["raters"] == 2
    assert alpha["alpha"] == pytest.approx(1 - 11 * 2 / (2 * 11 * 1), abs=1e-4)


# In the terminal

LINES = {
    "critique": ("4", {"level": 3}),
    "comparison": ("3=1 2", {"ranking": [[2, 0], 1]}),
    "social": ("1", {"reaction": "frown"}),
    "improvement": ("better é", {"improved": "better é"}),
    "language": ("less words", {"utterance": "less words"}),
    "estop": ("e", {"stop": None}),
    "proxy": ("words=-1 variety=2.5", None),
    "trace": ("2 3 1", {"order": [1, 2, 0]}),
    "similarity": ("2", {"odd": 1}),
    "importance": ("2 1:2 2:1", {"ranking": [1, 0]}),
    "intertemporal": ("0", None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_in_the_terminal(tmp_path, kind):
    session = session_of(write_answers(tmp_path / "a.jsonl"), kind=kind, n=3)
    line, said = LINES[kind]
    asked = session.ask(terminal.TAB)
    words = asked.responses[0].split()
    if kind == "intertemporal":
        line = " ".join(["0", *"9" * (len(words) - 1)])
    printed = []
    lines = ["nonsense ? 99\n"] if kind != "improvement" else []
    terminal.converse(session, [*lines, ": a reason\n", f"{line}\n", "q\n"], printed.append)
    (entry,) = labels_of(session)
    assert entry["reason"] == "a reason" and entry["question"] == asked.name
    assert any(text.startswith("not taken: expected") for text in printed) == bool(lines)
    assert entry.items() >= (said or {}).items()
    if kind == "intertemporal":
        assert [value for _, value in entry["curve"]] == [0, *[1] * (len(words) - 1)]
    if kind == "importance":
        (start, end), text = entry["marks"][0][0], asked.responses[0]
        assert text[start:end] == words[1]
    if kind == "proxy":
        assert entry["weights"] == dict.fromkeys(entry["weights"], 0) | {
            "words": -1,
            "variety": 2.5,
        }


def test_the_terminal_undoes_skips_and_ends(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"prompt": f"p{i}\x1b[2J", "before": "a", "after": f"b{i}"} for i in range(3)]
    (run / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    session = session_of(run, reveal=True)
    terminal.converse(session, ["1\n", "s\n", "u\n", "u\n", "u\n", "x\n", "2\n", "t\n", "1\n"])
    assert [e["ranking"] for e in labels_of(session)] == [[[0, 1]], [1, 0], [[0, 1]]]
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"\x1b[2J" in out and "that was all" in out
    assert str(run) in out and "nothing to take back" in out


def test_the_terminal_as_a_command(tmp_path):
    run = write_run(tmp_path / "run")
    command = [sys.executable, "-m", "minirlhf.feedback", str(run), "--terminal"]
    done = subprocess.run(command, input="1\n2\n", capture_output=True, text=True, check=True)
    assert "2 labels in" in done.stdout and len((run / "labels.jsonl").read_text().split("\n")) == 3
