"""Conversations: who said what, turn after turn, and the one text that is made of them.

A dialogue is a list of turns (role, content) until its text is made, by `render` alone, in the
form of Bai et al. 2022: each turn a blank line, who speaks, and what. The prompt of an answer is
everything up to and including the header of the answer's turn. A plain string stays as it is.

Left out: chat templates, tool calls, images and audio, thinking apart from its answer.
"""

import os
import re

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import shown

ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "developer": "system"}
NAMES = {"user": "Human"}  # others by their role, as in Assistant
ASKING = ("system", "user")
ANSWERING = ("assistant", "model", "bot")
LEFT_OUT = (
    "tool_calls", "function_call", "images", "image", "videos", "video", "audios", "audio",
    "thinking", "reasoning_content", "refusal",
)  # fmt: skip
HEADERS = re.compile(r"\n\n\w+:")
HEADER = re.compile(r"\n\n\w+:\s*$")  # at the end of a prompt
TAGGED = re.compile(r"\s*(Human|System|Assistant): ")  # at the start of a dialogue that is a text


def header(role):
    return f"\n\n{NAMES.get(role, role.capitalize())}:"


def render(turns):
    """The text of turns."""
    return "".join(f"{header(role)} {content}" for role, content in turns)


# Out of a record: text stays a string, messages become turns


def said(value, where, key):
    """A string, or the turns of a message or of a list of messages. Raises UserError."""
    if isinstance(value, str):
        return whole(value, where, key)
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        expected = "expected a string or a list of {role, content}"
        raise UserError(f"{where}: {key}: {expected}, found {shown(value)}")
    if not messages:
        raise UserError(f"{where}: {key}: an empty list of turns")
    return [turn(message, where, key) for message in messages]


def turn(message, where, key):
    """(role, content) of {role, content}, or of ShareGPT's {from, value}."""
    for name in LEFT_OUT:
        if message.get(name):
            raise UserError(f"{where}: {key}: a turn with {name}, which is left out here")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or not role.strip():
        expected = "expected a string or a list of {role, content}"
        raise UserError(f"{where}: {key}: {expected}, found a turn of role {shown(role)}")
    if isinstance(content, list):
        content = "".join(text_part(part, where, key) for part in content)
    if not isinstance(content, str):
        expected = "expected a text"
        raise UserError(f"{where}: {key}: a turn's content is {shown(content)}, {expected}")
    return role_of(whole(role, where, key)), whole(content, where, key)


def role_of(name):
    """A role by the one name that it has here."""
    name = name.strip().lower()
    return ROLES.get(name, name)


def text_part(part, where, key):
    """The text of one part of a turn. Raises UserError for an image, say."""
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        found = f"a part of type {shown(kind)}"
        raise UserError(f"{where}: {key}: {found}; only parts of type text are read")
    return part["text"]


def whole(text, where, key):
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: {key}: half a surrogate pair, which no text holds")
    return text


# The prompt, and the answers to it


def prompt_and_answers(prompt, answers, system, where, key):
    """(prompt, [response of each answer]) as texts.

    prompt: a string, turns, or None where the answers hold it; answers: all strings, or all turns;
    system: a text before all, or None. Raises UserError where they do not go together.
    """
    kinds = {isinstance(answer, str) for answer in answers}
    if len(kinds) > 1:
        raise UserError(f"{where}: {key}: some are texts and some are turns")
    if isinstance(prompt, list) and prompt[-1][0] in ANSWERING:
        raise UserError(f"{where}: prompt: it ends in an answer, expected a question")
    if not isinstance(answers[0], str):
        return around_turns(prompt or None, answers, system, where, key)
    if system is not None:
        prompt, answers = texts_with_system(prompt, answers, system, where)
    return around_texts(prompt, answers, where, key)


def around_texts(prompt, answers, where, key):
    """Answers that are strings: they lose a prompt only where it is a dialogue before them."""
    if prompt is None:
        before = shared_prefix(answers)
        return before, [answer.removeprefix(before) for answer in answers]
    is_text = isinstance(prompt, str)
    before = prompt if is_text and HEADER.search(prompt) else None
    if not before and all(map(is_dialogue, answers)):
        before = shared_prefix(answers)
        contents = [part.strip() for part in HEADERS.split(before)]
        asked = prompt.strip() if is_text else prompt[-1][1].strip()
        if asked not in contents and not before.startswith(prompt if is_text else render(prompt)):
            raise UserError(f"{where}: prompt: none of the turns of {key}")
    holds = [bool(before) and answer.startswith(before) for answer in answers]
    if all(holds):
        return before, [answer.removeprefix(before) for answer in answers]
    if any(holds):
        raise UserError(f"{where}: {key}: the prompt stands in some of them, not in all")
    if is_text:
        return prompt, answers
    return render(prompt) + header("assistant"), [f" {answer}" for answer in answers]


def is_dialogue(text):
    """Whether a text is a whole dialogue, in its tags."""
    return bool(TAGGED.match(text)) and header("assistant") in text


def shared_prefix(answers):
    """What dialogues share up to the last answer that begins in all, or words of plain text."""
    prefix = os.path.commonprefix(answers)
    answer = header("assistant")
    place = prefix.rfind(answer)
    if place >= 0 and (len(answers) > 1 or is_dialogue(prefix)):
        return prefix[: place + len(answer)]
    return prefix[: prefix.rfind(" ") + 1].rstrip() if len(answers) > 1 else ""


def texts_with_system(prompt, answers, system, where):
    """(prompt, answers) with a system text, which makes a conversation of a plain question."""
    first = render([("system", system)])
    if all(map(is_dialogue, answers)):
        return prompt, [first + answer for answer in answers]
    if prompt is None:
        raise UserError(f"{where}: system: a text without a prompt has no place for it")
    if isinstance(prompt, list):
        return with_system(prompt, system, where), answers
    if HEADER.search(prompt):
        return first + prompt, answers
    return [("system", system), ("user", prompt)], answers


def around_turns(prompt, answers, system, where, key):
    """Answers that are turns: what they share stands before the first answer that differs."""
    if isinstance(prompt, str) and HEADER.search(prompt) and max(map(len, answers)) == 1:
        prompt = prompt if system is None else render([("system", system)]) + prompt
        return around_texts(prompt, [" " + body(answer) for answer in answers], where, key)
    dialogues = [whole_dialogue(prompt, answer, where, key) for answer in answers]
    if system is not None:
        dialogues = [with_system(turns, system, where) for turns in dialogues]
    n = shared_turns(dialogues)
    if len(dialogues) == 1:
        n = len(dialogues[0]) - 1
        if isinstance(prompt, list):
            after = len(without_system(dialogues[0])) - len(without_system(prompt))
            n = len(dialogues[0]) - after
        if dialogues[0][-1][0] in ASKING:
            raise UserError(f"{where}: {key}: the last turn is a question, without an answer")
    while n > 0 and not answers_begin(dialogues, n):
        n -= 1  # one ends here, or they differ in a question: back to an answer that both begin
    if not answers_begin(dialogues, n):
        raise UserError(f"{where}: {key}: no answer, or answers to different questions")
    text = render(dialogues[0][:n]) + header(dialogues[0][n][0])
    return text, [" " + body(turns[n:]) for turns in dialogues]


def whole_dialogue(prompt, answer, where, key):
    """The turns of an answer with those of the prompt before it, unless it holds them."""
    if prompt is None:
        return answer
    asked = [content.strip() for _, content in answer[:-1]]
    if isinstance(prompt, str):
        if prompt.strip() in asked:
            return answer
        if any(role in ASKING for role, _ in answer):
            raise UserError(f"{where}: prompt: none of the turns of {key}")
        return [("user", prompt), *answer]
    own, given = without_system(prompt), without_system(answer)
    if len(given) > len(own) and given[: len(own)] == own:
        first = prompt[: len(prompt) - len(own)]
        return with_system(answer, first[0][1], where) if first else answer
    return prompt + answer


def without_system(turns):
    return turns[1:] if turns[0][0] == "system" else turns


def with_system(turns, text, where):
    """The turns with a system text first, which may stand there already."""
    if not turns or turns[0][0] != "system":
        return [("system", text), *turns]
    if turns[0][1].strip() != text.strip():
        raise UserError(f"{where}: two system texts: which of them counts?")
    return turns


def shared_turns(dialogues):
    """How many turns all of them begin with."""
    n = 0
    while all(len(turns) > n for turns in dialogues) and len({t[n] for t in dialogues}) == 1:
        n += 1
    return n


def answers_begin(dialogues, n):
    """Whether all have a turn n, of one role, and that is no question."""
    roles = {turns[n][0] if n < len(turns) else None for turns in dialogues}
    return len(roles) == 1 and not roles & {*ASKING, None}


def body(turns):
    """Turns as text without the header of the first."""
    return render(turns).removeprefix(header(turns[0][0]) + " ")
