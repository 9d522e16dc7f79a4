"""Do two versions make the same bits?   python tests/bit_identical.py OLD NEW [case ...]

OLD and NEW are checkouts. For a change that moves code and no number: `git worktree add /tmp/old
COMMIT`, then compare it with the tree at hand. Each case trains on the toy language, or with
`--default` on the reviews, by one process and by two, in both checkouts on one machine; weights,
metrics but for the clock, and samples must be equal to the last bit. What a checkout gave is kept
beside it (bits.json) for the next comparison; delete the file when the checkout changes.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

PPO = "train_ppo.py --init {sft} --reward {rm} --eval-samples 33 --micro-batch 16 --batch-size 64"
DPO = "train_dpo.py --init {sft} --eval-samples 33"
ONLINE = f"{DPO} --reward {{rm}} --online --batch-size 30"
CASES = {
    "sft": "-m minirlhf.sft",
    "rm": "train_rm.py --init {sft} --epochs 2",
    "rm-token": "train_rm.py --init {sft} --epochs 1 --level token --micro-batch 7",
    "rm-pairwise": "train_rm.py --init {sft} --epochs 1 --model pairwise",
    "rm-ranking": "train_rm.py --init {sft} --epochs 1 --loss plackett_luce",
    "ppo": f"{PPO} --steps 20",
    "ppo-grpo": f"{PPO} --steps 6 --advantage grpo --kl-in loss --kl-kind k3",
    "ppo-shared": f"{PPO} --steps 6 --critic shared",
    "ppo-token": f"{PPO} --steps 6 --reward {{rm-token}} --whiten-rewards --kl-target 3",
    "ppo-truncated": f"{PPO} --steps 6 --truncate c --missing-eos-score -1 "
    "--no-stop-at-eos --top-k 20",
    "dpo": f"{DPO} --epochs 1",
    "dpo-ipo": f"{DPO} --epochs 1 --loss ipo",
    "dpo-kto": f"{DPO} --epochs 1 --loss kto",
    "dpo-tdpo": f"{DPO} --epochs 1 --loss tdpo2 --micro-batch 16",
    "dpo-lipo": f"{DPO} --epochs 1 --loss lipo",
    "dpo-orpo": f"{DPO} --epochs 1 --loss orpo --loss-options nll_weight=0.5",
    "dpo-d2o": f"{DPO} --steps 6 --loss d2o",
    "dpo-rounds": f"{DPO} --epochs 1 --rounds 3",
    "dpo-online": f"{ONLINE} --steps 8 --rounds 2 --loss sppo",
    "dpo-nash": f"{ONLINE} --steps 6 --loss nash_md",
}
DEFAULT = {
    "sft": "-m minirlhf.sft",
    "rm": "train_rm.py --init {sft}",
    "ppo": "train_ppo.py --init {sft} --reward {rm}",
    "dpo": "train_dpo.py --init {sft} --reward {rm}",
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def digest(out):
    """What a run left: weights, metrics without the clock and perf/, samples."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [
        {key: value for key, value in row.items() if key != "seconds" and key[:5] != "perf/"}
        for row in rows
    ]
    left = {
        "weights": (out / "model" / "model.safetensors").read_bytes(),
        "metrics": json.dumps(rows).encode(),
        "samples": (out / "samples.jsonl").read_bytes(),
    }
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in left.items()}


def train(checkout, command, data, out, processes, made):
    """One run of a case; `made` are the places of the runs before it, which a command may name."""
    flags = command.format(**made).split() + ["--data", data, "--out", str(out)]
    flags += ["--dtype", "float32"]  # as older checkouts have it by default
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launch += ["--master-port", free_port()]
    env = os.environ | {
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1" if processes > 1 or data == "toy" else "2",
    }
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), *flags],
        cwd=checkout,
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(flags)} failed:\n{done.stderr[-3000:]}")
    return digest(out)


def bits(checkout, chosen, default):
    """{case/processes: digests} of a checkout, read from its bits.json where they are known."""
    kept = checkout / "bits.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    cases, data = (DEFAULT, "reviews") if default else (CASES, "toy")
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for name, command in cases.items():
            for processes in (1, 2):
                key, out = f"{data}/{name}/{processes}", Path(folder, name, str(processes))
                needed = processes == 1 and any(f"{{{name}}}" in other for other in cases.values())
                if needed or ((not chosen or name in chosen) and key not in known):
                    known[key] = train(checkout, command, data, out, processes, made)
                    kept.write_text(json.dumps(known, indent=1))
                    print(f"{checkout} {key}", flush=True)
            made[name] = Path(folder, name, "1")
    return known


def main():
    flags = sys.argv[1:]
    default = "--default" in flags
    old, new, *chosen = [flag for flag in flags if flag != "--default"]
    first, second = (bits(Path(checkout).resolve(), chosen, default) for checkout in (old, new))
    data = "reviews" if default else "toy"
    asked = [
        key for key in first if key.startswith(data) and (not chosen or key.split("/")[1] in chosen)
    ]
    wrong = [
        f"{key}: {part}"
        for key in asked
        for part in first[key]
        if first[key][part] != second[key][part]
    ]
    print(*wrong, f"{len(asked)} runs compared, {len(wrong)} differences", sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
