"""The labelling page in headless Chromium: every gesture leaves the label that was meant."""

import json
import os
import shutil
import signal

import pytest
from test_page import ATTACK, Client, labels_of, serve, session_of, write_answers, write_run

from minirlhf.feedback.page import learning

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `dev`")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def tab(browser):
    """A function that opens an address in a tab of its own; no script may fail meanwhile."""
    context, problems = browser.new_context(viewport={"width": 1100, "height": 800}), []

    def open_tab(address, motion="no-preference"):
        page = context.new_page()
        page.set_default_timeout(20_000)  # a busy machine takes its time
        page.emulate_media(reduced_motion=motion)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.goto(address)
        page.wait_for_selector("#stage > *")
        return page

    yield open_tab
    context.close()
    assert problems == []


@pytest.fixture
def served():
    made = []

    def make(session, learns=None):
        made.append(Client(session, learns))
        return made[-1].server.address

    yield make
    for client in made:
        client.close()


def after(page, act):
    """Does something that answers, and waits until the next question is there."""
    before = page.inner_text("#count")
    act()
    page.wait_for_function(
        "before => document.querySelector('#count').textContent !== before", arg=before
    )


def press(page, *names):
    for name in names[:-1]:
        page.keyboard.press(name)
    after(page, lambda: page.keyboard.press(names[-1]))


def texts_of(page):
    return [node.inner_text() for node in page.query_selector_all("#stage .card > .text")]


# Pairs


def test_twenty_pairs_by_keyboard_alone(tmp_path, tab, served):
    session = session_of(write_run(tmp_path / "run", 20), again=False)
    page = tab(served(session))
    keys = ["a", "b", "t", "x", "ArrowLeft", "ArrowRight", "1", "2", "=", "B"] * 2
    shown = []
    for key in keys:
        shown.append(texts_of(page))
        press(page, key)
    first, second, tie = [0, 1], [1, 0], [[0, 1]]
    rankings = [first, second, tie, tie, first, second, first, second, tie, second] * 2
    labels = labels_of(session)
    assert [entry["responses"] for entry in labels] == shown
    assert [entry["ranking"] for entry in labels] == rankings
    assert [i for i, e in enumerate(labels) if e.get("both_bad")] == [3, 13]
    assert all(0 < entry["seconds"] < 60 for entry in labels)
    assert page.inner_text("#title") == "That was all"
    press(page, "u")
    assert len(labels_of(session)) == 19 and texts_of(page) == shown[-1]


def test_undo_skip_and_reason(tmp_path, tab, served):
    session = session_of(write_run(tmp_path / "run"), again=False)
    page = tab(served(session))
    first = texts_of(page)
    press(page, "a")
    second = texts_of(page)
    press(page, "s")
    assert len(labels_of(session)) == 1
    press(page, "u")
    assert texts_of(page) == second
    press(page, "u")
    assert texts_of(page) == first and labels_of(session) == []
    page.keyboard.press("u")
    page.wait_for_function(
        "() => document.querySelector('#status').textContent.includes('nothing')"
    )
    page.keyboard.press("r")
    page.keyboard.type("a better u and s")  # the letters are no keys here
    press(page, "Enter", "b")
    (entry,) = labels_of(session)
    assert entry["reason"] == "a better u and s" and entry["ranking"] == [1, 0]
    after(page, lambda: page.click("text=A is better"))
    after(page, lambda: page.click("#undo"))
    assert len(labels_of(session)) == 1


def test_reload_two_tabs_and_a_held_key(tmp_path, tab, served):
    session = session_of(write_run(tmp_path / "run"), again=False)
    address = served(session)
    page, other = tab(address), tab(address)
    shown = texts_of(page)
    assert texts_of(other) != shown
    page.reload()
    page.wait_for_selector("#stage > *")
    assert texts_of(page) == shown
    press(other, "a")
    page.keyboard.press("u")  # what the other tab said stays, until it is asked for
    page.wait_for_function(
        "() => document.querySelector('#status').textContent.includes('Another tab')"
    )
    assert len(labels_of(session)) == 1
    before = page.inner_text("#count")
    page.keyboard.down("a")
    page.keyboard.down("a")  # a key held down repeats
    page.wait_for_function(
        "before => document.querySelector('#count').textContent !== before", arg=before
    )
    page.keyboard.down("a")
    page.keyboard.up("a")
    page.wait_for_timeout(100)
    assert [e["responses"] for e in labels_of(session)][1:] == [shown]


def test_the_server_is_killed_and_started_again(tmp_path, tab):
    run = write_run(tmp_path / "run")
    process, address = serve(run, "--no-again")
    page = tab(address)
    press(page, "a")
    shown = texts_of(page)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    page.keyboard.press("b")  # kept in the page, and sent until somebody answers
    page.wait_for_function("() => document.querySelector('#status').textContent.includes('kept')")
    process, again = serve(run, "--no-again")
    assert again == address
    page.wait_for_function("() => document.querySelector('#status').textContent === 'Saved.'")
    labels = [json.loads(line) for line in (run / "labels.jsonl").read_text().splitlines()]
    assert [entry["ranking"] for entry in labels] == [[0, 1], [1, 0]]
    assert labels[1]["responses"] == shown
    process.terminate()
    process.wait()


def test_markup_in_texts_does_nothing(tmp_path, tab, served):
    run = tmp_path / "run"
    run.mkdir()
    row = {"prompt": ATTACK, "before": ATTACK, "after": "</p><svg onload=alert(3)>"}
    (run / "samples.jsonl").write_text(json.dumps(row))
    rules = tmp_path / "rules.md"
    rules.write_text(f"# {ATTACK}\n\n- {ATTACK}\n- two\n\nand {ATTACK}")
    session = session_of(run, guidelines=rules, out=tmp_path / "l.jsonl")
    page = tab(served(session))
    assert page.inner_text("#prompt") == ATTACK and set(texts_of(page)) == {
        row["before"], row["after"]
    }  # fmt: skip
    assert page.query_selector_all("#panel h3, #panel li, #panel p")
    assert page.query_selector("#body img, #body svg, #body script") is None
    press(page, "a")
    assert labels_of(session)[0]["prompt"] == ATTACK


# Every other gesture, on prompts with three responses


def asked(tmp_path, tab, served, kind, motion="no-preference", words=0, **knobs):
    source = write_answers(tmp_path / "a.jsonl", words=words)
    session = session_of(source, kind=kind, n=3, again=False, **knobs)
    return session, tab(served(session), motion)


def test_ranking_by_digits_ties_and_drag(tmp_path, tab, served):
    session, page = asked(tmp_path, tab, served, "comparison")
    press(page, "3", "1", "Enter")
    press(page, "2", "3", "=", "Enter")
    press(page, "2", "Enter")
    page.keyboard.press("1")
    page.keyboard.press("Backspace")
    grip, top = page.query_selector_all(".grip")[2], page.query_selector_all(".grip")[0]
    box, to = grip.bounding_box(), top.bounding_box()
    page.mouse.move(box["x"] + 9, box["y"] + 9)
    page.mouse.down()
    page.mouse.move(box["x"] + 9, to["y"] - 20, steps=6)
    page.mouse.up()
    press(page, "Enter")
    said = [{k: e[k] for k in ("ranking", "best") if k in e} for e in labels_of(session)]
    assert said == [{"ranking": [2, 0, 1]}, {"ranking": [1, [2, 0]]}, {"best": 1},
                    {"ranking": [2, 0, 1]}]  # fmt: skip


def test_critique_and_thumbs(tmp_path, tab, served):
    session, page = asked(tmp_path, tab, served, "critique")
    press(page, "4")
    after(page, lambda: page.click("text=1 worst"))
    assert [(e["level"], e["of"]) for e in labels_of(session)] == [(3, 5), (0, 5)]
    thumbs = session_of(tmp_path / "a.jsonl", kind="critique", levels=2, out=tmp_path / "t.jsonl")
    page = tab(served(thumbs))
    press(page, "ArrowUp")
    press(page, "ArrowDown")
    assert [(e["level"], e["of"]) for e in labels_of(thumbs)] == [(1, 2), (0, 2)]


def test_curve_by_keys_and_by_drawing(tmp_path, tab, served):
    session, page = asked(tmp_path, tab, served, "intertemporal")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    press(page, "ArrowDown", "Enter")
    wells = [well.bounding_box() for well in page.query_selector_all(".well")]
    page.mouse.move(wells[0]["x"] + 5, wells[0]["y"] + wells[0]["height"] * 0.9)
    page.mouse.down()
    page.mouse.move(wells[-1]["x"] + 5, wells[-1]["y"] + wells[-1]["height"] * 0.1)
    page.mouse.up()
    press(page, "Enter")
    by_keys, drawn = labels_of(session)
    ends, values = zip(*by_keys["curve"], strict=True)
    assert values[:2] == (0.7, 0.4) and set(values[2:]) <= {0.5}
    assert ends[-1] == len(by_keys["response"])
    values = [value for _, value in drawn["curve"]]
    assert values[0] == pytest.approx(0.1, abs=0.02) and values == sorted(values)
    assert values[-1] == pytest.approx(0.9, abs=0.02)


def test_weights_sort_what_is_shown(tmp_path, tab, served):
    session, page = asked(tmp_path, tab, served, "proxy")
    assert page.is_disabled("text=Done")
    page.focus("input[aria-label=words]")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    lengths = [len(node.inner_text()) for node in page.query_selector_all(".list .text")]
    assert lengths == sorted(lengths, reverse=True)
    press(page, "Enter")
    (entry,) = labels_of(session)
    assert entry["weights"]["words"] == 1 and sum(entry["weights"].values()) == 1
    assert {**entry["weights"], "words": -1} in entry["others"]


def test_faces_words_and_the_odd_one(tmp_path, tab, served):
    session, page = asked(tmp_path, tab, served, "social,language,similarity")
    press(page, "3")
    page.keyboard.press("r")
    page.keyboard.type("warmer, please")
    page.keyboard.press("Escape")
    press(page, "Shift+Digit1")
    press(page, "2")
    face, words, odd = labels_of(session)
    assert face["reaction"] == "smile" and odd["odd"] == 1
    assert (words["utterance"], words["remark"]) == ("less words", "warmer, please")
    assert len(words["others"]) == 2 and "reason" not in words


def test_editing(tmp_path, tab, served):
    session, page = asked(tmp_path, tab, served, "improvement")
    text = page.input_value("textarea")
    page.keyboard.press("Control+Enter")  # nothing is better yet
    page.keyboard.press("End")
    page.keyboard.type(" us 👍é")
    press(page, "Control+Enter")
    (entry,) = labels_of(session)
    assert (entry["response"], entry["improved"]) == (text, text + " us 👍é")


def test_stops(tmp_path, tab, served):
    session, page = asked(tmp_path, tab, served, "estop", words=20)
    seen = ".word:not(.hidden)"
    page.wait_for_function(f"() => document.querySelectorAll('{seen}').length >= 3")
    page.keyboard.press("Space")
    assert "place" in page.inner_text("#title")
    kept = page.evaluate(
        "[...document.querySelectorAll('.word')].findIndex(w => w.matches('.last'))"
    )
    press(page, "ArrowLeft", "Enter")
    page.query_selector_all(".word")[-1].click()  # it was good to the last word
    press(page, "Enter")
    moved, ran = labels_of(session)
    words = moved["response"].split(" ")
    assert 2 <= kept < len(words) and moved["stop"] == len(" ".join(words[:kept]))
    assert ran["stop"] is None


def test_a_text_that_may_run_to_its_end(tmp_path, tab, served):
    session, page = asked(tmp_path, tab, served, "estop")
    page.keyboard.press("Enter")  # not before it has
    page.wait_for_selector("text=It may run to its end")
    press(page, "Enter")
    assert [entry["stop"] for entry in labels_of(session)] == [None]


def test_stop_without_motion_is_a_click(tmp_path, tab, served):
    session, page = asked(tmp_path, tab, served, "estop", "reduce")
    page.query_selector_all(".word")[1].click()
    press(page, "Enter")
    (entry,) = labels_of(session)
    first_two = " ".join(entry["response"].split(" ")[:2])
    assert entry["stop"] == len(first_two)


def test_marks(tmp_path, tab, served):
    session, page = asked(tmp_path, tab, served, "importance")
    left, right = page.query_selector_all(".words")
    left.query_selector_all(".word")[1].click()
    left.query_selector_all(".word")[0].click()
    right.query_selector_all(".word")[0].focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    press(page, "b")
    (entry,) = labels_of(session)
    one, other = entry["responses"]
    assert entry["ranking"] == [1, 0]
    (span,), (word,) = entry["marks"]
    assert one[slice(*span)].split() == one.split()[:2]
    assert other[slice(*word)] == other.split()[1]


def test_sorting_along_a_feature(tmp_path, tab, served):
    session, page = asked(tmp_path, tab, served, "trace", feature="words")
    assert "“words”" in page.inner_text("#title")
    texts = [node.inner_text() for node in page.query_selector_all(".list .text")]
    order = sorted(range(3), key=lambda i: len(texts[i]))
    page.keyboard.press("Enter")  # nothing is sorted yet
    press(page, *(str(i + 1) for i in order), "Enter")
    (entry,) = labels_of(session)
    assert entry["responses"] == [texts[i] for i in order] and entry["feature"] == "words"


# Beside the questions


def test_panels(tmp_path, tab, served):
    from test_page import Learner

    session = session_of(write_run(tmp_path / "run"), again=False, reveal=True)
    page = tab(served(session, learning.Learning(session, Learner)))
    for _ in range(3):
        press(page, "a")
    assert "A: " in page.inner_text("#status")
    page.keyboard.press("q")
    page.wait_for_selector("text=First side chosen")
    assert "100 %" in page.inner_text("#panel")
    page.keyboard.press("?")
    page.wait_for_selector("text=as often as you like")
    page.keyboard.press("l")
    page.click("text=Train now")
    page.wait_for_selector("svg.chart")
    assert "disagrees" in page.inner_text("#panel")
    page.click("text=Write with it")
    page.wait_for_selector("text=written to prompt")
    press(page, "b")
    assert len(labels_of(session)) == 4


def test_nothing_is_wider_than_a_phone(tmp_path, tab, served):
    """320 wide is also 1280 at 400 %."""
    _, page = asked(tmp_path, tab, served, "all")
    page.set_viewport_size({"width": 320, "height": 600})
    titles = set()
    for _ in range(11):
        titles.add(page.inner_text("#title"))
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        unnamed = page.evaluate("""[...document.querySelectorAll('button, input, textarea, [role]')]
            .filter(n => !n.hidden && !(n.textContent.trim() || n.ariaLabel || n.labels?.length
                         || n.getAttribute('aria-labelledby') || n.role === 'status')).length""")
        assert unnamed == 0
        after(page, lambda: page.click("#skip"))
    assert len(titles) == 11
