"""Who prefers, on rows of tokens: a reward or preference model, or the toy's own true reward; and
Python functions. People, ensembles and judges, who read texts, are in preferring.py."""

import contextlib
import importlib
import inspect
import runpy
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from minirlhf import ppo
from minirlhf.engine import stages, vocabulary
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import figures_of
from minirlhf.engine.place import expect_place
from minirlhf.engine.rows import cut_left
from minirlhf.engine.weights import local_directory, model_directory, read_config
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import RewardModel
from minirlhf.tokenizer import fit_vocabulary, load_tokenizer

# Labelers of train_dpo: (scorer, prefer)


def reward_beside(knobs, feedback, stage):
    """(what scores samples of train_dpo, the summary of its training): --reward, or the run of the
    stage rm beside --out, which --online cannot do without, unless a --labeler compares."""
    beside = Path(knobs.out).parent / "rm"
    expect_place(knobs.out, [beside])
    if knobs.reward:
        stages.note_other_data(knobs.reward, knobs, feedback)
        return knobs.reward, figures_of(knobs.reward)
    if knobs.online and not knobs.labeler:
        base = knobs.reference or knobs.init
        own = stage.Knobs(init=base, out=str(beside), **stages.earlier(knobs))
        return stages.stage_before("reward model", stage.main, own, feedback)
    summary = figures_of(beside)
    if not feedback.trained(summary, knobs.data):
        return None, {}
    return beside, summary


def load_labeler(source, feedback, tokenizer, base):
    """(scorer, prefer) of a reward model, of a preference model (no scorer), or of `true`, the
    toy's own reward; None: neither.

    scorer(tokens (B, T), prompt_lengths, response_lengths) -> (B,). prefer(the same, K), where K
    rows in turn stand to one prompt -> (B/K, K, K): P(i preferred to j), with scores by Bradley
    and Terry.
    """
    if source is None:
        return None, None
    if source == "true":
        rate = partial(ask, true_reward(feedback), source, "response", tokenizer)
        scorer = partial(first_column, rate)
        return scorer, partial(by_scores, scorer)
    directory = local_directory(model_directory(source))
    if is_pairwise(directory):
        model = load_model(PreferenceModel, source, tokenizer, base)
        return None, partial(by_embeddings, model)
    scorer = partial(by_model, load_reward_model(source, tokenizer, base))
    return scorer, partial(by_scores, scorer)


def given_true(source, feedback):
    """The function behind `--reward true`; None for any other. Raises UserError as true_reward."""
    return true_reward(feedback) if source == "true" else None


def is_pairwise(directory):
    """Whether a preference model lies in a directory, as far as its config.json says so."""
    if not (directory / "config.json").is_file():
        return False
    return read_config(directory).get("num_labels", 1) > 1


def first_column(rate, tokens, prompt_lengths, response_lengths):
    return rate(tokens, prompt_lengths, response_lengths)[:, 0]


def by_model(rm, tokens, prompt_lengths, response_lengths):
    return rm(tokens, prompt_lengths + response_lengths, prompt_lengths).float()


def by_scores(scorer, tokens, prompt_lengths, response_lengths, K):
    scores = scorer(tokens, prompt_lengths, response_lengths).view(-1, K)
    one, other = scores[:, :, None], scores[:, None, :]
    size = torch.maximum(one.abs(), other.abs())
    return chances(one - other, size)


def by_embeddings(model, tokens, prompt_lengths, response_lengths, K):
    embeddings = model.embed(tokens, prompt_lengths + response_lengths).float()
    e = embeddings.view(-1, K, embeddings.shape[-1])
    one, other = e[:, :, None], e[:, None]
    size = one.norm(dim=-1) * other.norm(dim=-1)
    return chances(model.logit(one, other), size)


def chances(log_odds, size):
    """The sigmoid, one half where the log-odds are the rounding of numbers of that size: else an
    answer would be preferred to one just like it."""
    rounding = ppo.is_rounding(log_odds, size)
    return torch.sigmoid(log_odds.masked_fill(rounding, 0))


def load_reward_model(path, tokenizer, base):
    """The reward model of a run, a directory or the hub, as in load_model."""
    return load_model(RewardModel, path, tokenizer, base)


def load_model(kind, source, tokenizer, base):
    """A model of a run, a directory or the hub that judges what `base` writes, on its device.

    Raises UserError where it has another tokenizer, or less context. Where no tokenizer lies beside
    it, that is said, and the number of ids has to be the same.
    """
    directory = local_directory(model_directory(source))
    model = kind.from_pretrained(directory)
    n_ctx, rows = model.config.n_ctx, model.config.vocab_size
    fix = "train it from this base model"
    if vocabulary.lies_in(directory):
        if load_tokenizer(directory).fingerprint() != tokenizer.fingerprint():
            raise UserError(f"reward model {source}: its tokenizer is not the base model's: {fix}")
        fit_vocabulary(model, tokenizer, source)
    elif rows == tokenizer.vocab_size:
        print(f"reward model {source}: no tokenizer lies there: taken to be the base model's")
    else:
        found = f"vocabulary {rows} and no tokenizer, the base model has {tokenizer.vocab_size}"
        raise UserError(f"reward model {source}: {found}: {fix}")
    if n_ctx < base.config.n_ctx:
        found = f"a context of {n_ctx} tokens, the base model has one of {base.config.n_ctx}"
        raise UserError(f"reward model {source}: {found}: {fix}")
    return model.to(base.lm_head_weight.device).eval()


# Python functions


def find_function(source, feedback):
    """The function behind --reward true, FILE.py:FUNCTION or package.module:FUNCTION.

    None: a model.
    """
    source = str(source)
    if source == "true":
        return true_reward(feedback)
    if source.endswith(".py") and Path(source).is_file():
        raise UserError(f"--reward {source}: which function of it? expected {source}:FUNCTION")
    file, _, name = source.rpartition(":")
    dotted = all(part.isidentifier() for part in (*file.split("."), name))
    return load_function(file, name) if dotted or file.endswith(".py") else None


def true_reward(feedback):
    """The function behind `--reward true`. Raises UserError where the data have none."""
    if feedback.true_reward is None:
        raise UserError(f"--reward true: {feedback.name} has no known true reward (toy has)")
    return feedback.true_reward


def load_function(file, name):
    """A function of FILE.py, or of a module by its dotted name, in the current directory or not.

    Raises UserError where there is no such file, module or function. What the file itself raises,
    a module that it lacks included, is its own.
    """
    flag = f"--reward {file}:{name}"
    with current_directory():
        if not file.endswith(".py"):
            names = vars(import_named(file, flag))
        elif Path(file).is_file():
            names = runpy.run_path(file)
        else:
            raise UserError(f"{flag}: no file {file}")
    if not callable(names.get(name)):
        raise UserError(f"{flag}: no function {name} in {file}")
    return names[name]


def import_named(module, flag):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if f"{module}.".startswith(f"{e.name}."):  # it or a package of it, not what it imports
            raise UserError(f"{flag}: {e}") from None
        raise


@contextlib.contextmanager
def current_directory():
    """The modules of the current directory can be imported for a while, before all others."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove("")


def asked_columns(function, source, feedback, tokenizer, room):
    """Columns of bare prompts that a function takes by name: {name: {ids of a prompt: value}}.

    room: most tokens of a prompt, its EOS counted; a longer one has lost its left end. Raises
    UserError where it takes one that no record has.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())[2:]
    except ValueError:  # one that is not written in Python
        return {}
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    found = {}
    for items in (feedback.train, feedback.test):
        for prompt, columns in zip(items.prompts, items.columns or [], strict=False):
            ids = tokenizer.eos, *cut_left(tokenizer.encode(prompt), room)
            for name, value in columns.items():
                if takes_all or name in names:
                    found.setdefault(name, {})[ids] = value
    required = {p.name for p in parameters if p.name in names and p.default is p.empty}
    if required - found.keys():
        missing = ", ".join(sorted(required - found.keys()))
        raise UserError(f"--reward {source}: it takes {missing}, which no record has as a key")
    return found


def ask(function, source, level, tokenizer, tokens, prompt_lengths, response_lengths, columns=None):
    """What a Python function says of the text of token rows, and of asked_columns.

    (B, 1), or at the token level (B, longest response). Raises UserError where that is not a finite
    number for each; what the function raises is its own.
    """
    by_token = level == "token"
    prompts, responses, shapes = [], [], []
    more = {name: [] for name in columns or ()}
    rows = zip(tokens.tolist(), prompt_lengths.tolist(), response_lengths.tolist(), strict=True)
    for ids, p, r in rows:
        response = ids[p : p + r]
        prompts.append(tokenizer.decode(ids[:p]))
        if by_token:
            responses.append([tokenizer.decode([i]) for i in response])
        else:
            responses.append(tokenizer.decode(response))
        shapes.append((r if by_token else 1,))
        for name, values in more.items():
            values.append(columns[name].get(tuple(ids[:p])))
    with current_directory():
        given = function(prompts, responses, **more)
        given = list(given) if isinstance(given, Iterator) else given
    try:
        scores = [torch.tensor(s if by_token else [s], dtype=torch.float32) for s in given]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        scores = []
    if [s.shape for s in scores] != shapes or not all(s.isfinite().all() for s in scores):
        n = sum(length for (length,) in shapes)
        problem = f"expected a finite float for each {level}, {n} in {len(responses)} responses"
        raise UserError(f"--reward {source}: {problem}")
    return pad_sequence(scores, batch_first=True).to(tokens.device)
