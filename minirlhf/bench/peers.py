"""TRL's trainers at their quickest settings on work like ours: the seconds of their own steps.

Left out: vLLM, several processes.
"""

import tempfile
import time

import numpy as np
import torch

from minirlhf.gpt import RewardModel
from minirlhf.tokenizer import Tokenizer


def tokenizer_of_bytes(folder):
    """A tokenizer of TRL's that knows bytes and EOS."""
    from transformers import PreTrainedTokenizerFast

    Tokenizer.train([], 257).save(folder)
    return PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json", eos_token="<|endoftext|>", pad_token="ÿ"
    )


def quickest(bench, bf16, folder, batch, steps):
    """Arguments that all of TRL's configurations share."""
    return dict(
        output_dir=f"{folder}/out",
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=1e-4,
        gradient_checkpointing=False,
        bf16=bf16,
        use_cpu=not bench.cuda,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


def make_clock(bench):
    """A callback that notes when each step has ended."""
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
    if isinstance(model, RewardModel):
        return AutoModelForSequenceClassification.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def pair_steps(bench, bf16, model, rows, shape):
    """Seconds between the ends of TRL's training steps on pairs of the same lengths."""
    import trl
    from datasets import Dataset

    P, Q, _ = shape
    clock = make_clock(bench)
    text = ["a" * (int(n) - 1) for n in rows.lengths()]  # a byte a token, and TRL adds EOS
    prompt = "<|endoftext|>" + "b" * (Q - 1)
    data = []
    for i in range(P):
        rejected = text[P + i][:-1] + "c"
        data.append({"prompt": prompt, "chosen": text[i], "rejected": rejected})
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "train_dataset": Dataset.from_list(data * 2),
            "processing_class": tokenizer_of_bytes(folder),
            "callbacks": [clock],
        }
        common = quickest(bench, bf16, folder, P, 14 if bench.cuda else 7)
        if isinstance(model, RewardModel):
            args = trl.RewardConfig(**common, logging_strategy="no")
            trainer = trl.RewardTrainer(model=read(folder, model), args=args, **shared)
        else:
            args = trl.DPOConfig(**common, logging_strategy="no")
            policy, reference = read(folder, model), read(folder, model)
            trainer = trl.DPOTrainer(model=policy, ref_model=reference, args=args, **shared)
        trainer.train()
    return np.diff(clock.times)[2:]  # the first steps warm up


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
        tokenizer = tokenizer_of_bytes(folder)
        tokenizer.padding_side = "left"
        args = PPOConfig(
            **quickest(bench, bf16, folder, B, -1),
            num_mini_batches=4,
            num_ppo_epochs=4,
            total_episodes=4 * B,
            response_length=R,
            temperature=1.0,
            local_rollout_forward_batch_size=B,
            num_sample_generations=0,
            stop_token=None,
        )
        prompts = torch.randint(1, 250, (4 * B, Q)).tolist()
        trainer = PPOTrainer(
            args,
            tokenizer,
            model=read(folder, policy),
            ref_model=read(folder, policy),
            reward_model=read(folder, rm),
            train_dataset=Dataset.from_list([{"input_ids": row} for row in prompts]),
            value_model=read(folder, rm),
            callbacks=[clock],
        )
        trainer.train()
    return np.diff(clock.times)[1:]
