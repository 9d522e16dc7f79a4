"""Reward models of the toy from pairs alone and from mixtures of kinds, at the same human time.

    python tests/equal_time.py 1800 response      # three minutes: seconds of a person, --level

Each label takes the seconds of minirlhf/feedback/recovery.py, which are assumed, and a mixture
spends as much time on each of its kinds. Printed is the distance to the toy's true reward on 1,000
fresh words, 0.71 being chance: mean and deviation of five seeds, then each.
"""

import contextlib
import io
import sys
import tempfile

import numpy as np
import torch

import train_rm
from minirlhf import data, sft
from minirlhf.engine.rows import pad_rows
from minirlhf.feedback import recovery, simulate
from minirlhf.gpt import RewardModel
from minirlhf.rewards.distances import pearson_distance
from minirlhf.tokenizer import Tokenizer

NAMES = {"pair": "comparison", "ranking of 4": "comparison:4", "critique": "critique",
         "inter-temporal": "intertemporal"}  # fmt: skip
MIXTURES = ("pairs", "pairs, rankings, critiques", "rankings, curves")


def main(seconds, level):
    with tempfile.TemporaryDirectory() as folder:
        base = f"{folder}/sft"
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64}
        more = {"epochs": 4, "lr": 5e-3, "embedding_lr": 1.0}
        quietly(sft.main, sft.Knobs(data="toy", out=base, **sizes, **more))
        for title in MIXTURES:
            counts = recovery.in_time(recovery.MIXTURES[title], int(seconds))
            ask = ",".join(f"{NAMES[name]}={n}" for name, n in counts.items())
            found = [of_seed(folder, base, ask, level, seed) for seed in range(5)]
            spread = f"{np.mean(found):.3f} +- {np.std(found, ddof=1):.3f}"
            print(f"{title:<28} {spread}  {np.round(found, 3)}  {ask}", flush=True)


def of_seed(folder, base, ask, level, seed):
    path, out = f"{folder}/labels.jsonl", f"{folder}/rm"
    quietly(simulate.main, simulate.Knobs(out=path, ask=ask, beta=1.0, seed=seed))
    epochs = max(2, round(4000 / len(data.load_feedback(path).train)))
    more = {"epochs": epochs, "batch_size": 32, "lr": 3e-3, "delete": 0.2, "normalize": False}
    knobs = train_rm.Knobs(data=path, init=base, out=out, level=level, seed=seed, **more)
    quietly(train_rm.main, knobs)
    model, tokenizer = RewardModel.from_pretrained(f"{out}/model"), Tokenizer.load(f"{out}/model")
    rng = np.random.default_rng(99)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(4, 11))) for _ in range(1000)]
    rows = [[tokenizer.eos, *tokenizer.encode(word), tokenizer.eos] for word in words]
    idx, lengths = pad_rows(rows, tokenizer.pad)
    with torch.no_grad():
        scores = model(idx, lengths, torch.ones_like(lengths)).numpy()
    return pearson_distance(scores, np.array(data.toy_reward(words, words)))


def quietly(f, *args):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        f(*args)


if __name__ == "__main__":
    main(*sys.argv[1:])
