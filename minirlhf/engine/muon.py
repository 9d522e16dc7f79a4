"""Muon: a matrix moves by its momentum with all singular values made equal (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon).

A gradient of a block's matrix has a few large directions, and Adam follows these; Muon goes as far
in each. The orthogonal matrix nearest to the momentum is found by products alone, nearly: five
rounds of a polynomial take each singular value from anywhere below 1 to between .7 and 1.2. Times
.2 sqrt(the longer side) its entries are as large as AdamW's usual steps, so that one rate does for
both (Liu et al. 2025, arXiv 2502.16982, eq. 4).
"""

import torch

from minirlhf.engine import parallel

OPTIMIZERS = ("", "adamw", "muon")
MOMENTUM = 0.95
POLYNOMIAL = 3.4445, -4.7750, 2.0315  # of x, x^3 and x^5: steep at 0
ROUNDS = 5


def join(knobs, optimizer, model):
    """From now on the optimizer moves the matrices in the model's blocks by Muon, at the rate and
    decay that they had, if --optimizer says so; by default, if the model is fresh."""
    if (knobs.optimizer or ("adamw" if knobs.init else "muon")) == "adamw":
        return
    of_blocks = {id(p) for n, p in model.named_parameters() if ".h." in f".{n}" and p.dim() == 2}
    for group in list(optimizer.param_groups):
        chosen = [p for p in group["params"] if id(p) in of_blocks]
        if chosen:
            group["params"] = [p for p in group["params"] if id(p) not in of_blocks]
            optimizer.add_param_group({**group, "params": chosen, "muon": True})
    optimizer.register_step_pre_hook(move)


@torch.no_grad()
def move(optimizer, *_):
    """Moves the matrices, and leaves AdamW no gradient of theirs."""
    for group in optimizer.param_groups:
        for p in group["params"] if group.get("muon") else ():
            if p.grad is None:
                continue
            state = optimizer.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            momentum = state["momentum"]
            momentum.lerp_(p.grad, 1 - MOMENTUM)
            ahead = p.grad.lerp(momentum, MOMENTUM)  # Nesterov's
            step = orthogonal(parallel.full(ahead)) * (0.2 * max(p.shape) ** 0.5)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(parallel.spread(step, p), alpha=-group["lr"])
            p.grad = None


def orthogonal(matrix):
    """Nearly U V^T of a matrix U S V^T, (n, m); of zeros, zeros."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    a, b, c = POLYNOMIAL
    for _ in range(ROUNDS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.T
