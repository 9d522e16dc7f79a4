"""AdamW, its schedule and a step of it."""

import math

import torch

from minirlhf.engine.cli import UserError


def make_optimizer(model, lr, *, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, embedding_lr=1.0):
    """Fused AdamW; only matrices decay, as in GPT-2's training.

    Token embeddings get `embedding_lr` times the rate: a rare token's row hardly ever has a gradient.
    """
    groups = [{"params": [], "weight_decay": decay, "scale": scale}
              for decay, scale in ((0.0, 1.0), (weight_decay, 1.0), (weight_decay / embedding_lr, embedding_lr))]  # fmt: skip
    for name, p in model.named_parameters():
        groups[2 if name.endswith("wte.weight") else int(p.dim() >= 2)]["params"].append(p)
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def set_lr(optimizer, step, steps, lr, warmup=0.05, schedule="linear"):
    """Linear warm-up over a share of the steps, then linear to 0, along half a cosine to 0, or constant.

    Step 0 is the first, step steps-1 the last above 0. Without warm-up the linear rate is lr * (1 - step/steps).
    """
    rising = max(1, int(warmup * steps)) if warmup else 0
    left = min(1.0, (steps - step) / max(1, steps - rising))
    scale = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[schedule]
    scale = min((step + 1) / rising, scale) if rising else scale
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0) * scale


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradient_norm(parameters):
    """The norm of all gradients together, by way of those of their rows, which sharding leaves whole: to the last digit the same on one
    process and on many."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = any(hasattr(g, "to_local") for g in gradients)
    parts = [g.to_local() for g in gradients] if sharded else gradients
    squares = sum(torch.linalg.vector_norm(g.flatten(1) if g.dim() > 1 else g[:, None], dim=1).double().square().sum() for g in parts)
    if sharded:
        torch.distributed.all_reduce(squares)
    return squares.sqrt().float()


def optimizer_step(optimizer, max_grad_norm, loss, nonfinite=None):
    """Clips the norm of all gradients together (0: not at all), steps, clears: the numbers (loss, norm before clipping).

    Where one of them is not finite no step is made: that is an error, or what `nonfinite(loss, norm)` makes of it.
    """
    parameters = parameters_of(optimizer)
    norm = gradient_norm(parameters)
    if max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    loss, norm = torch.stack([loss.detach().float(), norm.float()]).tolist()
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    elif nonfinite:
        nonfinite(loss, norm)
    else:
        raise UserError(f"loss {loss}, gradient norm {norm}")
    optimizer.zero_grad(set_to_none=True)
    return loss, norm
