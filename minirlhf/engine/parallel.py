"""One run on many processes: torchrun starts the same script on each GPU, which takes its rows.

    torchrun --nproc-per-node 8 SCRIPT.py             # DDP: every GPU holds the models
    torchrun --nproc-per-node 8 SCRIPT.py --shard     # FSDP2: it holds an eighth of their weights,
                                                      # gradients and optimizer state

A batch is that of all processes together. All of them make the same plan and draw the same random
numbers; where a batch meets a model, each process takes the rows of its `share`, and `gather` gives
all of them the numbers of all rows. So the loss is that of the whole batch on every process, and
only its gradient is in parts. Files are written by the first process, and read by all.

Left out: tensor and pipeline parallelism; sampling from a model that fits no single GPU.
"""

import contextlib
import datetime
import os
import sys

import numpy as np
import torch
import torch.distributed as dist

from minirlhf.engine.cli import UserError
from minirlhf.engine.machine import keep_freed_memory, pick_device, pick_dtype, precision


def start(knobs):
    """(device, autocast context) of this process by --device and --dtype; it joins those that
    torchrun started with it.

    The first process prints; of the others nothing is seen, as long as their `contained` function
    runs.
    """
    keep_freed_memory()
    device = joined(knobs.device)
    knobs.dtype = pick_dtype(knobs.dtype, device)  # what the run is from now on
    return device, precision(device, knobs.dtype)


def joined(name):
    """The device of this process, which from now on is one of torchrun's."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return pick_device(name)
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = pick_device(name)
    if not dist.is_initialized():
        cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=datetime.timedelta(minutes=10),
            device_id=device if cuda else None,
        )
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open as long as someone prints
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Waits until all processes are here."""
    if world() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_alone():
    """The first process goes first: what it fetches, the others find."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


def share(n):
    """This process's k of n rows, their indices, and which count: not the last, taken again."""
    k = -(-n // world())
    index = np.arange(k) + (rank() * k if world() > 1 else 0)
    return np.minimum(index, n - 1), index < n


class Gather(torch.autograd.Function):
    """The rows of all processes, each of which has k; the gradient goes to this one's rows."""

    @staticmethod
    def forward(ctx, x, n):
        whole = x.new_empty(world() * len(x), *x.shape[1:])
        dist.all_gather(list(whole.chunk(world())), x.contiguous())
        ctx.k = len(x)
        return whole[:n]

    @staticmethod
    def backward(ctx, gradient):
        whole = gradient.new_zeros(world() * ctx.k, *gradient.shape[1:])
        whole[: len(gradient)] = gradient
        return whole[rank() * ctx.k : (rank() + 1) * ctx.k], None


def gather(x, n):
    """All n rows (n, ...) of what each process made of its `share` (k, ...); of a list, each."""
    if world() == 1 or x is None:
        return x
    if isinstance(x, list):
        return [gather(part, n) for part in x]
    return Gather.apply(x.byte(), n).bool() if x.dtype == torch.bool else Gather.apply(x, n)


def total(x):
    """The sum of a tensor over all processes."""
    if world() > 1:
        dist.all_reduce(x := x.detach().clone())
    return x


def any_process(flag, device):
    """Whether it is so on any of the processes."""
    return flag if world() == 1 else bool(total(torch.tensor(float(flag), device=device)))


class Together(torch.nn.ModuleList):
    """The models that a run trains.

    After `backward` each parameter has the gradient of all processes' losses together.
    """

    def __init__(self, *models):
        super().__init__(filter(None, models))
        self.ddp = []  # a list, so that it is no module of this one
        if world() > 1 and not sharded(self):
            self.ddp.append(torch.nn.parallel.DistributedDataParallel(self))

    def forward(self):
        """Nothing: losses call the models' own methods, but DDP expects a forward pass first."""

    def backward(self, loss, last=True):
        """Adds the gradient of this process's part of a loss; `last` is the last part of a step."""
        for ddp in self.ddp if last else ():
            ddp()
        (loss * world()).backward()  # both DDP and FSDP2 divide by it


def shard(*models):
    """Spreads the models' weights over the processes, block by block (FSDP2); None is no model."""
    if world() == 1:
        raise UserError(
            "--shard: one process has nothing to share; start with torchrun --nproc-per-node N"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if not hasattr(FSDPModule, "set_reshard_after_forward"):
        raise UserError(
            f"--shard: torch {torch.__version__} cannot yet hold a sharded model whole for a "
            "while; expected 2.8 or newer"
        )
    models = list(filter(None, models))
    mesh = init_device_mesh(next(models[0].parameters()).device.type, (world(),))
    for model in models:
        gpts = [m for m in model.modules() if hasattr(m, "wte") and not sharded(m)]
        for gpt in gpts:
            for block in gpt.h:
                fully_shard(block, mesh=mesh)
            # The head reads the token embedding after the forward pass.
            fully_shard(gpt, mesh=mesh, reshard_after_forward=False)
            register_fsdp_forward_method(gpt, "hidden")
        if hasattr(model, "score") and not sharded(model.score):
            fully_shard(model.score, mesh=mesh)


def sharded(model):
    """The parts of a model whose weights are spread over the processes."""
    return [m for m in model.modules() if hasattr(m, "unshard")]


@contextlib.contextmanager
def sampling(model):
    """For a while a model drops nothing, and a sharded one has all its weights on each process."""
    training, parts = model.training, sharded(model)
    model.eval()
    for part in parts:
        part.set_reshard_after_forward(False)
        part.unshard()
    try:
        yield
    finally:
        model.train(training)
        for part in parts:
            part.set_reshard_after_forward(not hasattr(part, "wte"))
            part.reshard()


def reshard(model):
    for part in sharded(model):
        part.reshard()


def full(t):
    """A tensor with all its parts, on every process."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def spread(whole, t):
    """A whole tensor, spread over the processes as t is; as it is where t is not."""
    if not hasattr(t, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(t.device), t.device_mesh, t.placements)


def copy_into(t, whole):
    """Copies a whole tensor into one that may be spread over the processes."""
    t.copy_(spread(whole, t))
