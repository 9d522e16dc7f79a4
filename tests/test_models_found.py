"""Model directories as other programs leave them, and models that belong together.

Hugging Face's tokenizers and transformers say what is right: the same text, the same ids; the same
ids, the same logits.
"""

import fnmatch
import json
import math
import re
import shutil
import sys
import types

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import train_dpo
import train_ppo
import train_rm
from minirlhf import sft
from minirlhf.engine import curves
from minirlhf.engine.cli import UserError
from minirlhf.engine.vocabulary import BYTE_TO_CHAR, EOS
from minirlhf.feedback import labelers
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import GPT, GPTConfig, RewardModel
from minirlhf.sampling import generate
from minirlhf.tokenizer import PATTERN, Tokenizer, load_base, load_tokenizer

hf = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "It's the world's best film, isn't it?",
    "日本語のテキスト 😀👍🏽",
    "aaaa  aa\n\n x\t ok ",
    "The END",
]
CORPUS = TEXTS * 3 + ["low lower lowest, new newer newest films"]
OTHER_WORDS = [text[::-1] for text in CORPUS]
ANY = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
ANY |= st.text(st.sampled_from("lowest newfilm'aT日 \n"), max_size=30)
thorough = settings(max_examples=150, deadline=None, derandomize=True)


def tokenizer_with(special=(EOS,), texts=CORPUS, size=330):
    """Hugging Face's tokenizer, trained by itself: its special tokens have the first ids."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "show_progress": False}
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), **options
    )
    theirs.train_from_iterator(texts, trainer)
    return theirs


def with_eos_at(place, *behind):
    """The same with EOS at another id, and other special tokens added behind all."""
    content = json.loads(tokenizer_with().to_str())
    vocab = content["model"]["vocab"]
    moved = {token: i - (i <= place) for token, i in vocab.items()}  # EOS leaves 0
    content["model"]["vocab"] = moved | {EOS: place}
    content["added_tokens"][0]["id"] = place
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.add_special_tokens(list(behind))
    return theirs


N = 330  # ids of these
PLACES = [0, 1, 100, 256, 300, N - 1]


def saved(theirs, folder):
    folder.mkdir(exist_ok=True)
    theirs.save(str(folder / "tokenizer.json"))
    return folder


def as_two_files(theirs, folder):
    """vocab.json and merges.txt, as GPT-2 itself came."""
    model = json.loads(theirs.to_str())["model"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


def tiny(vocab_size=N, seed=0, **more):
    """transformers' own GPT-2, with weights that matter."""
    torch.manual_seed(seed)
    sizes = dict(n_positions=40, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    config = hf.GPT2Config(vocab_size=vocab_size, **sizes, **more)
    kind = hf.GPT2ForSequenceClassification if "num_labels" in more else hf.GPT2LMHeadModel
    model = kind(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def model_in(folder, theirs=None, model=None, **options):
    """A directory of both programs' making."""
    (model or tiny()).save_pretrained(folder, **options)
    return saved(theirs or tokenizer_with(), folder)


WORDS = Tokenizer.train(CORPUS, N)
IDS = torch.randint(N, (3, 20), generator=torch.Generator().manual_seed(0))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# Tokenizers: the same text, the same ids


@pytest.mark.parametrize("place", PLACES)
def test_eos_at_any_id(tmp_path, place):
    theirs = with_eos_at(place, "[PAD]", "<|im_start|>")
    ours = load_tokenizer(saved(theirs, tmp_path))
    assert (ours.eos, ours.vocab_size) == (place, N) and theirs.token_to_id(EOS) == place
    assert ours.added == ["[PAD]", "<|im_start|>"]

    @thorough
    @given(text=ANY)
    def same(text):
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids and place not in ids
        assert ours.decode([place, *ids, place]) == text == theirs.decode(ids)

    same()
    ours.save(tmp_path / "again")
    again, read = Tokenizer.load(tmp_path / "again"), tmp_path / "again" / "tokenizer.json"
    assert (again.ranks, again.eos, again.fingerprint()) == (ours.ranks, place, ours.fingerprint())
    whole = tokenizers.Tokenizer.from_file(str(read))
    for text in TEXTS:
        assert whole.encode(text).ids == theirs.encode(text).ids
    assert whole.token_to_id(EOS) == place and whole.get_vocab_size() == N


@pytest.mark.parametrize("place", PLACES)
def test_vocab_json_and_merges(tmp_path, place):
    as_two_files(with_eos_at(place), tmp_path)
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert (ours.eos, ours.vocab_size) == (place, N)
    for text in [*TEXTS, "", " ", "\r\n", "a\u2028b\x85c", "\ufeff  x"]:
        assert ours.encode(text) == theirs(text).input_ids


@pytest.mark.parametrize("change", [
    lambda text: text.removeprefix("#version: 0.2\n"),
    lambda text: text.rstrip("\n"),
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text + "\n\n",
])  # fmt: skip
def test_merges_as_editors_leave_them(tmp_path, change):
    expected = load_tokenizer(as_two_files(tokenizer_with(), tmp_path)).fingerprint()
    path = tmp_path / "merges.txt"
    path.write_bytes(change(path.read_text(encoding="utf-8")).encode())
    assert load_tokenizer(tmp_path).fingerprint() == expected


def test_added_tokens_json(tmp_path):
    as_two_files(tokenizer_with(), tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": N, "<sep>": N + 7}))
    ours = load_tokenizer(tmp_path)
    assert (ours.added, ours.vocab_size) == (["[PAD]", "<sep>"], N)


def test_the_directorys_own_comes_first(tmp_path):
    as_two_files(with_eos_at(5), tmp_path)
    saved(with_eos_at(9), tmp_path)
    assert load_tokenizer(tmp_path).eos == 9
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).eos == 5


@pytest.mark.parametrize("size", [50257, 50256, 50258, 50304, 257, None])
def test_gpt2s_only_for_its_size(tmp_path, monkeypatch, size):
    ours = Tokenizer.train([], 257)
    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ours.ranks,
                                 special_tokens={EOS: 256})  # fmt: skip
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
    if size == 50257:
        assert load_tokenizer(tmp_path).ranks == ours.ranks
    else:
        with pytest.raises(
            UserError, match=f"{tmp_path}: neither tokenizer.json.*of {size} is not"
        ):
            load_tokenizer(tmp_path)


BYTES = {BYTE_TO_CHAR[b]: b for b in range(256)}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def content(vocab=None, merges=(), added=(), words=BYTE_LEVEL, normalizer=None, **model):
    model = {"type": "BPE", "vocab": vocab or BYTES | {EOS: 256}, "merges": merges, **model}
    tokens = [{"content": name, "id": i, "special": special} for name, i, special in added]
    return {
        "model": model,
        "pre_tokenizer": words,
        "normalizer": normalizer,
        "added_tokens": tokens,
    }


ABC = BYTES | {"ab": 256, "bc": 257, "abc": 258, EOS: 259}
SEQUENCE = {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, BYTE_LEVEL]}


@pytest.mark.parametrize("found, names", [
    (content(type="WordPiece"), "WordPiece"), (content(type="Unigram"), "Unigram"),
    (content(normalizer={"type": "NFC"}), "normalizer.*NFC"),
    (content(words=None), "pre_tokenizer"), (content(words=SEQUENCE), "Digits"),
    (content(words=BYTE_LEVEL | {"add_prefix_space": True}), "add_prefix_space"),
    (content(words=BYTE_LEVEL | {"use_regex": False}), "use_regex"),
    (content(dropout=0.1), "dropout 0.1"), (content(end_of_word_suffix="</w>"), "</w>"),
    (content(added=[("covid", 257, False)]), "'covid' is not special"),
    (content(BYTES | {"</s>": 256}, added=[("</s>", 256, True)]), r"no token <\|endoftext.*</s>"),
    (content(BYTES), "no token.*no special token"),
    (content(BYTES | {EOS: 300}), "256 is that of no token"),
    (content(BYTES | {EOS: 257}, added=[("[PAD]", 256, True)]), r"256 is that of '\[PAD\]'"),
    (content({c: i + 1 for c, i in BYTES.items()} | {EOS: 257}, added=[("<s>", 0, True)]),
     "id 0 is that of '<s>'"),
    (content(added=[("[PAD]", 7, True)]), r"7 is that of '\[PAD\]'"),
    (content(added=[(EOS, 257, True)]), "two ids of"),
    (content(added=[("!", BYTES["!"], True)]), "'!'"),
    (content(BYTES | {EOS: 5}), "256 is that of no token"),
    (content(added=[("[PAD]", "257", True)]), "whole numbers"),
    (content(BYTES | {"ab": 256, EOS: 257}), "0 merges of 1 longer"),
    (content(ABC, ["a b", "b c", "a bc"]), "'a', 'bc'.*'abc'"),  # BPE makes it of ab and c
    (content(BYTES | {"": 256, EOS: 257}), "KeyError"),
])  # fmt: skip
def test_other_tokenizers_are_refused_by_name(tmp_path, found, names):
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=f"{tmp_path}/tokenizer.json.*{names}") as refused:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name, text, names", [
    ("merges.txt", None, "merges.txt"), ("vocab.json", None, "vocab.json: no tokenizer"),
    ("vocab.json", "[]", "vocab.json is not an object"),
    ("vocab.json", "{", "vocab.json is broken"),
    ("merges.txt", "#version: 0.2\nl o\n", "1 merges of"),
    ("merges.txt", "\udcff", "vocab.json.*utf"),
    ("added_tokens.json", '["[PAD]"]', "added_tokens.json is not an object"),
    ("added_tokens.json", '{"[PAD]": 3}', r"id 3 is that of '\[PAD\]'"),
    ("tokenizer_config.json", '{"add_prefix_space": true}', "add_prefix_space"),
    ("tokenizer_config.json", "{", "tokenizer_config.json is broken"),
])  # fmt: skip
def test_parts_of_a_tokenizer_are_refused(tmp_path, name, text, names):
    as_two_files(tokenizer_with(), tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=names) as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


def test_fingerprints_are_of_the_content(tmp_path):
    one = Tokenizer.train(CORPUS, N)
    assert one.fingerprint() == Tokenizer.train(CORPUS, N).fingerprint()
    one.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint() == one.fingerprint()
    assert len(one.fingerprint()) == 16 and int(one.fingerprint(), 16) >= 0
    others = [Tokenizer.train(OTHER_WORDS, N), Tokenizer.train(CORPUS, N - 1)]
    others += [load_tokenizer(saved(with_eos_at(i), tmp_path)) for i in PLACES]
    assert len({t.fingerprint() for t in others}) == len(others) == 8
    assert others[-1].fingerprint() == one.fingerprint()  # Hugging Face trains the same


# Weights: the same ids, the same logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("labels", [None, 1, 6])
def test_shards(tmp_path, dtype, labels):
    more = {"num_labels": labels, "pad_token_id": 0} if labels else {}
    theirs = tiny(**more).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    kind = {None: GPT, 1: RewardModel, 6: PreferenceModel}[labels]
    ours, theirs = kind.from_pretrained(tmp_path), theirs.float()
    if labels:
        lengths = torch.tensor([20, 20, 20])
        found = ours(IDS.clamp(min=1), lengths).view(3, -1)
        close(found, theirs(IDS.clamp(min=1)).logits)
    else:
        close(ours(IDS), theirs(IDS).logits)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


def test_a_whole_file_comes_before_shards(tmp_path):
    tiny(seed=1).save_pretrained(tmp_path, max_shard_size="4KB")
    whole = tiny(seed=2)
    state = {k: v.contiguous() for k, v in whole.state_dict().items() if k != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    close(GPT.from_pretrained(tmp_path)(IDS), whole(IDS).logits)


INDEX = "model.safetensors.index.json"


def shards_of(folder):
    return sorted(folder.glob("model-*.safetensors"))


def edit_index(change):
    def edit(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index, index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def all_at(place):
    return edit_index(lambda index, shard_of: shard_of.update(dict.fromkeys(shard_of, place)))


def edit_shard(change):
    def edit(folder):
        first, second = (load_file(path) for path in shards_of(folder)[:2])
        change(first, second)
        for path, weights in zip(shards_of(folder), (first, second), strict=False):
            save_file(weights, path)

    return edit


def outside(folder):
    shutil.copy(shards_of(folder)[0], folder.parent / "out.safetensors")
    all_at("../out.safetensors")(folder)


@pytest.mark.parametrize("damage, names", [
    (lambda d: shards_of(d)[1].unlink(), "model-00002-of-.* is missing, which model.safe"),
    (lambda d: shards_of(d)[1].write_bytes(b"x"), "broken model-00002-of-"),
    (outside, r"lies in \"\.\./out.safetensors\": expected the name of a .safetensors"),
    (all_at("/etc/passwd"), "lies in \"/etc/passwd\": expected"),
    (all_at("sub/model.safetensors"), "expected the name of a .safetensors file in this directory"),
    (all_at("..\\\\model.safetensors"), "expected the name"),
    (all_at("x.bin"), "expected the name"),
    (all_at(3), "lies in 3: expected the name"), (all_at(["a"]), "lies in a list"),
    (all_at(""), "expected the name"),
    (edit_shard(lambda a, b: a.pop(next(iter(a)))), "is not in model-00001-.*1 such tensors"),
    (edit_shard(lambda a, b: b.update(a)), "lies in model-00002-of-.* but .* in model-00001-of-"),
    (edit_shard(lambda a, b: b.update(extra=torch.zeros(2))), "\"extra\" lies in .* in no file"),
    (edit_index(lambda index, shard_of: shard_of.update(extra=shard_of[next(iter(shard_of))])),
     "\"extra\" is not in model-"),
    (edit_index(lambda index, _: index["metadata"].update(total_size=8)), "has total_size 8"),
    (edit_index(lambda index, _: index["metadata"].update(total_size="8")), "has total_size \"8\""),
    (edit_index(lambda index, _: index.pop("weight_map")), "expected an object with weight_map"),
    (edit_index(lambda index, _: index.update(weight_map={})), "expected an object with weight_m"),
    (edit_index(lambda index, _: index.update(metadata=[1])), "expected an object with weight_map"),
    (lambda d: (d / INDEX).write_text("[1]"), "expected an object with weight_map"),
    (lambda d: (d / INDEX).write_text("{"), "index.json is broken: not JSON"),
])  # fmt: skip
def test_shards_that_do_not_fit_together(tmp_path, damage, names):
    folder = tmp_path / "model"
    tiny().save_pretrained(folder, max_shard_size="4KB")
    damage(folder)
    with pytest.raises(UserError, match=f"{folder}.*{names}") as refused:
        GPT.from_pretrained(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("facts", [None, {}, "no"])
def test_an_index_need_not_know_its_size(tmp_path, facts):
    theirs = tiny()
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    edit_index(lambda index, _: index.update(metadata=facts) if facts != "no" else
               index.pop("metadata"))(tmp_path)  # fmt: skip
    close(GPT.from_pretrained(tmp_path)(IDS), theirs(IDS).logits)


def test_pickled_shards_are_not_read(tmp_path):
    tiny().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(UserError, match="only pytorch_model-00001-of-00002.bin.* a pickle"):
        GPT.from_pretrained(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the model o/n: the folder that it serves; the names it gave are in `fetched`."""
    served, cached = tmp_path / "served", tmp_path / "cached"
    served.mkdir()
    cached.mkdir()

    def snapshot_download(name, allow_patterns):
        assert name == "o/n"
        for path in served.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, cached)
        return str(cached)

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return types.SimpleNamespace(served=served, cached=cached)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "4KB"}])
@pytest.mark.parametrize("two_files", [False, True])
def test_a_model_on_the_hub(hub, options, two_files):
    theirs = tiny()
    (as_two_files if two_files else saved)(tokenizer_with(), hub.served)
    theirs.save_pretrained(hub.served, **options)
    for name in ("pytorch_model.bin", "onnx.safetensors", "model-x.safetensors", "README.md"):
        (hub.served / name).write_bytes(b"x")
    model, tokenizer = load_base("o/n")
    close(model(IDS), theirs(IDS).logits)
    assert tokenizer.vocab_size == N and tokenizer.eos == 0
    fetched = {path.name for path in hub.cached.iterdir()}
    assert not fetched & {
        "pytorch_model.bin",
        "onnx.safetensors",
        "model-x.safetensors",
        "README.md",
    }


def test_a_shard_on_the_hub_that_lies_outside(hub):
    model_in(hub.served, max_shard_size="4KB")
    all_at("../../x.safetensors")(hub.served)
    with pytest.raises(UserError, match="expected the name of a .safetensors file"):
        load_base("o/n")


# Vocabularies that were padded


def padded(folder, rows, theirs=None):
    """A directory whose model has more rows than ids have texts, and the likeliest are without."""
    model = tiny()
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.transformer.wte.weight[N:] = 100 * model.transformer.wte.weight[:1]
        model.transformer.wte.weight[-1] *= -1
    model.save_pretrained(folder)
    return saved(theirs or tokenizer_with(), folder), model


@pytest.mark.parametrize("rows, behind, names", [
    (384, (), "cut off the 54 of 384 ids that have no text$"),
    (N + 1, ("[PAD]",), r"cut off the 1 of 331 ids that have no text, '\[PAD\]'$"),
    (384, ("[PAD]", "<|im_start|>"), r"54 of 384 ids .*, '\[PAD\]', '<\|im_start\|>'$"),
    (N, (), None),
    (N, ("[PAD]",), None),  # a tokenizer's, of which the model knows nothing
])  # fmt: skip
def test_ids_without_a_text_are_cut_off(tmp_path, capsys, rows, behind, names):
    folder, theirs = padded(tmp_path, rows, with_eos_at(N - 1, *behind))
    model, tokenizer = load_base(folder)
    said = capsys.readouterr().out.strip()
    assert (said == "") if names is None else re.search(names, said)
    assert said.count("\n") == 0 and model.config.vocab_size == tokenizer.vocab_size == N
    close(model(IDS), theirs(IDS).logits[..., :N])
    assert GPT.from_pretrained(folder).config.vocab_size == rows
    close(GPT.from_pretrained(folder)(IDS), theirs(IDS).logits)
    prompts = IDS[:, :8]
    rollout = generate(model, prompts, torch.tensor([8, 8, 8]), 20, eos=-1, pad=0, temperature=9.0)
    assert rollout.tokens.max() < N
    assert tokenizer.decode(rollout.tokens[0].tolist())
    if rows > N + 1:  # transformers' own answer is one of them: the cut does change something
        assert theirs(prompts).logits.argmax(-1).max() >= N
    model.save_pretrained(tmp_path / "cut", tokenizer)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    close(again(IDS).logits, model(IDS))


def test_a_model_of_fewer_ids_than_its_tokenizer(tmp_path):
    model_in(tmp_path, model=tiny(N - 1))
    with pytest.raises(
        UserError, match=f"{tmp_path}: the tokenizer has 330 ids, .* model has 329$"
    ):
        load_base(tmp_path)


def test_a_run_is_a_base_too(tmp_path):
    model_in(tmp_path / "model")
    assert load_base(tmp_path)[1].vocab_size == N


SMALL = dict(data="toy", batch_size=256, seed=3)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """All four stages on a vocabulary of 257 that was padded to 320: the folder of their runs."""
    folder = tmp_path_factory.mktemp("padded")
    model = tiny(320)
    model.save_pretrained(folder / "base")
    Tokenizer.train([], 257).save(folder / "base")
    small = SMALL | {"init": str(folder / "base")}
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(curves, "plot", lambda *_: None)  # it takes half of the time
    sft.main(sft.Knobs(**small, out=str(folder / "sft"), epochs=1))
    train_rm.main(train_rm.Knobs(**small, out=str(folder / "rm"), epochs=1, response_length=8))
    short = small | {"eval_samples": 8, "response_length": 8, "steps": 2, "batch_size": 16}
    own = {"reward": str(folder / "rm")}
    train_ppo.main(train_ppo.Knobs(**short, **own, out=str(folder / "ppo")))
    train_dpo.main(train_dpo.Knobs(**short, **own, out=str(folder / "dpo"), online=True))
    monkeypatch.undo()
    return folder


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "dpo"])
def test_all_stages_train_on_a_padded_vocabulary(stages, stage):
    model = stages / stage / "model"
    assert json.loads((model / "config.json").read_text())["vocab_size"] == 257
    kind = hf.GPT2ForSequenceClassification if stage == "rm" else hf.GPT2LMHeadModel
    wte = kind.from_pretrained(model).transformer.wte.weight
    assert wte.shape == (257, 8) and wte.isfinite().all()
    assert (stages / stage / "summary.json").exists()


# Models that belong together


def judge(kind=RewardModel, n=N, n_ctx=40, seed=0):
    torch.manual_seed(seed)
    return kind(GPTConfig(n, n_ctx, 1, 2, 8))


@pytest.fixture
def base(tmp_path):
    return load_base(model_in(tmp_path / "base"))


def load(source, base, kind="load_labeler"):
    model, tokenizer = base
    if kind == "load_labeler":
        return labelers.load_labeler(str(source), None, tokenizer, model)
    return labelers.load_reward_model(str(source), tokenizer, model)


@pytest.mark.parametrize("kind", [RewardModel, PreferenceModel])
@pytest.mark.parametrize("inner", ["", "model"])
@pytest.mark.parametrize("other", ["merges", "EOS", "size"])
def test_another_tokenizer_is_refused(tmp_path, base, kind, inner, other):
    """A run or a directory; the size is the same but in one case."""
    theirs = {
        "merges": lambda: tokenizer_with(texts=OTHER_WORDS, size=N),
        "EOS": lambda: with_eos_at(N - 1),
        "size": lambda: tokenizer_with(size=300),
    }[other]()
    n = theirs.get_vocab_size()
    assert (n == N) == (other != "size")
    judge(kind, n).save_pretrained(tmp_path / "rm" / inner)
    saved(theirs, tmp_path / "rm" / inner)
    with pytest.raises(UserError, match=f"{tmp_path}/rm: its tokenizer is not the base model's"):
        load(tmp_path / "rm", base)


@pytest.mark.parametrize("kind", [RewardModel, PreferenceModel])
@pytest.mark.parametrize(
    "form", ["same", "two files", "padded", "none", "none, other size", "short"]
)
def test_what_goes_together(tmp_path, base, capsys, kind, form):
    folder = tmp_path / "rm"
    rows = {"padded": 384, "none, other size": N + 1}.get(form, N)
    model = judge(kind, rows, n_ctx=39 if form == "short" else 40)
    model.save_pretrained(folder)
    if form == "two files":
        config = (folder / "config.json").read_text()
        as_two_files(tokenizer_with(), folder)
        (folder / "config.json").write_text(config)
    elif not form.startswith("none"):
        saved(tokenizer_with(), folder)
    refused = {
        "short": "a context of 39 tokens, the base model has one of 40",
        "none, other size": "vocabulary 331 and no tokenizer, the base model has 330",
    }
    if form in refused:
        with pytest.raises(UserError, match=f"{folder}: {refused[form]}"):
            load(folder, base)
        return
    scorer, prefer = load(folder, base)
    said = capsys.readouterr().out.strip()
    expected = {"none": "no tokenizer lies there", "padded": "cut off the 54 of 384"}.get(form, "")
    assert expected in said and said.count("\n") == 0 and bool(said) == bool(expected)
    lengths = torch.tensor([8, 8, 8]), torch.tensor([12, 12, 12])
    whole = model(IDS, sum(lengths))
    if kind is RewardModel:
        close(scorer(IDS, *lengths), whole)
    else:
        odds = model.logit(whole[:, None], whole[None])
        close(prefer(IDS, *lengths, 3)[0], odds.sigmoid())


@pytest.mark.parametrize("script, online", [(train_ppo, {}), (train_dpo, {"online": True})])
def test_scripts_refuse_another_tokenizer(tmp_path, stages, script, online):
    """--init differs from what the reward model was made from: same size, other ids."""
    theirs = Tokenizer.train([], 257)
    swapped = {b"b": theirs.ranks[b"a"], b"a": theirs.ranks[b"b"]}
    tiny(257).save_pretrained(tmp_path / "base")
    Tokenizer(theirs.ranks | swapped).save(tmp_path / "base")
    given = SMALL | {"batch_size": 16, "init": str(tmp_path / "base"), "reward": str(stages / "rm")}
    with pytest.raises(UserError, match="its tokenizer is not the base model's"):
        script.main(script.Knobs(**given, **online, steps=1, out=str(tmp_path / "out")))


# Bits a byte


@pytest.mark.parametrize("texts, size", [(["😀 日本", "é"], 257), (TEXTS, N), (["a😀b" * 3], 257)])
@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_bits_a_byte_of_half_characters(tmp_path, texts, size, cut):
    """Rows that end in the midst of a character; log-probs by NumPy of transformers' logits."""
    theirs = tiny(size)
    theirs.save_pretrained(tmp_path)
    Tokenizer.train(CORPUS if size > 257 else [], size).save(tmp_path)
    model, tokenizer = load_base(tmp_path)
    rows, nats, n_bytes, n_tokens = [], 0.0, 0, 0
    for text in texts:
        ids = tokenizer.encode(text)
        ids = ids[: max(1, len(ids) - cut)][:36]
        rows.append(np.array([tokenizer.eos, *ids, tokenizer.eos]))
        logits = theirs(torch.tensor(rows[-1][None])).logits[0].detach().double().numpy()
        for t, i in enumerate(rows[-1][1:]):
            nats -= logits[t, i] - np.log(np.exp(logits[t]).sum())
        by_id = {i: token for token, i in tokenizer.ranks.items()}
        n_bytes += sum(len(by_id[i]) for i in ids)
        n_tokens += len(ids) + 1
    off = torch.autocast("cpu", torch.bfloat16, enabled=False)
    figures = sft.evaluate(model, rows, tokenizer, off, torch.device("cpu"))
    assert figures["eval/bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert figures["eval/perplexity"] == pytest.approx(math.exp(nats / n_tokens), rel=1e-5)


@thorough
@given(text=ANY, data=st.data())
def test_bytes_of_any_part(text, data):
    tokenizer = WORDS
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    first, second = tokenizer.decode_bytes(ids[:cut]), tokenizer.decode_bytes(ids[cut:])
    assert first + second == text.encode()
    assert tokenizer.decode(ids[:cut]) == first.decode(errors="replace")
