"""The house stands: width and budgets, arrows between the rooms, what the READMEs must name.

It reads the source alone, but for the fixed names, which it imports. Each failure says what to do.
"""

import ast
import importlib
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minirlhf"
SCRIPTS = sorted(ROOT.glob("train_*.py"))
LESSON = sorted(PACKAGE.glob("*.py"))
IN_ROOMS = sorted(set(PACKAGE.rglob("*.py")) - set(LESSON))
ROOMS = sorted(folder.parent.name for folder in PACKAGE.glob("*/__init__.py"))
README = ROOT / "README.md"
HANDED_ON = {PACKAGE / "reward_eval.py"}  # a room's names, under the one that others import

WIDTH = 100
README_LINES = 300
ROOM_README_LINES = (15, 150)  # about a page to a page and a half, with its tables
SCRIPT_LINES, MODULE_LINES, FUNCTION_LINES, GPT_LINES, STORY_LINES = 350, 400, 60, 260, 2600
TOKENS_OF_STORY, TOKENS_OF_ROOMS = 11.0, 12.5  # of a line of code; kernels/ has no limit

MACHINERY = ("engine", "kernels")
PEOPLE = ("data", "feedback", "rewards", "online", "look")
PURE = ("reward", "ppo", "dpo", "lists")  # tensors in, tensors out
STORY = ("gpt", "tokenizer", "sampling", *PURE)

# No word of these in the machinery, be it a name, a comment, a docstring or a string
WORDS = """rlhf ppo dpo grpo rloo kto reward rewards rewarded policy policies preference preferences
    prefer prefers preferred critic critics advantage advantages human humans rating ratings rated
    rater raters labeler labelers annotator annotators"""
ALLOWED = {  # (file, word): why it has to stand there
    ("engine/weights.py", "reward"): "a message names which of two headed models lies on the disk",
    ("engine/weights.py", "preference"): "the same",
}


# Reading the source


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, kinds)]


def docstring_lines(path):
    """The numbers of all lines that a docstring stands on."""
    lines = set()
    for node in ast.walk(tree_of(path)):
        has = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if has and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines.update(range(text.lineno, text.end_lineno + 1))
    return lines


def tokens_a_line(source, without=()):
    """Tokens of code over lines that have one; comments, line ends, indents and the lines
    `without` are none. An f-string is one token, whatever the Python."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    layout.add(tokenize.ENDMARKER)
    opened = getattr(tokenize, "FSTRING_START", None)  # Python 3.12 takes them apart
    closed = getattr(tokenize, "FSTRING_END", None)
    tokens, lines, depth = 0, set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        first, last = token.start[0], token.end[0]
        if token.type in layout or first in without:
            continue
        depth -= token.type == closed
        if depth == 0 and token.type != closed:
            tokens += 1
        depth += token.type == opened
        lines.update(range(first, last + 1))
    return round(tokens / max(1, len(lines)), 1)


def fail_if(wrong, advice):
    """Fails where anything is wrong, with what to do and where."""
    if wrong:
        places = [f"  {place}" for place in wrong]
        pytest.fail("\n".join([advice, *places]), pytrace=False)


# Width and budgets


def texts():
    found = [*ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / ".ci" / "run", *SCRIPTS]
    for folder in (PACKAGE, ROOT / "tests"):
        found += [path for path in folder.rglob("*") if path.suffix in (".py", ".md", ".toml")]
    return sorted(found)


def test_a_hundred_columns():
    wrong = []
    for path in texts():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > WIDTH:
                wrong.append(f"{name_of(path)}:{number} has {len(line)}")
    fail_if(wrong, f"Lines of more than {WIDTH} columns: break a statement where it has parts, or "
                   "name a part; reshape a table:")  # fmt: skip


def test_files_stay_short():
    limits = dict.fromkeys(SCRIPTS, SCRIPT_LINES) | dict.fromkeys(LESSON, MODULE_LINES)
    limits |= dict.fromkeys(IN_ROOMS, MODULE_LINES) | {PACKAGE / "gpt.py": GPT_LINES}
    limits[README] = README_LINES
    wrong = []
    for path, limit in limits.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > limit:
            wrong.append(f"{name_of(path)} has {lines} lines, at most {limit}")
    fail_if(wrong, "Files that are too long: move what a reader of the story can do without to a "
                   "room, or a second idea to a file of its own. The limits are this repository's: "
                   "a fork may raise them, at the head of tests/test_house.py:")  # fmt: skip


def test_the_story_stays_short():
    told = [path for path in SCRIPTS + LESSON if path not in HANDED_ON]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in told}
    long = [f"{name_of(path)} {n}" for path, n in sorted(lines.items(), key=lambda item: -item[1])]
    total = sum(lines.values())
    fail_if(total > STORY_LINES and long,
            f"Scripts and minirlhf/*.py have {total} lines, at most {STORY_LINES} together: move "
            "to a room what is not the method itself:")  # fmt: skip


def test_functions_fit_a_screen():
    wrong = []
    for path in SCRIPTS + LESSON + IN_ROOMS:
        for node in functions(path):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                wrong.append(f"{name_of(path)}: {node.name} has {lines} lines")
    fail_if(wrong, f"Functions of more than {FUNCTION_LINES} lines: give one of their steps a name "
                   "of its own:")  # fmt: skip


def test_lines_are_easy():
    limits = dict.fromkeys(SCRIPTS + LESSON, TOKENS_OF_STORY)
    limits |= {p: TOKENS_OF_ROOMS for p in IN_ROOMS if PACKAGE / "kernels" not in p.parents}
    wrong = []
    for path, limit in limits.items():
        density = tokens_a_line(path.read_text(encoding="utf-8"), docstring_lines(path))
        if density > limit:
            wrong.append(f"{name_of(path)} has {density}, at most {limit}")
    fail_if(wrong, "Too many tokens a line of code, and joined lines make it worse: one idea a "
                   "statement, and names for what lies between:")  # fmt: skip


def test_tokens_are_counted():
    """By hand."""
    code = 'x = 1  # a comment\n\nif x:\n    y = f"{x} {x + 1}", [\n        2,\n    ]\n'
    assert tokens_a_line(code) == 2.8  # 3, 3, 5, 2 and 1 on 5 lines
    assert tokens_a_line(code, without={4, 5, 6}) == 3
    assert tokens_a_line('"""\none\n"""\n') == 0.3
    assert tokens_a_line("") == 0


# Arrows


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SCRIPTS + LESSON + IN_ROOMS}


@cache
def imports(name):
    """The project's modules that a module imports, wherever the import stands: {name: line}."""
    path, found = MODULES[name], {}
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree_of(path)):
        for target in targets(node, package):
            while target and target not in MODULES:  # a name in a module, not a module
                target = target.rpartition(".")[0]
            if target and target != name:
                found.setdefault(target, node.lineno)
    return found


def targets(node, package):
    """The full names of what an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    source = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        source = ".".join([*above, *filter(None, [node.module])])
    return [f"{source}.{alias.name}" for alias in node.names]


def room_of(name):
    """engine for minirlhf.engine.cli; None for scripts and the files of the lesson."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def arrows(names, forbidden):
    """Imports by `names` of what forbidden(name) says of, a line each."""
    wrong = []
    for name in names:
        for target, line in sorted(imports(name).items()):
            if forbidden(target):
                wrong.append(f"{name_of(MODULES[name])}:{line} imports {target}")
    return wrong


def test_machinery_imports_nothing_of_the_rest():
    names = [name for name in MODULES if room_of(name) in MACHINERY]
    wrong = arrows(names, lambda target: room_of(target) not in MACHINERY)
    fail_if(wrong, "engine/ and kernels/ could serve any training of a GPT: hand them what they "
                   "need as an argument:")  # fmt: skip


def test_the_lesson_needs_no_room_of_people():
    names = [f"minirlhf.{name}" for name in STORY]
    wrong = arrows(names, lambda target: room_of(target) not in (None, *MACHINERY))
    wrong += arrows(names, lambda target: target == "minirlhf.sft")
    fail_if(wrong, "Arrows point from the rooms to the lesson: move the function to the room, or "
                   "what it needs to the lesson:")  # fmt: skip


def test_the_maths_imports_nothing_of_the_package():
    wrong = arrows([f"minirlhf.{name}" for name in PURE], lambda target: True)
    fail_if(wrong, "The maths is tensors in, tensors out, each a file that can be copied alone: "
                   "pass in what it needs:")  # fmt: skip


def test_rooms_do_not_know_the_stages():
    names = [name for name in MODULES if room_of(name) in PEOPLE]
    wrong = arrows(names, lambda target: target == "minirlhf.sft" or room_of(target) == "bench")
    fail_if(wrong, "Scripts, sft.py and bench/ import the rooms, not the other way: move to a room "
                   "what both need:")  # fmt: skip


def test_no_module_imports_a_script():
    names = [name for name in MODULES if name.startswith("minirlhf")]
    wrong = arrows(names, lambda target: not target.startswith("minirlhf"))
    fail_if(wrong, "A script is the top of the house: move what others need of it to a room, or "
                   "take the script as an argument:")  # fmt: skip


def way_back(start):
    """The shortest way along imports from a module to itself, or None."""
    ways, seen = [[start]], set()
    for way in ways:
        for target in imports(way[-1]):
            if target == start:
                return [*way, start]
            if target not in seen:
                seen.add(target)
                ways.append([*way, target])
    return None


def test_no_circle():
    ways = {}
    for name in MODULES:
        way = way_back(name)
        if way:
            ways.setdefault(frozenset(way), " -> ".join(way))
    fail_if(ways.values(), "Modules that import each other in a circle (an import in a function "
                           "counts): move what both need below both:")  # fmt: skip


def test_arrows_are_seen(tmp_path, monkeypatch):
    """Each form of an import statement, in a small house of its own."""
    forms = {
        "minirlhf": "",
        "minirlhf.gpt": "def f():\n    from .data.rows import fit, other\n",
        "minirlhf.data": "from . import rows\n",
        "minirlhf.data.rows": "import torch, train_x\nimport minirlhf.gpt as g\n",
        "minirlhf.ppo": "from minirlhf import data\nfrom minirlhf.data import rows, other\n",
        "train_x": "from minirlhf.ppo import gae\n",
    }
    paths = {}
    for i, (name, code) in enumerate(forms.items()):
        file = "__init__.py" if name in ("minirlhf", "minirlhf.data") else "m.py"
        paths[name] = tmp_path / str(i) / file
        paths[name].parent.mkdir()
        paths[name].write_text(code)
    monkeypatch.setattr(f"{__name__}.MODULES", paths)
    imports.cache_clear()
    found = {name: sorted(imports(name)) for name in forms}
    way = way_back("minirlhf.gpt")
    imports.cache_clear()
    assert found == {
        "minirlhf": [],
        "minirlhf.gpt": ["minirlhf.data.rows"],
        "minirlhf.data": ["minirlhf.data.rows"],
        "minirlhf.data.rows": ["minirlhf.gpt", "train_x"],
        "minirlhf.ppo": ["minirlhf.data", "minirlhf.data.rows"],
        "train_x": ["minirlhf.ppo"],
    }
    assert way == ["minirlhf.gpt", "minirlhf.data.rows", "minirlhf.gpt"]


# Words


def words_in(text):
    """The words of a text and of the names in it, in small letters: RewardModel has two."""
    return [word.lower() for word in re.findall(r"[A-Z]+s?(?![a-z])|[A-Z]?[a-z]+", text)]


def test_machinery_has_no_word_of_the_method():
    wrong, needed = [], set()
    words = set(WORDS.split())
    for path in IN_ROOMS:
        if path.parent.name not in MACHINERY:
            continue
        file = path.relative_to(PACKAGE).as_posix()
        lines = [path.stem, *path.read_text(encoding="utf-8").splitlines()]
        for number, line in enumerate(lines):
            for word in words.intersection(words_in(line)):
                needed.add((file, word))
                if (file, word) not in ALLOWED:
                    wrong.append(f"minirlhf/{file}:{number} says {word!r}")
    fail_if(wrong, "engine/ and kernels/ know of rows, models, prompts and responses, and of no "
                   "method: say it in those words:")  # fmt: skip
    stale = [f"{file}: {word}" for file, word in ALLOWED.keys() - needed]
    fail_if(stale, "ALLOWED has words that are not there any more: take them out:")


def test_words_are_found():
    found = words_in("RewardModel.reward_level LLMs DPO's minirlhf")
    assert found == ["reward", "model", "reward", "level", "llms", "dpo", "s", "minirlhf"]


# READMEs


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_its_page(room):
    link, wrong = f"minirlhf/{room}/README.md", []
    least, most = ROOM_README_LINES
    page = ROOT / link
    lines = len(page.read_text(encoding="utf-8").splitlines()) if page.is_file() else 0
    if not least <= lines <= most:
        wrong.append(f"{link} has {lines} lines; expected {least} to {most}")
    if (README, link) not in {(page, target) for page, _, target in links()}:
        wrong.append(f"README.md has no link to {link}")
    fail_if(wrong, "Every room has a page that says what it holds, how it works and what was "
                   "measured, and README.md leads to it:")  # fmt: skip


def links():
    """(page, text, target) of all relative links in all READMEs."""
    for page in [README, *sorted(PACKAGE.rglob("README.md"))]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for label, target in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", text):
            if "://" not in target:
                yield page, label, target


def headings(page):
    """The anchors that GitHub makes of a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in found}


def test_links_lead_somewhere():
    wrong = []
    for page, label, target in links():
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in headings(path)):
            wrong.append(f"{name_of(page)}: [{label}]({target})")
    fail_if(wrong, "Links to a file or heading that is not there: mend the link:")


def test_a_link_that_names_a_function_has_it():
    """[`gae`](minirlhf/ppo.py) is a promise that gae is defined there."""
    wrong, seen = [], 0
    for page, label, target in links():
        label = label.strip("`")
        if not target.endswith(".py") or not label.isidentifier():
            continue
        seen += 1
        tree = tree_of((page.parent / target).resolve())
        defined = {getattr(node, "name", None) for node in ast.walk(tree)}
        if label not in defined:
            wrong.append(f"{name_of(page)}: [{label}]({target})")
    fail_if(wrong, "A page names functions that the linked file has not: look where they are now:")
    assert seen > 10


# Names that other people's code imports

FIXED = {
    "minirlhf.gpt": "GPTConfig GPT RewardModel",
    "minirlhf.kernels": "token_logprobs",
    "minirlhf.sampling": "generate",
    "minirlhf.reward": "bradley_terry_loss plackett_luce_loss",
    "minirlhf.ppo": "kl_estimate shaped_rewards gae whiten policy_loss value_loss group_advantages "
                    "AdaptiveKL",
    "minirlhf.dpo": "pair_loss AXES",
    "minirlhf.reward_eval": "pearson_distance epic_distance dard_distance starc_distance "
                            "epic_like_distance epic_sample bandit_distance worst_regret "
                            "mean_regret prfi contrast_instructions convex_da reward_fusion",
}  # fmt: skip


@pytest.mark.parametrize("module", FIXED)
def test_fixed_names(module):
    found = importlib.import_module(module)
    missing = [name for name in FIXED[module].split() if not hasattr(found, name)]
    fail_if(missing, f"Other people import these of {module}: let it hand them on from where they "
                     "are now:")  # fmt: skip
