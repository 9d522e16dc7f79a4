"""A toy base model and reward model, small enough for seconds, made once for all tests that
train."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)


def pytest_configure(config):
    """The tests are the CPU's on every machine, with Triton's kernels interpreted; `-m gpu` runs
    those of the GPU instead."""
    if config.getoption("markexpr") != "gpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}


@pytest.fixture(scope="session", autouse=True)
def dtype_of_runs():
    """--dtype auto, the default, is float32 in this process on all CPUs. To processes that a test
    starts it says what it does."""
    from minirlhf.engine import machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "has_bf16_units", lambda: False)
        yield


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with finished runs `sft` and `rm` of the toy language."""
    import train_rm
    from minirlhf import sft  # not above: Triton reads its environment when it is imported

    folder = tmp_path_factory.mktemp("toy")
    sft.main(
        sft.Knobs(
            data="toy",
            out=str(folder / "sft"),
            n_layer=2,
            n_head=2,
            n_embd=64,
            epochs=4,
            batch_size=64,
            lr=5e-3,
            embedding_lr=1.0,
            optimizer="adamw",
        )
    )
    train_rm.main(
        train_rm.Knobs(
            data="toy",
            out=str(folder / "rm"),
            epochs=4,
            lr=3e-3,
            embedding_lr=1.0,
            delete=0.0,
            delete_eos=0.0,
            dropout=0.0,
        )
    )
    return folder
