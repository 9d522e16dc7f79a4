"""Parity with TRL: the same weights and texts give the same losses, gradients and updates, to 1e-5.

    pytest -m peer

TRL's side is all its own: trainers of its public interface read what save_pretrained wrote,
tokenise the texts, pad and mask the batches and run transformers' GPT-2. The vocabulary is the
bytes and EOS, so that no token straddles prompt and response.

Left out: label smoothing of the sigmoid loss, which TRL ignores; f-divergences of losses that are
not of a difference, which TRL refuses, and of ipo and sigmoid_norm, as dpo.f_divergence omits a
constant that does not cancel between two lengths; r_dpo, which TRL has not.
"""

from itertools import product

import pytest
import torch

import train_dpo
from minirlhf import data, dpo, lists, ppo, sft
from minirlhf.engine.rows import pad_rows
from minirlhf.engine.weights import export
from minirlhf.feedback.method import method_of
from minirlhf.gpt import GPT, GPTConfig, RewardModel
from minirlhf.reward import bradley_terry_loss
from minirlhf.sampling import response_logprobs, response_mask
from minirlhf.tokenizer import EOS, Tokenizer

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[dev]'")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::FutureWarning")]

N_CTX = 48
TOKENIZER = Tokenizer.train([], 257)
PAIRS = [("ab", "cde", "f"), ("", "x", "yyyy"), ("hello", "", "wow"), ("one prompt", "yes", "no"),
         ("", "aa", "ab"), ("q", "a cat", "a dog"), ("q", "tiny", "huge")]  # fmt: skip
CHOSEN, REJECTED = ([(pair[0], pair[side]) for pair in PAIRS] for side in (1, 2))
BETA = 0.3


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a random policy, reference and reward model.

    They are far enough from uniform for log-ratios of some nats.
    """
    folder = tmp_path_factory.mktemp("peer")
    config = GPTConfig(TOKENIZER.vocab_size, N_CTX, 2, 2, 16)
    torch.manual_seed(0)
    models = {"policy": GPT(config), "reference": GPT(config), "reward": RewardModel(config)}
    for name, model in models.items():
        for p in model.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.2)
            else:
                p.data.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(folder / name, TOKENIZER)
    return folder


@pytest.fixture
def peer(saved, tmp_path):
    """peer(kind, model, texts, batch_size, objects, **options): TRL's trainer of that kind.

    objects are further arguments of the trainer, options those of its configuration.
    """
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    file = str(saved / "policy" / "tokenizer.json")
    special = {"eos_token": EOS, "pad_token": "ÿ"}  # TOKENIZER.pad
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, **special)
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no",
             "disable_tqdm": True, "output_dir": str(tmp_path)}  # fmt: skip

    def make(kind, model, texts, batch_size, objects=None, **options):
        module = trl
        if not hasattr(trl, f"{kind}Trainer"):
            module = pytest.importorskip(f"trl.experimental.{kind.lower()}")
        config, trainer = getattr(module, f"{kind}Config"), getattr(module, f"{kind}Trainer")
        args = config(per_device_train_batch_size=batch_size, **quiet, **options)
        objects = {"processing_class": tokenizer, **(objects or {})}
        dataset = datasets.Dataset.from_list(texts)
        return trainer(model=model, args=args, train_dataset=dataset, **objects)

    return make


def theirs(path):
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

    kind = GPT2ForSequenceClassification if path.name == "reward" else GPT2LMHeadModel
    return kind.from_pretrained(path)


def ours(saved):
    """The policy and the reference."""
    return GPT.from_pretrained(saved / "policy"), GPT.from_pretrained(saved / "reference")


def preferences(pairs):
    return [
        {"prompt": EOS + prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in pairs
    ]


def rows(texts):
    """Tokens (N, T), prompt lengths (N,) and response lengths (N,) of (prompt, response)."""
    encoded, prompt_lengths = data.encode([(*text, "") for text in texts], TOKENIZER, N_CTX)
    tokens, lengths = pad_rows(encoded, TOKENIZER.pad)
    return tokens, torch.as_tensor(prompt_lengths), lengths - torch.as_tensor(prompt_lengths)


def logps(model, texts):
    """Summed log-probs (N,) of responses, and their lengths (N,)."""
    tokens, prompt_lengths, lengths = rows(texts)
    logprobs = response_logprobs(model, tokens, prompt_lengths, lengths, int(lengths.max()))
    return logprobs.sum(1), lengths


def pair_loss(kind, policy, reference, chosen, rejected, **options):
    (pc, nc), (pr, nr) = logps(policy, chosen), logps(policy, rejected)
    with torch.no_grad():
        (rc, _), (rr, _) = logps(reference, chosen), logps(reference, rejected)
    options |= {"chosen_lengths": nc, "rejected_lengths": nr}
    return dpo.pair_loss(kind, pc, pr, rc, rr, **options).mean()


def assert_close(ours, theirs):
    """Tensors by name; the tolerance is a share of the largest entry."""
    ours = {name.removeprefix("transformer."): x for name, x in export(ours, "").items()}
    theirs = {name.removeprefix("transformer."): x for name, x in theirs.items()}
    assert ours.keys() == theirs.keys()
    largest = max(x.abs().max() for x in theirs.values())
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name] / largest, x / largest, rtol=0, atol=1e-5)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(loss, model, trainer):
    """The loss of TRL's first batch, and the gradient of every weight."""
    their_loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5, abs=1e-5)
    loss.backward()
    their_loss.backward()
    assert_close(gradients(model), gradients(trainer.model))


ALPHA = "alpha_divergence"
DIVERGENCES = [
    ({"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    ({"divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    ({"divergence": "alpha"}, {"f_divergence_type": ALPHA}),
    ({"divergence": "alpha", ALPHA: -0.5},  # TRL's coefficient is 1 - alpha of the paper's
     {"f_divergence_type": ALPHA, "f_alpha_divergence_coef": 1.5}),
    ({"divergence": "alpha", ALPHA: 0.3},
     {"f_divergence_type": ALPHA, "f_alpha_divergence_coef": 0.7}),
]  # fmt: skip
DPO = [("ipo", {"length_normalise": True}, {})]
DPO += [(kind, {}, {}) for kind in (
    "sigmoid", "hinge", "sigmoid_norm", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
    "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop")]  # fmt: skip
OF_A_DIFFERENCE = ("sigmoid", "hinge", "exo_pair", "robust", "discopop")
DPO += [(kind, *f) for kind, f in product(OF_A_DIFFERENCE, DIVERGENCES)]


@pytest.mark.parametrize("kind, options, their_options", DPO)
def test_dpo(kind, options, their_options, saved, peer):
    policy, reference = ours(saved)
    smoothed = kind in ("exo_pair", "robust", "aot", "aot_unpaired")
    shared = {"beta": BETA, "label_smoothing": 0.1 if smoothed else 0.0}
    objects = {"ref_model": theirs(saved / "reference")}
    options, their_options = shared | options, shared | their_options | {"loss_type": [kind]}
    their_policy, texts = theirs(saved / "policy"), preferences(PAIRS)
    trainer = peer("DPO", their_policy, texts, len(PAIRS), objects, **their_options)
    loss = pair_loss(kind, policy, reference, CHOSEN, REJECTED, **options)
    assert_same(loss, policy, trainer)


@pytest.mark.parametrize("loss, options, their_options", [
    ("sft", {}, {"loss_type": ["sft"]}),
    ("sigmoid+0.2*sft", {}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}),
    ("0.8*hinge+1.5*apo_zero+sft", {},
     {"loss_type": ["hinge", "apo_zero", "sft"], "loss_weights": [0.8, 1.5, 1.0]}),
])  # fmt: skip
def test_sums(loss, options, their_options, saved, peer):
    """A pair at a time: TRL's next-token loss is a mean over the tokens of a batch."""
    method = method_of(train_dpo.Knobs(loss=loss))
    for pair in PAIRS[:1] + PAIRS[2:]:  # an empty answer is none to TRL
        policy, reference = ours(saved)
        objects = {"ref_model": theirs(saved / "reference")}
        given = {"beta": BETA} | their_options
        trainer = peer("DPO", theirs(saved / "policy"), preferences([pair]), 1, objects, **given)
        sides = [(pair[0], pair[1])], [(pair[0], pair[2])]

        def of_pairs(kind, sides=sides, policy=policy, reference=reference, **more):
            return pair_loss(kind, policy, reference, *sides, beta=BETA, **more)

        assert_same(method.losses(of_pairs, 0.0).mean(), policy, trainer)


@pytest.mark.parametrize("kind, options, their_kind, their_options", [
    ("simpo", {"beta": 2.0, "gamma": 0.7}, "CPO",
     {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0}),
    ("cpo", {"beta": BETA}, "CPO", {"loss_type": "sigmoid", "beta": BETA, "cpo_alpha": 1.0}),
    ("slic", {"delta": 1.0, "lam": 0.2}, "CPO",
     {"loss_type": "hinge", "beta": 1.0, "cpo_alpha": 0.2}),
    ("orpo", {"lam": 0.3}, "ORPO", {"beta": 0.3}),
])  # fmt: skip
def test_reference_free(kind, options, their_kind, their_options, saved, peer):
    """A pair at a time: TRL's next-token loss is a mean over the tokens of a batch.

    In ORPO it is one over those of the prompt too.
    """
    for prompt, chosen, rejected in PAIRS:
        prompt = "" if kind == "orpo" else prompt
        policy, _ = ours(saved)
        texts = preferences([(prompt, chosen, rejected)])
        trainer = peer(their_kind, theirs(saved / "policy"), texts, 1, **their_options)
        sides = [(prompt, chosen)], [(prompt, rejected)]
        assert_same(pair_loss(kind, policy, policy, *sides, **options), policy, trainer)


def test_kto(saved, peer):
    policy, reference = ours(saved)
    texts = CHOSEN + REJECTED
    desirable = torch.arange(len(texts)) < len(CHOSEN)
    # TRL's rule: the response of the row before
    mismatched = [(prompt, texts[i - 1][1]) for i, (prompt, _) in enumerate(texts)]
    with torch.no_grad():
        kl = logps(policy, mismatched)[0] - logps(reference, mismatched)[0]
        ref_logps, _ = logps(reference, texts)
    labelled = [
        {"prompt": EOS + prompt, "completion": response, "label": i < len(CHOSEN)}
        for i, (prompt, response) in enumerate(texts)
    ]
    their_policy, objects = theirs(saved / "policy"), {"ref_model": theirs(saved / "reference")}
    trainer = peer("KTO", their_policy, labelled, len(texts), objects, beta=BETA)
    assert kl.mean() > 0
    losses = lists.kto_loss(logps(policy, texts)[0], ref_logps, desirable, kl, beta=BETA)
    assert_same(losses.mean(), policy, trainer)


@pytest.mark.parametrize("margins", [None, (0.5, -0.2, 0.0, 1.3, 2.0, 0.1, 0.7)])
@pytest.mark.parametrize("center", [None, 0.1])
def test_reward_model(margins, center, saved, peer):
    model = RewardModel.from_pretrained(saved / "reward")
    chosen, rejected = (model(tokens, p + r) for tokens, p, r in (rows(CHOSEN), rows(REJECTED)))
    texts = preferences(PAIRS)
    for pair, margin in zip(texts, margins or (), strict=bool(margins)):
        pair["margin"] = margin
    their_options = {"center_rewards_coefficient": center}
    trainer = peer("Reward", theirs(saved / "reward"), texts, len(PAIRS), **their_options)
    options = {"margin": torch.tensor(margins or 0.0), "center": center or 0.0}
    assert_same(bradley_terry_loss(chosen, rejected, **options), model, trainer)


def test_sft(saved, peer):
    model, _ = ours(saved)
    tokens, prompt_lengths, lengths = rows(CHOSEN)
    texts = [{"text": EOS + prompt + response} for prompt, response in CHOSEN]
    trainer = peer("SFT", theirs(saved / "policy"), texts, len(CHOSEN))
    loss = -sft.row_logprobs(model, tokens, prompt_lengths + lengths).mean()
    assert_same(loss, model, trainer)


LATER = {  # what TRL calls it, and policy_loss; the weights of tokens; the weight of the entropy
    "": ({}, {}, "token", 0.0),
    "clip": ({"epsilon": 0.1, "epsilon_high": 0.3}, {"clip": 0.1, "clip_high": 0.3}, "token", 0.0),
    "response": ({"loss_type": "grpo"}, {}, "response", 0.0),
    "constant": ({"loss_type": "dr_grpo"}, {}, "constant", 0.0),
    "dapo": ({"loss_type": "dapo"}, {}, "token", 0.0),
    "gspo": ({"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
             {"level": "response", "clip": 0.01}, "response", 0.0),
    "entropy": ({"entropy_coef": 0.3}, {}, "token", 0.3),
    "entropy, response": ({"loss_type": "grpo", "entropy_coef": 0.3}, {}, "response", 0.3),
}  # fmt: skip
VARIANTS = [("rloo", 0.0, 0.02, ""), ("grpo", 0.0, 0.3, ""), ("reinforce", 0.5, 0.3, "")]
VARIANTS += [("grpo", 0.5, 0.3, later) for later in LATER]


@pytest.mark.parametrize("kind, kl_coef, lr, later", VARIANTS)
def test_group_baselines(kind, kl_coef, lr, later, saved, peer):
    """Two updates on a batch that TRL samples.

    Group advantages, clipped ratios, k3 in the loss and an entropy bonus move the weights alike.
    """
    more, loss_options, mean, entropy_coef = LATER[later]
    # Prompts of one length: TRL's left padding shifts GPT-2's positions
    samples, prompts = [], [{"prompt": EOS + "ab"}, {"prompt": EOS + "cd"}]

    def reward(prompts, completion_ids, **_):
        scores = [float(ids[0] % 7 + len(ids)) for ids in completion_ids]
        samples.extend(zip(prompts, completion_ids, scores, strict=True))
        return scores

    options = {"beta": kl_coef, "num_generations": 4, "max_completion_length": 12,
               "num_iterations": 2, "max_steps": 2, "max_grad_norm": 0.0}  # fmt: skip
    options["generation_kwargs"] = {"sequence_bias": [[[TOKENIZER.eos], 3.0]]}  # some end early
    if kind != "rloo":  # bnpo: a mean over the tokens of the batch
        options |= {"loss_type": "bnpo", "use_bias_correction_kl": False}
        options["scale_rewards"] = "group" if kind == "grpo" else "none"
    options |= more
    their_policy = theirs(saved / "policy")
    before = {name: p.detach().clone() for name, p in their_policy.named_parameters()}
    sgd = torch.optim.SGD(their_policy.parameters(), lr=lr)
    steady = torch.optim.lr_scheduler.ConstantLR(sgd, 1.0)
    objects = {"reward_funcs": reward, "optimizers": (sgd, steady)}
    peer("RLOO" if kind == "rloo" else "GRPO", their_policy, prompts, 8, objects, **options).train()

    encoded = [
        [TOKENIZER.eos, *TOKENIZER.encode(prompt.removeprefix(EOS)), *ids]
        for prompt, ids, _ in samples
    ]
    tokens, lengths = pad_rows(encoded, TOKENIZER.pad)
    (policy, _), (start, _) = ours(saved), ours(saved)
    rollout = (tokens, torch.full_like(lengths, 3), lengths - 3, 12)
    mask, old = response_mask(lengths - 3, 12), response_logprobs(start, *rollout).detach()
    advantages = ppo.group_advantages(torch.tensor([score for *_, score in samples]), 4, kind)
    sgd = torch.optim.SGD(policy.parameters(), lr=lr)
    for _ in range(2):
        logprobs, entropy = response_logprobs(policy, *rollout, entropy=True)
        if kind == "rloo":  # one ratio a response
            loss, stats = ppo.policy_loss(logprobs.sum(1), old.sum(1), advantages, torch.ones(8))
        else:
            weights = ppo.token_weights(lengths - 3, 12, mean, torch.ones(8))
            given = loss_options | {"weights": weights}
            loss, stats = ppo.policy_loss(logprobs, old, advantages[:, None], mask, **given)
            loss += kl_coef * ppo.kl_loss(logprobs, old, mask, "k3", weights)
            loss -= entropy_coef * ppo.masked_mean(entropy, mask)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    assert stats["ppo/policy/clipfrac"] > 0 and not mask.all()
    moved, their_moved = (
        {name: p.detach() - start[name] for name, p in model.named_parameters()}
        for model, start in ((policy, dict(start.named_parameters())), (their_policy, before))
    )
    assert_close(moved, their_moved)
