"""interp/hf.py: against transformers, tiktoken and definitions by hand; round trips to the last bit.

    python -m pytest tests/test_hf.py        (tests/test_lens.py has TransformerLens, SAELens and the circuit library)
"""

import dataclasses
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "interp")]
import config as knobs
import sae
from eval import open_run
from interp import hf
from model import GPTNeo, GPTNeoConfig, load_checkpoint, save_checkpoint
from prepare import EOT, PIECE, UserError, load_meta, load_tokenizer
from test_prepare import HARD, TOKENIZERS
from test_train import make_data

README = (ROOT / "README.md").read_text()


def snippets(library):
    """The python blocks of the README's section on other libraries that import this one."""
    section = README.split("## Use it elsewhere")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return [block for block in blocks if re.search(rf"^(from|import) {library}\b", block, re.MULTILINE)]


def write_run(path, data, noise=0.1, **changes):
    """A run folder as train.py leaves it, of a tiny model in which every weight matters. -> its model"""
    torch.manual_seed(0)
    sizes = dict(block_size=16, n_layer=2, n_head=2, n_embd=8, vocab_size=300)
    config = knobs.Config(**{**sizes, **changes}, data=str(data), out=str(path))
    model = GPTNeo(config.model)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=noise)
    path.mkdir(parents=True)
    meta = load_meta(data)
    save_checkpoint(path / "best.pt", config.model, model.state_dict(), data=meta["checksum"], tokenizer=meta["tokenizer"],
                    train_config=dataclasses.asdict(config), step=7)
    return model.eval()


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


@pytest.fixture
def typed(monkeypatch):
    def type_in(*words):
        monkeypatch.setattr(sys, "argv", ["interp/hf.py", *map(str, words)])
        hf.main()
    return type_in


def ids(count, length, vocab_size=300):
    return torch.randint(0, vocab_size, (count, length), generator=torch.Generator().manual_seed(1))


# ---- the tokenizers


def both(spec, folder):
    """A tokenizer of ours and, loaded by transformers with no code of ours, the exported one."""
    encoding = load_tokenizer(spec)
    (folder / "tokenizer.json").write_text(json.dumps(hf.tokenizer_json(encoding)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOT}))
    return encoding, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_the_same_for_any_text(name, tmp_path):
    spec = {"name": "gpt2"}
    if name == "words":
        pieces = sorted({piece for text in HARD for piece in re.findall(r" ?\w+", text)} - set("abcdefghijklmnopqrstuvwxyz_ "))
        spec = {"name": "words", "pieces": [piece for piece in pieces if len(piece.encode()) > 1]}
    ours, theirs = both(spec, tmp_path)
    assert ours._pat_str == PIECE
    rng = random.Random(0)
    letters = [chr(c) for c in [*range(0x250), *range(0x2000, 0x2070), 0x3000, 0x1680, 0x85, 0xfeff, 0x1d7ce, 0x1f600, 0x10ffff]]
    texts = [*HARD, "", " ", "\n", " \n ", "x  \n", "a\u0301", "a" * 3000, " " * 3000 + "b", "\n" * 500]
    texts += ["".join(rng.choices(letters, k=rng.randrange(1, 40))) for _ in range(500)]
    texts += ["".join(chr(c) for c in range(start, start + 4096)) for start in (0x4000, 0xe000, 0x10000, 0x1e000)]
    for text in texts:
        ordinary, special = ours.encode_ordinary(text), ours.encode(text, allowed_special="all")
        assert theirs.encode(text) == special
        assert theirs.encode(text, split_special_tokens=True) == ordinary
        assert theirs.decode(ordinary) == text
    for _ in range(300):  # any tokens, also those that are no UTF-8 together
        some = rng.choices(range(ours.n_vocab), k=rng.randrange(1, 30))
        assert theirs.decode(some) == ours.decode(some)
    assert theirs.eos_token_id == ours.eot_token and len(theirs) == ours.n_vocab


def test_merging_is_the_same_in_any_vocabulary(tmp_path):
    """Vocabularies of a few letters in an order of no sense: a token may be had in several ways, by others that are rarer,
    only as a whole piece, or not at all."""
    rng = random.Random(0)
    for letters in ("ab", "aab", "abc"):
        for _ in range(15):
            words = {"".join(rng.choices(letters, k=rng.randrange(2, 6))) for _ in range(rng.randrange(3, 25))}
            ours, theirs = both({"name": "words", "pieces": rng.sample(sorted(words), len(words))}, tmp_path)
            for _ in range(60):
                text = "".join(rng.choices(letters + " ", k=rng.randrange(1, 60)))
                assert theirs.encode(text) == ours.encode_ordinary(text)


# ---- ours -> Hugging Face -> ours

GEOMETRIES = [
    {}, {"ablation": "global", "attn_unit": "head", "k_attn": 1}, {"ablation": "none"}, {"n_head": 1, "n_layer": 1, "n_embd": 6},
    {"attention_layers": "local", "window_size": 5}, {"attention_layers": "global,local", "window_size": 3, "n_layer": 4},
    {"attention_layers": "local,global,global", "window_size": 1, "n_layer": 6}, {"attention_layers": "local", "window_size": 99},
    {"block_size": 1}, {"n_head": 8}]


@pytest.mark.parametrize("changes", GEOMETRIES, ids=str)
def test_transformers_computes_the_same_and_import_gives_the_same_bits(changes, data, tmp_path, typed):
    model = write_run(tmp_path / "run", data, **changes)
    typed("export", tmp_path / "run", tmp_path / "hub", "--no_figures")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    idx = ids(3, model.config.block_size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx), rtol=0, atol=1e-5)
    typed("import", tmp_path / "hub", tmp_path / "again")
    before, after = load_checkpoint(tmp_path / "run"), load_checkpoint(tmp_path / "again")
    assert before.keys() == after.keys() and before["model"].keys() == after["model"].keys()
    assert all(torch.equal(value, after["model"][name]) for name, value in before["model"].items())
    assert all(before[name] == after[name] for name in before if name != "model")
    run = open_run(str(tmp_path / "again"))
    assert run.step == 7 and run.model.config == model.config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "data", "hub", "run"]


def test_the_pipeline_writes_a_story(data, tmp_path, typed):
    write_run(tmp_path / "run", data)
    typed("export", tmp_path / "run", tmp_path / "hub", "--no_figures")
    story = transformers.pipeline("text-generation", str(tmp_path / "hub"))(" word1 word2")[0]["generated_text"]
    assert story.startswith(" word1 word2") and len(story) > len(" word1 word2")


def test_the_card_has_the_figures_of_eval(data, tmp_path, typed, monkeypatch, capsys):
    import eval
    write_run(tmp_path / "run", data)
    typed("export", tmp_path / "run", tmp_path / "hub", "--device=cpu")
    card = (tmp_path / "hub" / "README.md").read_text()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path / "run"), "--json", "--device=cpu"])
    eval.main()
    row, = json.loads(capsys.readouterr().out)
    assert f"| ppl_clean | {row['ppl_clean']:.3f} ± {row['ppl_clean_se']:.3f} |" in card
    assert f"| ppl_ablated | {row['ppl_ablated']:.3f} ±" in card and "| step | 7 |" in card
    assert "| k_mlp | 2 |" in card and "| learning_rate | 0.0014 |" in card and load_meta(data)["checksum"] in card


def test_what_cannot_be_finished_leaves_nothing(data, tmp_path, typed, monkeypatch):
    write_run(tmp_path / "run", data)
    monkeypatch.setattr(hf, "model_card", lambda run, row: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        typed("export", tmp_path / "run", tmp_path / "hub", "--no_figures")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]
    monkeypatch.undo()
    write = hf.write_tensors

    def other_is_faster(path, tensors):
        (tmp_path / "hub").mkdir(exist_ok=True)
        (tmp_path / "hub" / "theirs").touch()
        write(path, tensors)
    monkeypatch.setattr(hf, "write_tensors", other_is_faster)
    with pytest.raises(UserError, match="hub is there already"):
        hf.export_run(open_run(str(tmp_path / "run")), tmp_path / "hub")
    assert [path.name for path in (tmp_path / "hub").iterdir()] == ["theirs"]


@pytest.mark.parametrize("file", ["model.safetensors", "gates.safetensors"])
def test_changed_weights_are_not_taken_for_the_run(file, data, tmp_path):
    write_run(tmp_path / "run", data)
    hf.export_run(open_run(str(tmp_path / "run")), tmp_path / "hub")
    content = bytearray((tmp_path / "hub" / file).read_bytes())
    content[-2] ^= 1
    (tmp_path / "hub" / file).write_bytes(content)
    with pytest.raises(UserError, match="have changed since they were exported"):
        hf.import_run(tmp_path / "hub", tmp_path / "again")
    (tmp_path / "hub" / "training.json").unlink()
    assert hf.import_run(tmp_path / "hub", tmp_path / "again", data).ablation == "none"


# ---- Hugging Face -> ours -> Hugging Face


def random_neo(folder, layers, shard_size="10GB", window=4, prefix=""):
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(vocab_size=300, max_position_embeddings=32, hidden_size=12, num_heads=3, num_layers=4,
                                       attention_types=[[layers, 4 // len(layers)]], window_size=window)
    model = transformers.GPTNeoForCausalLM(config).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)
    saved = model.transformer if prefix else model
    saved.save_pretrained(folder, max_shard_size=shard_size)
    return model


@pytest.mark.parametrize("form", ["one file", "sharded", "torch's", "without its head", "half"])
@pytest.mark.parametrize("layers", [["global"], ["global", "local"]], ids="-".join)
def test_a_random_gpt_neo_comes_back_as_it_was(layers, form, data, tmp_path, typed):
    folder = tmp_path / "neo"
    theirs = random_neo(folder, layers, "5KB" if form == "sharded" else "10GB", prefix=form == "without its head")
    files = [path.name for path in folder.iterdir() if path.suffix == ".safetensors"]
    assert (len(files) > 1) == (form == "sharded")
    if form == "torch's":  # with the buffers that earlier versions saved
        (folder / "model.safetensors").unlink()
        buffers = {f"transformer.h.0.attn.attention.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
        torch.save({**theirs.state_dict(), **buffers}, folder / "pytorch_model.bin")
    if form == "half":
        theirs.half().save_pretrained(folder)
        theirs.float()
    config, weights = hf.read_hf(folder)
    assert config == dict(vocab_size=300, block_size=32, n_layer=4, n_head=3, n_embd=12, window_size=4,
                          attention_layers=",".join(layers))
    typed("import", folder, tmp_path / "run", f"--data={data}")
    run = open_run(str(tmp_path / "run"))
    assert run.model.config == GPTNeoConfig(**config, ablation="none") and run.data_checksum == load_meta(data)["checksum"]
    idx = ids(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(run.model(idx), theirs(idx).logits, rtol=0, atol=1e-5)
    hf.export_run(run, tmp_path / "hub")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub").state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, again[name]) for name, value in theirs.state_dict().items())


def test_reading_needs_no_transformers(tmp_path, monkeypatch):
    random_neo(tmp_path / "neo", ["global"])
    for name in [name for name in sys.modules if name.split(".")[0] in ("transformers", "tokenizers")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert hf.read_hf(tmp_path / "neo")[0]["n_layer"] == 4


WRONG = [
    ({"model_type": "gpt2"}, "describes a model of type 'gpt2': only gpt_neo"), ({"layer_norm_epsilon": 1e-6}, "has layer_norm_epsilon=1e-06"),
    ({"activation_function": "relu"}, "has activation_function='relu': a model of ours has gelu"),
    ({"intermediate_size": 13}, "has intermediate_size=13: a model of ours has 48"), ({"hidden_size": "a"}, "has intermediate_size=None|no model"),
    ({"attention_types": 5}, "describes no model of ours"), ({"attention_types": [[["global"], 3]]}, "names the attention of 3 layers out of 4"),
    ({"attention_types": [[["sparse"], 4]]}, "attention_layers=sparse must be"), ({"num_heads": 5}, "not divisible by n_head=5"),
    ({"vocab_size": 301}, "lm_head.weight is 300 x 12, not 301 x 12"), ({"num_layers": 8, "attention_types": [[["global"], 8]]}, "h.4.attn.attention.k_proj.weight is absent")]


@pytest.mark.parametrize("changes, message", WRONG, ids=lambda value: str(value)[:40])
def test_other_models_are_refused_in_one_line(changes, message, tmp_path):
    random_neo(tmp_path / "neo", ["global"])
    path = tmp_path / "neo" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        hf.read_hf(tmp_path / "neo")


def test_a_head_of_its_own_is_refused(tmp_path):
    model = random_neo(tmp_path / "neo", ["global"])
    (tmp_path / "neo" / "model.safetensors").unlink()
    torch.save({**model.state_dict(), "lm_head.weight": torch.zeros(300, 12)}, tmp_path / "neo" / "pytorch_model.bin")
    with pytest.raises(UserError, match="has an lm_head of its own"):
        hf.read_hf(tmp_path / "neo")


def test_the_vocabulary_is_looked_at(data, tmp_path):
    """By the tokens where the folder has a tokenizer, else by their number."""
    folder = tmp_path / "neo"
    random_neo(folder, ["global"])
    hf.check_vocabulary(folder, data)
    meta = load_meta(data)
    vocabulary = hf.tokenizer_json(load_tokenizer(meta["tokenizer"]))
    for name, known in (("tokenizer.json", vocabulary), ("vocab.json", vocabulary["model"]["vocab"])):
        (folder / name).write_text(json.dumps(known))
        hf.check_vocabulary(folder, data)
        (folder / name).write_text(json.dumps(known).replace("word7", "other"))
        with pytest.raises(UserError, match="has a vocabulary of 300 tokens and .*data one of 300, which is another"):
            hf.check_vocabulary(folder, data)
        (folder / name).unlink()


def test_a_name_that_is_no_folder_is_looked_for_on_the_hub(monkeypatch, tmp_path):
    import huggingface_hub
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hf.find_folder("EleutherAI/gpt-neo-125m") == tmp_path and len(asked) == 2  # no safetensors there: then torch's
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="no folder some/name, and the Hugging Face hub does not give it either"):
        hf.find_folder("some/name")


# ---- autoencoders


def write_saes(run, activation, site="mlp_out", center=True):
    """A sae.pt beside a run, as interp/sae.py writes it. -> its SAEs"""
    model = open_run(str(run)).model
    d = hf.GPTNeoConfig(**load_checkpoint(run)["config"]).n_embd * (4 if site == "mlp_act" else 1)
    torch.manual_seed(3)
    rows = []
    for seed in (1, 2):
        autoencoder = sae.SAE(d, 24, activation, 3 if activation != "relu" else None)
        for p in autoencoder.parameters():
            torch.nn.init.normal_(p)
        value = {"l1": 0.5} if activation == "relu" else {"k": 3}
        weights = autoencoder.state_dict()
        if activation == "batchtopk":
            weights["threshold"] = torch.tensor(0.7)
        rows.append({"layer": 1, "site": site, "seed": seed, **value, "weights": weights})
    settings = {"activation": activation, "center": center}
    torch.save({"checkpoint": hf.fingerprint(model), "settings": settings, "saes": rows}, run / "sae.pt")
    return sae.load_saes(run / "sae.pt")


def by_hand(config, weights, x):
    """Features by the formulas of SAELens' three architectures."""
    f = (x @ weights["W_enc"] + weights["b_enc"])
    if config["architecture"] == "jumprelu":
        return f.relu() * (f > weights["threshold"])
    if config["architecture"] == "topk":
        kept = f.topk(config["k"]).indices
        return torch.zeros_like(f).scatter(-1, kept, f.gather(-1, kept).relu())
    return f.relu()


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
@pytest.mark.parametrize("site, hook", [("mlp_out", "hook_mlp_out"), ("mlp_act", "mlp.hook_post"), ("attn_act", "attn.hook_z")])
def test_exported_autoencoders_have_the_same_features(activation, site, hook, data, tmp_path, typed, capsys):
    import safetensors.torch
    from interp.activations import Site
    model = write_run(tmp_path / "run", data)
    ours = write_saes(tmp_path / "run", activation, site)
    typed("sae", tmp_path / "run", tmp_path / "saes")
    folders = capsys.readouterr().out.split()
    assert len(folders) == 2 and folders[0].endswith(f"blocks.1.{hook}_{'l1_0.5' if activation == 'relu' else 'k_3'}_seed1")
    raw = Site(model, 1, site, center=False).read(ids(2, 16)).flatten(0, 1)
    for autoencoder, folder in zip(ours, folders):
        config = json.loads(Path(folder, "cfg.json").read_text())
        weights = safetensors.torch.load_file(Path(folder, "sae_weights.safetensors"))
        seen = Site(model, 1, site, autoencoder.center).read(ids(2, 16)).flatten(0, 1)
        with torch.no_grad():
            torch.testing.assert_close(by_hand(config, weights, raw), autoencoder.encode(seen), rtol=0, atol=2e-5)
        assert config["metadata"]["hook_name"] == f"blocks.1.{hook}" and config["d_in"] == autoencoder.W_enc.shape[0]
        assert torch.equal(weights["W_dec"], autoencoder.W_dec) and torch.equal(weights["b_dec"], autoencoder.b_dec)


def test_what_fires_exactly_at_the_threshold_fires_there_too():
    row = {"layer": 0, "site": "mlp_act", "seed": 1, "k": 1, "weights": {
        "W_enc": torch.eye(2), "b_enc": torch.zeros(2), "W_dec": torch.eye(2), "b_dec": torch.zeros(2), "threshold": torch.tensor(0.7)}}
    _, config, weights = hf.saelens_sae(row, {"activation": "batchtopk", "center": True}, 8)
    x = torch.tensor([[0.7, torch.tensor(0.7).nextafter(torch.tensor(0.0))]])
    assert by_hand(config, weights, x).count_nonzero() == 1


# ---- the README


def test_the_readme_is_true_of_transformers(data, tmp_path, typed, monkeypatch):
    write_run(tmp_path / "out" / "local_k2", data, block_size=64)
    monkeypatch.chdir(tmp_path)
    typed("export", "out/local_k2", "local_k2_hf", "--no_figures")
    assert snippets("transformers")
    for block in snippets("transformers"):
        exec(compile(block, "README.md", "exec"), {})
