"""TRL's trainers at their quickest settings on work like ours, for the benchmark: the seconds of their own steps.

Left out: vLLM, several processes.
"""

import tempfile
import time

import numpy as np
import torch

from minirlhf.gpt import RewardModel
from minirlhf.tokenizer import Tokenizer


def setting(bench, bf16, folder, batch, steps):
    """(tokenizer, arguments that all of TRL's configurations share, at their quickest)."""
    from transformers import PreTrainedTokenizerFast

    Tokenizer.train([], 257).save(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", eos_token="<|endoftext|>", pad_token="ÿ")
    return tokenizer, dict(output_dir=f"{folder}/out", per_device_train_batch_size=batch, max_steps=steps, learning_rate=1e-4,
                           gradient_checkpointing=False, bf16=bf16, use_cpu=not bench.cuda, report_to=[], save_strategy="no",
                           disable_tqdm=True)  # fmt: skip


def make_clock(bench):
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        times = []

        def on_step_end(self, args, state, control, **_):
            if bench.cuda:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter() if bench.cuda else time.process_time())

    return Clock()


def read(folder, model):
    """One of our models as transformers reads it."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model.save_pretrained(folder, Tokenizer.train([], 257))
    kind = AutoModelForSequenceClassification if isinstance(model, RewardModel) else AutoModelForCausalLM
    return kind.from_pretrained(folder)


def pair_steps(bench, bf16, model, rows, shape):
    """Seconds between the ends of TRL's training steps on pairs of the same lengths."""
    import trl
    from datasets import Dataset

    (P, Q, _), clock = shape, make_clock(bench)
    text = ["a" * (int(n) - 1) for n in rows.lengths()]  # the tokenizer knows bytes, and adds EOS
    data = [{"prompt": "<|endoftext|>" + "b" * (Q - 1), "chosen": text[i], "rejected": text[P + i][:-1] + "c"} for i in range(P)]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, common = setting(bench, bf16, folder, P, 14 if bench.cuda else 7)
        shared = {"train_dataset": Dataset.from_list(data * 2), "processing_class": tokenizer, "callbacks": [clock]}
        if isinstance(model, RewardModel):
            trainer = trl.RewardTrainer(model=read(folder, model), args=trl.RewardConfig(**common, logging_strategy="no"), **shared)
        else:
            args = trl.DPOConfig(**common, logging_strategy="no")
            trainer = trl.DPOTrainer(model=read(folder, model), ref_model=read(folder, model), args=args, **shared)
        trainer.train()
    return np.diff(clock.times)[2:]


def ppo_iterations(bench, bf16, policy, rm, B, Q, R):
    """Seconds between the ends of TRL's PPO iterations; it exists in trl 1.12 at the latest."""
    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ImportError:
        print("this trl has no PPO (1.12 was the last): left out")
        return None
    from datasets import Dataset

    clock = make_clock(bench)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, common = setting(bench, bf16, folder, B, -1)
        tokenizer.padding_side = "left"
        args = PPOConfig(**common, num_mini_batches=4, num_ppo_epochs=4, total_episodes=4 * B, response_length=R, temperature=1.0,
                         local_rollout_forward_batch_size=B, num_sample_generations=0, stop_token=None)  # fmt: skip
        models = [read(folder, model) for model in (policy, policy, rm, rm)]
        dataset = Dataset.from_list([{"input_ids": row} for row in torch.randint(1, 250, (4 * B, Q)).tolist()])
        PPOTrainer(args, tokenizer, *models[:3], train_dataset=dataset, value_model=models[3], callbacks=[clock]).train()
    return np.diff(clock.times)[1:]
