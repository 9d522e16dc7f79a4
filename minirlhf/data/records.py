"""Records: what one entry of a file says, whichever form it is written in.

    {"prompt", "chosen", "rejected"}, {"chosen", "rejected"}     a comparison of two
    {"prompt", "responses", "ranking"}                           of several, indices best first
    {"prompt", "response", "rating"}, {"prompt", "response", "label"}     one answer, rated
    {"prompt", "response"}, {"messages"}, {"text"}               one answer, to learn language from
    {"prompt", ...}                                              a prompt alone

Texts are strings or lists of {role, content}. A key has the names that public files give it:
NAMES_OF. A key that changes what was asked is rendered or refused; others are not used, and named.
"""

from typing import NamedTuple

from minirlhf.data.conversations import ASKING, prompt_and_answers, role_of, said
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import number_of, shown

NAMES_OF = {
    "prompt": ("prompt", "question", "instruction", "query"),
    "response": ("response", "completion"),
    "responses": ("responses", "completions"),
    "messages": ("messages", "conversations", "conversation"),
    "rating": ("rating", "score"),
    "system": ("system", "system_prompt"),
}
CHANGES = (
    "input", "context", "history", "documents", "tools", "functions", "tool_calls", "images",
    "image", "videos", "video", "audios", "audio",
)  # fmt: skip
FORMS = (
    "prompt+chosen+rejected, chosen+rejected, prompt+responses+ranking, prompt+response+rating, "
    "prompt+response+label, prompt+response, messages, text, or prompt"
)
LARGEST = 1e15  # of a rating or a margin: its square still is a number of 32 bits


class Record(NamedTuple):
    where: str
    kind: str  # comparison, rating, label, text (an answer without a word on it), prompt
    prompt: str
    responses: list  # best first in a comparison; none of a prompt alone
    number: float  # the rating; of a label 1 or 0; of a comparison how far worse ones should trail
    columns: dict  # of a prompt alone, what else stands there
    unused: tuple  # keys


def parse_record(given, where):
    """The Record of a dict. Raises UserError that says what is wrong with it."""
    if not isinstance(given, dict):
        raise UserError(f"{where}: expected an object, found {shown(given)}")
    entry = {key: value for key, value in given.items() if value is not None}
    for key in CHANGES:
        if entry.pop(key, None):
            raise UserError(f"{where}: {key} changes what was asked, and is left out here")
    named = by_name(entry, where)
    kind, keys = form_of(named, where)
    prompt, answers = texts_of(named, entry, keys, where)
    responses, number = answers, 0.0
    if kind == "comparison":
        responses = ranked(answers, named["ranking"] if "ranking" in keys else None, where)
        number = number_at(named, "margin", where, 0.0)
    elif kind == "rating":
        number = number_at(named, "rating", where)
    elif kind == "label":
        number = float(label(named["label"], where))
    used = {"margin"} if kind == "comparison" else set()
    used |= {"prompt", "messages", "system", *keys}
    unused = [key for key in entry if kind != "prompt" and common_name(key) not in used]
    columns = {}
    if kind == "prompt":
        columns = {key: given[key] for key in given if common_name(key) not in used}
    return Record(where, kind, prompt, responses, number, columns, tuple(unused))


def common_name(key):
    return next((name for name, names in NAMES_OF.items() if key in names), key)


def by_name(entry, where):
    """The entry with our names of its keys. Raises UserError where two say the same thing."""
    named, first = {}, {}
    for key, value in entry.items():
        name = common_name(key)
        if name in named and named[name] != value:
            raise UserError(f"{where}: {first[name]} and {key}: which of them counts?")
        named[name] = value
        first.setdefault(name, key)
    return named


def form_of(named, where):
    """(kind, the keys that hold its answers) of an entry. Raises UserError for none."""
    if {"chosen", "rejected"} <= named.keys():
        return "comparison", ("chosen", "rejected")
    if {"responses", "ranking"} <= named.keys():
        return "comparison", ("responses", "ranking")
    answer = next((key for key in ("response", "messages", "text") if key in named), None)
    if answer == "text" and "prompt" in named:
        answer = None
    if answer == "messages" and asks_last(named["messages"]):
        answer = None
    if answer:
        for kind in ("rating", "label"):
            if kind in named:
                return kind, (answer, kind)
        return "text", (answer,)
    others = {"chosen", "rejected", "responses", "label", "rating"} & named.keys()
    if {"prompt", "messages"} & named.keys() and not others:
        return "prompt", ()
    raise UserError(f"{where}: found keys {str(sorted(named))[:200]}, expected {FORMS}")


def texts_of(named, entry, keys, where):
    """(prompt, [responses]) of an entry; no response of a prompt alone."""
    values = {key: named[key] for key in keys if key not in ("rating", "label", "ranking")}
    if "responses" in values:
        if not isinstance(named["responses"], list) or len(named["responses"]) < 2:
            raise UserError(f"{where}: responses: expected a list of at least 2")
        answers = [said(value, where, "responses") for value in named["responses"]]
    else:
        answers = [said(value, where, key) for key, value in values.items()]
    prompt = None if "prompt" not in named else said(named["prompt"], where, "prompt")
    if isinstance(named.get("messages"), str):
        raise UserError(f"{where}: messages: expected a list of turns, found a text")
    if "messages" in named and "messages" not in keys:
        prompt = with_messages(prompt, said(named["messages"], where, "messages"), answers, where)
    system = named.get("system")
    if system is not None:
        system = said(system, where, "system")
    if isinstance(system, list) and len(system) == 1:
        system = system[0][1]
    if system is not None and not isinstance(system, str):
        raise UserError(f"{where}: system: expected a text, found {shown(system)}")
    system = system if system and system.strip() else None
    key = " and ".join(values)
    if answers:
        return prompt_and_answers(prompt, answers, system, where, key)
    if system is None and isinstance(prompt, str):
        return prompt, []
    return prompt_and_answers(prompt, [""], system, where, "prompt")[0], []


def asks_last(messages):
    """Whether messages end in a question."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    role = last.get("role", last.get("from")) if isinstance(last, dict) else None
    return isinstance(role, str) and role_of(role) in ASKING


def with_messages(prompt, messages, answers, where):
    """The prompt of an entry that has messages beside its answers: theirs, or its own."""
    if messages in answers:  # the answer once more
        return prompt
    if messages[-1][1] in answers or messages[-1:] in answers:
        messages = messages[:-1]
    if not messages:
        return prompt
    if prompt is None or prompt in (messages, messages[-1][1]):
        return messages
    raise UserError(f"{where}: messages: another conversation than that of prompt and answers")


def ranked(responses, order, where):
    """The responses of a comparison, best first: in that order, or as they come for None.

    Raises UserError where two are the same.
    """
    if order is None:
        which, order = "chosen and rejected are", [0, 1]
    else:
        which = "responses: two are"
        numbers = isinstance(order, list) and all(type(i) is int for i in order)
        if not numbers or sorted(order) != list(range(len(responses))):
            expected = f"expected the indices 0..{len(responses) - 1} of the responses, best first"
            raise UserError(f"{where}: ranking: {expected}")
    if len(set(responses)) < len(responses):
        raise UserError(f"{where}: {which} the same text")
    return [responses[i] for i in order]


def number_at(named, key, where, default=None):
    if key not in named and default is not None:
        return default
    number = number_of(named[key], where, key)
    if abs(number) > LARGEST:
        raise UserError(f"{where}: {key}: {number:g} is beyond {LARGEST:g}")
    return number


def label(value, where):
    if type(value) not in (bool, int, float) or value not in (0, 1):
        raise UserError(f"{where}: label: expected true or false, found {shown(value)}")
    return value == 1
