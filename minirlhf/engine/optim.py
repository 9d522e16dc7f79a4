"""AdamW, its schedule and a step of it.

A schedule counts steps from 0: the last above 0 is steps - 1; without a warm-up the linear rate is
lr * (1 - step / steps). The norm of the gradients is taken by way of those of their rows, which
sharding leaves whole: so it is the same to the last digit on one process and on many. Where it or
the loss is not finite no step is made: that is a UserError, or what `nonfinite(loss, norm)` makes
of it.
"""

import math
from inspect import unwrap

import torch

from minirlhf.engine.cli import UserError


class AdamW(torch.optim.AdamW):
    """torch's, but for what it does for the sake of torch.compile. That loads torch._dynamo, over a
    second and 145 MB of each process, and none of it is ever asked for here."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def make_optimizer(model, lr, *, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, embedding_lr=1.0):
    """Fused AdamW; only matrices decay, as in GPT-2's training.

    Token embeddings get `embedding_lr` times the rate: a rare token's row seldom has a gradient.
    """
    vectors = {"params": [], "weight_decay": 0.0, "scale": 1.0}
    matrices = {"params": [], "weight_decay": weight_decay, "scale": 1.0}
    embeddings = {
        "params": [],
        "weight_decay": weight_decay / embedding_lr,
        "scale": embedding_lr,
    }
    for name, p in model.named_parameters():
        group = matrices if p.dim() >= 2 else vectors
        if name.endswith("wte.weight"):
            group = embeddings
        group["params"].append(p)
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    groups = [vectors, matrices, embeddings]
    return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def rates_of(knobs):
    """What make_optimizer takes of a stage's knobs."""
    return {"weight_decay": knobs.weight_decay, "embedding_lr": knobs.embedding_lr}


def set_lr(optimizer, step, steps, lr, warmup=0.05, schedule="linear"):
    """Linear warm-up over a share of the steps, then linear or half a cosine to 0, or constant."""
    rising = max(1, int(warmup * steps)) if warmup else 0
    left = min(1.0, (steps - step) / max(1, steps - rising))
    cosine = (1 - math.cos(math.pi * left)) / 2
    scale = {"linear": left, "cosine": cosine, "constant": 1.0}[schedule]
    scale = min((step + 1) / rising, scale) if rising else scale
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0) * scale


def gradient_norm(parameters):
    """The norm of all gradients together, that of all processes where they are sharded."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    norms = [torch.linalg.vector_norm(g[:, None].flatten(1), dim=1) for g in parts]
    squares = sum(norm.double().square().sum() for norm in norms)
    if any(hasattr(g, "to_local") for g in gradients):
        torch.distributed.all_reduce(squares)
    return squares.sqrt().float()


def refuse(loss, norm):
    raise UserError(f"loss {loss}, gradient norm {norm}")


def optimizer_step(optimizer, max_grad_norm, loss, nonfinite=refuse):
    """Clips the gradients' norm (0: not at all), steps, clears: (loss, norm before), as numbers."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = gradient_norm(parameters)
    if max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    loss, norm = torch.stack([loss.detach().float(), norm.float()]).tolist()
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    else:
        nonfinite(loss, norm)
    optimizer.zero_grad(set_to_none=True)
    return loss, norm
