"""A preference of a DPO run's data, token by token: the implicit rewards that are compared.

Left out: the losses of thumbs and lists, whose responses are shown as a pair all the same.
"""

from functools import partial
from types import SimpleNamespace

import torch

from minirlhf import data, dpo
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import pad_rows
from minirlhf.feedback.losses import LOSSES
from minirlhf.feedback.method import named_method
from minirlhf.look.policies import feedback_of
from minirlhf.look.terminal import columns, number, padded, print_wrapped
from minirlhf.look.trace import token_text
from minirlhf.sampling import response_logprobs


@torch.no_grad()
def print_pair(policy, index):
    """The two responses of held-out comparison `index` as columns of tokens, with sums."""
    knobs = SimpleNamespace(**policy.knobs)
    method = named_method(knobs)
    if method.has_reference and not policy.reference:
        problem = "its base model is not there any more"
        raise UserError(f"{policy.name}: {problem}: name one with --reference")
    items = feedback_of(policy).test
    chosen, rejected = comparison(items, index, policy.name)
    texts = [(items.prompts[i], items.responses[i], items.where[i]) for i in (chosen, rejected)]
    n_ctx = policy.model.config.n_ctx
    rows, p = data.encode(texts, policy.tokenizer, n_ctx, "truncate", together=[[0, 1]])
    tokens, lengths = pad_rows(rows, policy.tokenizer.pad, policy.model.lm_head_weight.device)
    p = torch.as_tensor(p, device=tokens.device)
    r = lengths - p
    read = tokens, p, r, int(r.max())
    logprobs = response_logprobs(policy.model, *read)  # (2, R)
    ref_logprobs = None
    if method.has_reference:
        ref_logprobs = response_logprobs(policy.reference, *read)
    rewards = implicit_rewards(logprobs, ref_logprobs, r, method, knobs.beta)
    print_facts(policy, method, knobs, items, (chosen, rejected))
    responses = [row[n:].tolist() for row, n in zip(rows, p.tolist(), strict=True)]
    print_columns(policy.tokenizer, responses, logprobs, ref_logprobs, rewards)
    chosen, rejected = rewards.sum(1).tolist()
    margin = chosen - rejected
    chance = torch.sigmoid(torch.tensor(margin)).item()
    print(f"\nimplicit reward {chosen:.3f} of the preferred, {rejected:.3f} of the other; "
          f"margin {margin:.3f}:\nthe policy would prefer the first with a chance of "
          f"{chance:.3f}")  # fmt: skip
    print_loss(method, knobs, logprobs.sum(1), ref_logprobs, r)


def comparison(items, index, name):
    """(preferred, other), indices of the items that held-out comparison `index` is of."""
    if not items.can_compare(across=False):
        problem = "no two responses of its held-out data can be compared: there is no pair to show"
        raise UserError(f"{name}: {problem}")
    pairs, _ = items.comparisons(index + 1, seed=1, across=False)
    if not 0 <= index < len(pairs):
        raise UserError(f"--index {index}: expected 0 to {len(pairs) - 1}, of the held-out pairs")
    return pairs[index].tolist()


def implicit_rewards(logprobs, ref_logprobs, lengths, method, beta):
    """beta (log pi - log pi_ref) of each token (2, R), without a reference beta log pi; where the
    loss compares means of tokens, over the length. Their sum is the implicit reward."""
    rewards = logprobs if ref_logprobs is None else logprobs - ref_logprobs
    return beta * (rewards / lengths[:, None] if method.per_token else rewards)


def print_facts(policy, method, knobs, items, pair):
    ratio = f"{knobs.beta:g} (logp - ref)" if method.has_reference else f"{knobs.beta:g} logp"
    ratio += " / length" if method.per_token else ""
    print_wrapped("pair", f"held-out, of {policy.knobs['data']}, as people compared it")
    print_wrapped("logp", f"by {policy.name}, trained with the loss {knobs.loss}")
    if method.has_reference:
        print_wrapped("ref", f"by {policy.base}")
    print_wrapped("reward", f"the implicit one, {ratio}")
    if items.ratings is not None:
        means = [items.ratings[i].mean() for i in pair]
        print_wrapped("rated", f"{means[0]:.2f} and {means[1]:.2f} on average")
    prompt = items.prompts[pair[0]]
    if prompt:
        print_wrapped("prompt", repr(prompt))


def print_columns(tokenizer, responses, logprobs, ref_logprobs, rewards):
    """Two columns of tokens, the preferred response on the left."""
    room = max(8, columns() // 2 - 25)
    half = room + 24
    titles = "".join(f"{title:>8}" for title in ("logp", "ref", "reward"))
    print(f"\n{padded('preferred', room)}{titles}  {padded('other', room)}{titles}")
    refs = [None, None] if ref_logprobs is None else ref_logprobs.tolist()
    series = list(zip(logprobs.tolist(), refs, rewards.tolist(), strict=True))
    for t in range(max(map(len, responses))):
        sides = []
        for ids, numbers in zip(responses, series, strict=True):
            cells = [None if x is None else x[t] for x in numbers]
            text = token_text(ids[t], tokenizer) if t < len(ids) else ""
            sides.append(side(text, cells, room) if text else " " * half)
        print("  ".join(sides).rstrip())
    sides = []
    for ids, numbers in zip(responses, series, strict=True):
        sums = [None if x is None else sum(x[: len(ids)]) for x in numbers]
        sides.append(side("sum", sums, room))
    print("  ".join(sides))


def side(text, cells, room):
    return padded(text, room) + "".join(f" {number(x, 7)}" for x in cells)


def print_loss(method, knobs, logps, ref_logps, lengths):
    """The run's own loss on this pair, as if all agreed on it, where that is a loss of pairs
    alone."""
    if method.kind not in dpo.KINDS or method.kind in {*LOSSES, "sppo", "d2o"}:
        return
    refs = (None, None) if ref_logps is None else ref_logps.sum(1, keepdim=True)
    of_pairs = partial(
        dpo.pair_loss,
        policy_chosen_logps=logps[:1],
        policy_rejected_logps=logps[1:],
        ref_chosen_logps=refs[0],
        ref_rejected_logps=refs[1],
        beta=knobs.beta,
        chosen_lengths=lengths[:1],
        rejected_lengths=lengths[1:],
    )
    loss = method.losses(of_pairs, knobs.label_smoothing)
    print(f"loss {knobs.loss} of this pair {loss.item():.3f}")
