"""Fused kernels, each beside its plain twin: log-probs of tokens, and the parts of a decoding step."""

from minirlhf.kernels.given_logits import logprob_from_logits
from minirlhf.kernels.logprobs import (
    CHUNK,
    KEEP,
    aligned,
    fused,
    head_logits,
    token_logprobs,
    token_logprobs_and_entropy,
)

__all__ = [
    "CHUNK", "KEEP", "aligned", "fused", "head_logits", "logprob_from_logits", "token_logprobs",
    "token_logprobs_and_entropy",
]  # fmt: skip
