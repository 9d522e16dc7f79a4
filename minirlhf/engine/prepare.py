"""Before models are used: --compile, --shard, and the trial of those that sample."""

import itertools

import torch

from minirlhf.engine import parallel, quick


def prepare(knobs, *models):
    """Compiles the models' layers and spreads their weights, as the knobs say, and tries what
    samples (engine/quick.py); None is no model."""
    if knobs.compile:
        compile_models(*models)
    if knobs.shard:
        parallel.shard(*models)
    for model in models:
        if hasattr(model, "trunk"):
            quick.fits(model)


def compile_models(*models):
    """Compiles the layers of all GPTs in the models (None is no model), or prints why not."""
    parts = itertools.chain.from_iterable(model.modules() for model in filter(None, models))
    for gpt in parts:
        if not hasattr(gpt, "trunk"):
            continue
        gpt.compiled = True
        try:
            gpt.hidden(torch.zeros(2, 8, dtype=torch.int64, device=gpt.lm_head_weight.device))
        except Exception as e:  # no compiler, no Triton, a Python that is too new
            gpt.compiled = False
            reason = str(e).strip().splitlines()[0]
            return print(f"--compile: not possible here, going on without: {reason}", flush=True)
