"""Files of human feedback: JSONL, one object a line, in any of six forms; and the archive of the reviews.

A bad line is an error that names it. Files may come from strangers: sizes are bounded, and nothing is executed or written.

Left out: other file formats; dialogues keep the plain-text form of Bai et al. 2022.
"""

import gzip
import os
import re
import zlib

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import LIMIT, number_of, parse_json, shown


def read_lines(path):
    """(number, text) of each line that is not blank. Raises UserError, also for a line over LIMIT and for a decompression bomb."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            room = max(LIMIT, 200 * path.stat().st_size)  # text is packed 3 to 10 times, a bomb 1,000 times
            for number, line in enumerate(iter(lambda: lines.readline(LIMIT + 1), b""), 1):
                room -= len(line)
                if len(line) > LIMIT:
                    raise UserError(f"{path}, line {number}: a line of over {LIMIT >> 20} MiB; expected one record a line")
                if room < 0:
                    raise UserError(f"{path}, line {number}: unpacks to over 200 times the file's size; expected records")
                if line.strip():
                    yield number, line.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, zlib.error, EOFError) as e:
        raise UserError(f"{path}: not readable{' as gzip' if path.suffix == '.gz' else ''}: {e}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}, line {number}: not UTF-8: {e}") from None


def parse_record(line, where):
    """(prompt, responses best first, the record's number or None) of one line in any of the forms below. Raises UserError.

    {"prompt", "chosen", "rejected"}, as text or as lists of {"role", "content"}; {"chosen", "rejected"}, two dialogues that share a
    prefix (Bai et al. 2022); {"prompt", "responses", "ranking"}, indices best first; {"prompt", "response", "rating"};
    {"prompt", "response", "label"}, true or false: thumbs up or down. The number is the rating or label of a single response; a
    comparison may have a "margin", how far each score should lead those of worse responses (Llama 2).
    """
    record = parse_json(line, where)
    keys = set(record) if isinstance(record, dict) else set()
    prompt = text_of(record["prompt"], where, "prompt") if "prompt" in keys else ""
    margin = number_of(record["margin"], where, "margin") if "margin" in keys else None
    if {"chosen", "rejected"} <= keys:
        chosen, rejected = (text_of(record[key], where, key) for key in ("chosen", "rejected"))
        if "prompt" not in keys:
            prompt = shared_prefix(chosen, rejected)
        pair = [chosen, rejected]
        if chosen.startswith(prompt) and rejected.startswith(prompt):
            pair = [text.removeprefix(prompt) for text in pair]
        if pair[0] == pair[1]:
            raise UserError(f"{where}: chosen and rejected are the same text")
        return prompt, pair, margin
    if {"prompt", "responses", "ranking"} <= keys:
        responses, ranking = record["responses"], record["ranking"]
        if not isinstance(responses, list) or len(responses) < 2:
            raise UserError(f"{where}: responses: expected a list of at least 2")
        if not isinstance(ranking, list) or [type(i) for i in ranking] != [int] * len(responses) or len(set(ranking)) < len(ranking) \
                or not 0 <= min(ranking) <= max(ranking) < len(ranking):  # fmt: skip
            raise UserError(f"{where}: ranking: expected the indices 0..{len(responses) - 1} of the responses, best first")
        texts = [text_of(response, where, "responses") for response in responses]
        if len(set(texts)) < len(texts):
            raise UserError(f"{where}: responses: the same text twice")
        return prompt, [texts[i] for i in ranking], margin
    if {"prompt", "response", "rating"} <= keys:
        return prompt, [text_of(record["response"], where, "response")], number_of(record["rating"], where, "rating")
    if {"prompt", "response", "label"} <= keys:
        if type(record["label"]) is not bool:
            raise UserError(f"{where}: label: expected true or false, found {shown(record['label'])}")
        return prompt, [text_of(record["response"], where, "response")], record["label"]
    raise UserError(
        f"{where}: found keys {str(sorted(keys))[:200]}, expected prompt+chosen+rejected, chosen+rejected, prompt+responses+ranking, "
        "prompt+response+rating, or prompt+response+label"
    )


def text_of(value, where, key):
    """A string as it is; a list of messages as a dialogue in the form of Bai et al. 2022."""
    if isinstance(value, str):
        if re.search("[\ud800-\udfff]", value):
            raise UserError(f"{where}: {key}: half a surrogate pair, which no text holds")
        return value
    if not isinstance(value, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        raise UserError(f"{where}: {key}: expected a string or a list of {{role, content}}, found {shown(value)}")
    names = {"user": "Human", "assistant": "Assistant"}
    return text_of("".join(f"\n\n{names.get(m['role'], m['role'].capitalize())}: {m['content']}" for m in value), where, key)


def shared_prefix(chosen, rejected):
    """What two dialogues share up to the last turn that begins in both; what they share of plain text, up to a word."""
    prefix = os.path.commonprefix([chosen, rejected])
    turn = prefix.rfind("\n\nAssistant:")
    return prefix[: turn + len("\n\nAssistant:")] if turn >= 0 else prefix[: prefix.rfind(" ") + 1].rstrip()
