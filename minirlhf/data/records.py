"""Files of human feedback: JSONL, one object a line, in any of six forms.

A bad line is an error that names it. Files may come from strangers: sizes are bounded, and nothing
is executed or written.

Left out: other file formats; dialogues keep the plain-text form of Bai et al. 2022.
"""

import gzip
import os
import re
import zlib

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import LIMIT, number_of, parse_json, shown


def read_lines(path):
    """Yields (number, text) of each line that is not blank.

    Raises UserError, also for a line over LIMIT and for a decompression bomb.
    """
    packed = path.suffix == ".gz"
    number = 0
    try:
        with (gzip.open if packed else open)(path, "rb") as file:
            for number, line in numbered_lines(file, path):
                if line.strip():
                    yield number, line.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, zlib.error, EOFError) as e:
        raise UserError(f"{path}: not readable{' as gzip' if packed else ''}: {e}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}, line {number}: not UTF-8: {e}") from None


def numbered_lines(file, path):
    """Yields (number, bytes) of each line of an open file, of which it reads LIMIT at most."""
    room = max(LIMIT, 200 * path.stat().st_size)  # text is packed 3 to 10 times, a bomb 1,000 times
    lines = iter(lambda: file.readline(LIMIT + 1), b"")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        room -= len(line)
        if len(line) > LIMIT:
            size = f"{LIMIT >> 20} MiB"
            raise UserError(f"{where}: a line of over {size}; expected one record a line")
        if room < 0:
            expected = "expected records"
            raise UserError(f"{where}: unpacks to over 200 times the file's size; {expected}")
        yield number, line


def parse_record(line, where):
    """(prompt, responses best first, the record's number or None) of one line. Raises UserError.

    {"prompt", "chosen", "rejected"}, as text or as lists of {"role", "content"}
    {"chosen", "rejected"}, two dialogues that share a prefix (Bai et al. 2022)
    {"prompt", "responses", "ranking"}, indices best first
    {"prompt", "response", "rating"}
    {"prompt", "response", "label"}, true or false: thumbs up or down

    The number is the rating or label of a single response; a comparison may have a "margin", how
    far each score should lead those of worse responses (Llama 2).
    """
    record = parse_json(line, where)
    keys = set(record) if isinstance(record, dict) else set()
    prompt = text_of(record["prompt"], where, "prompt") if "prompt" in keys else None
    margin = number_of(record["margin"], where, "margin") if "margin" in keys else None
    if {"chosen", "rejected"} <= keys:
        prompt, pair = parse_pair(record, where, prompt)
        return prompt, pair, margin
    if {"prompt", "responses", "ranking"} <= keys:
        return prompt, parse_ranking(record, where), margin
    if {"prompt", "response", "rating"} <= keys:
        response = text_of(record["response"], where, "response")
        return prompt, [response], number_of(record["rating"], where, "rating")
    if {"prompt", "response", "label"} <= keys:
        label = record["label"]
        if type(label) is not bool:
            raise UserError(f"{where}: label: expected true or false, found {shown(label)}")
        return prompt, [text_of(record["response"], where, "response")], label
    raise UserError(
        f"{where}: found keys {str(sorted(keys))[:200]}, expected prompt+chosen+rejected, "
        "chosen+rejected, prompt+responses+ranking, prompt+response+rating, or "
        "prompt+response+label"
    )


def parse_pair(record, where, prompt):
    """(prompt, [chosen, rejected]), each without the prompt where both begin with it."""
    chosen = text_of(record["chosen"], where, "chosen")
    rejected = text_of(record["rejected"], where, "rejected")
    if prompt is None:
        prompt = shared_prefix(chosen, rejected)
    if chosen.startswith(prompt) and rejected.startswith(prompt):
        chosen = chosen.removeprefix(prompt)
        rejected = rejected.removeprefix(prompt)
    if chosen == rejected:
        raise UserError(f"{where}: chosen and rejected are the same text")
    return prompt, [chosen, rejected]


def parse_ranking(record, where):
    """The responses of a record, best first."""
    responses = record["responses"]
    ranking = record["ranking"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise UserError(f"{where}: responses: expected a list of at least 2")
    indices = list(range(len(responses)))
    numbers = isinstance(ranking, list) and all(type(i) is int for i in ranking)
    if not numbers or sorted(ranking) != indices:
        expected = f"expected the indices 0..{indices[-1]} of the responses, best first"
        raise UserError(f"{where}: ranking: {expected}")
    texts = [text_of(response, where, "responses") for response in responses]
    if len(set(texts)) < len(texts):
        raise UserError(f"{where}: responses: the same text twice")
    return [texts[i] for i in ranking]


def text_of(value, where, key):
    """A string as it is; a list of messages as a dialogue."""
    if isinstance(value, list) and all(map(is_message, value)):
        value = dialogue(value)
    if not isinstance(value, str):
        expected = "expected a string or a list of {role, content}"
        raise UserError(f"{where}: {key}: {expected}, found {shown(value)}")
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f"{where}: {key}: half a surrogate pair, which no text holds")
    return value


def is_message(value):
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def dialogue(messages):
    """Messages in the form of Bai et al. 2022: each a blank line, who speaks, and what."""
    names = {"user": "Human", "assistant": "Assistant"}
    turns = []
    for message in messages:
        role = message["role"]
        name = names.get(role, role.capitalize())
        turns.append(f"\n\n{name}: {message['content']}")
    return "".join(turns)


def shared_prefix(chosen, rejected):
    """What two dialogues share up to the last turn that begins in both, or words of plain text."""
    header = "\n\nAssistant:"
    prefix = os.path.commonprefix([chosen, rejected])
    turn = prefix.rfind(header)
    if turn >= 0:
        return prefix[: turn + len(header)]
    return prefix[: prefix.rfind(" ") + 1].rstrip()
