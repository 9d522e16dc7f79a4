"""Does a reward keep its mind: between like instructions, and where a word is misspelt?

Contrast Instructions (Shen et al. 2023, The Trickle-down Impact of Reward (In-)consistency on RLHF,
arXiv 2309.16155) takes two instructions x and x' that are much alike, with answers y and y' that
are not. A reward is consistent over responses where it prefers an instruction's own answer to the
other's, and over instructions where an answer earns more under its own instruction than under the
other.

    from minirlhf import data
    from minirlhf.feedback.preferring import load_preferrer

    items = data.load_feedback("reviews").test
    pairs, _ = items.comparisons(20_000, 1)
    score = load_preferrer("runs/rm", fuse=5).score  # fuse: rewards/fusion.py
    on_perturbed(score, items.prompts, items.responses, pairs, np.random.default_rng(0))

Left out: paraphrases by a language model. Misspellings are all the noise here.
"""

import re

import numpy as np

WORD = re.compile(r"[^\W\d_]{3,}")  # letters; of a shorter word little is left to recognise
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def contrast_instructions(own, swapped):
    """(C_res, C_ins): shares of comparisons in which what belongs together scores higher.

    own (N, 2): r(x, y) and r(x', y'); swapped (N, 2): r(x, y') and r(x', y). Both directions count,
    2 N comparisons each, and a tie fails:

        C_res   r(x, y) > r(x, y')    and   r(x', y') > r(x', y)
        C_ins   r(x, y) > r(x', y)    and   r(x', y') > r(x, y')
    """
    own, swapped = np.asarray(own), np.asarray(swapped)
    responses = own > swapped  # the same instruction
    instructions = own > swapped[:, ::-1]  # the same answer
    return float(responses.mean()), float(instructions.mean())


def contrast_pairs(embeddings, answers, low=0.75, high=0.95):
    """(P, 2) pairs of instructions that are alike and answered otherwise, each once.

    embeddings (N, C) of the instructions, and their N answers. Each instruction is paired with the
    nearest of those whose cosine lies in [low, high) and whose answer is another text: above the
    band two are the same question, of which either answer is right.
    """
    embeddings = np.asarray(embeddings, dtype=float)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    _, text = np.unique(answers, return_inverse=True)
    pairs = set()
    for i, vector in enumerate(unit):
        cosine = unit @ vector
        in_band = (cosine >= low) & (cosine < high)
        allowed = in_band & (text != text[i])  # so not itself
        if allowed.any():
            cosine[~allowed] = -np.inf
            nearest = int(cosine.argmax())
            pair = sorted([i, nearest])
            pairs.add(tuple(pair))
    return np.array(sorted(pairs), dtype=int).reshape(-1, 2)


def contrast_scores(score, instructions, answers, pairs):
    """(own, swapped), (P, 2) each, of pairs (P, 2), by score(prompts, responses) -> (n,)."""
    first, second = np.asarray(pairs).T
    asked = np.concatenate([first, second, first, second])
    answered = np.concatenate([first, second, second, first])
    prompts = [instructions[i] for i in asked]
    scores = np.asarray(score(prompts, [answers[i] for i in answered]))
    own, other_own, swapped, other_swapped = np.split(scores, 4)
    return np.stack([own, other_own], 1), np.stack([swapped, other_swapped], 1)


# Misspelt


def perturbed(texts, rng, share=0.05):
    """The texts with misspellings in at most a `share` of their words, in one word of a text that
    is too short for that; a text of no word of three letters stays.

    A misspelling drops a letter, doubles it, swaps it with the next one or puts another in its
    place: never the first letter of a word. rng: a NumPy Generator.
    """
    noisy = []
    for text in texts:
        words = list(WORD.finditer(text))
        count = max(1, int(share * len(text.split())))
        chosen = rng.permutation(len(words))[:count]
        for i in sorted(chosen, reverse=True):  # from the end, so that places before it hold
            start, end = words[i].span()
            wrong = misspelt(words[i][0], rng)
            text = text[:start] + wrong + text[end:]
        noisy.append(text)
    return noisy


def misspelt(word, rng):
    """The word with one letter wrong; it always differs."""
    found = word
    while found == word:
        i = int(rng.integers(1, len(word)))
        before, letter, after = word[:i], word[i], word[i + 1 :]
        other = LETTERS[rng.integers(26)]
        ways = (
            before + after,
            before + letter * 2 + after,
            before + after[:1] + letter + after[1:],
            before + other + after,
        )
        found = ways[rng.integers(len(ways))]
    return found


def on_perturbed(score, prompts, responses, pairs, rng):
    """perturbed_consistency of score(prompts, responses) -> (n,), on pairs of these texts."""
    noisy = perturbed(responses, rng)
    return perturbed_consistency(score(prompts, responses), score(prompts, noisy), pairs)


def perturbed_consistency(before, after, pairs):
    """What misspelling N responses does to scores before and after (N,): a dict of

    - "one side", "both sides": the shares of the pairs (P, 2) whose order is the same when one
      response is misspelt, each in turn, or both are; a tie fails,
    - "change": mean |after - before|, and "relative": that over the standard deviation before.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    first, second = np.asarray(pairs).T
    order = np.sign(before[first] - before[second])
    decided = order != 0

    def same(one, other):
        return float((decided & (np.sign(one - other) == order)).mean())

    one_side = same(after[first], before[second]) + same(before[first], after[second])
    change = float(np.abs(after - before).mean())
    return {
        "one side": one_side / 2,
        "both sides": same(after[first], after[second]),
        "change": change,
        "relative": change / float(before.std()) if before.std() else 0.0,
    }
