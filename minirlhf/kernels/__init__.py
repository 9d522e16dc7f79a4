"""Fused kernels, each beside its plain twin: log-probs of tokens, and parts of a decoding step."""

from minirlhf.kernels.choice import fused
from minirlhf.kernels.given_logits import logprob_from_logits
from minirlhf.kernels.logprobs import token_logprobs, token_logprobs_and_entropy
from minirlhf.kernels.matmul import CHUNK, KEEP, aligned, head_logits

__all__ = [
    "CHUNK",
    "KEEP",
    "aligned",
    "fused",
    "head_logits",
    "logprob_from_logits",
    "token_logprobs",
    "token_logprobs_and_entropy",
]
