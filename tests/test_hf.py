"""interp/hf.py against transformers, tiktoken and formulas by hand; round trips to the last bit.

test_lens.py has TransformerLens, SAELens and AutoCircuit.
"""

import json
import random
import re

import pytest
import safetensors.torch
import torch
import transformers
from conftest import ROOT, V, contents, make_data, make_run, tiny_model
from test_prepare import HARD, TOKENIZERS

import eval
from interp import hf
from interp.activations import Site
from interp.results import digests
from prepare import load_tokenizer

LETTERS = [*map(chr, [*range(0x250), *range(0x2000, 0x2070), 0x3000, 0x1680, 0x1D7CE, 0x10FFFF])]


def snippets(library):
    """The python blocks of docs/elsewhere.md that import this library."""
    section = (ROOT / "docs" / "elsewhere.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return [block for block in blocks if re.search(rf"^(from|import) {library}\b", block, re.M)]


def ids(count, length):
    return torch.randint(0, V, (count, length), generator=torch.Generator().manual_seed(1))


def exported(tmp_path, **changes):
    """Write a run and its export, out/local_k2 and local_k2_hf. -> the model"""
    model = tiny_model(**changes)
    make_data(tmp_path / "data")
    run = make_run(tmp_path / "out" / "local_k2", tmp_path / "data", model)
    with hf.new_folder(tmp_path / "local_k2_hf") as folder:
        hf.export_run(eval.open_run(str(run)), folder)
    return model


def both(spec, folder):
    """A tokenizer of ours and, as transformers loads it, the exported one."""
    encoding = load_tokenizer(spec)
    hf.write_tokenizer(folder, encoding, 64)
    return encoding, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_the_same_for_any_text(name, tmp_path):
    rng, words = random.Random(0), {word for text in HARD for word in re.findall(r" ?\w{2,}", text)}
    ours, theirs = both({"name": name, "pieces": sorted(words)}, tmp_path)
    texts = [*HARD, "", " ", "\n", " \n ", "x  \n", "a\u0301", "a" * 3000, " " * 3000 + "b"]
    texts += ["".join(rng.choices(LETTERS, k=rng.randrange(1, 40))) for _ in range(500)]
    for text in texts:
        ordinary = ours.encode_ordinary(text)
        assert theirs.encode(text) == ours.encode(text, allowed_special="all")
        assert theirs.encode(text, split_special_tokens=True) == ordinary
        assert theirs.decode(ordinary) == text
    some = rng.choices(range(ours.n_vocab), k=3000)  # together not UTF-8
    assert theirs.decode(some) == ours.decode(some)
    assert theirs.eos_token_id == ours.eot_token and len(theirs) == ours.n_vocab


def test_merging_is_the_same_in_any_vocabulary(tmp_path):
    """A token may be made in several ways, from rarer tokens, or not at all."""
    rng = random.Random(0)
    for letters in ["ab", "aab", "abc"] * 15:
        words = {"".join(rng.choices(letters, k=rng.randrange(2, 7))) for _ in range(20)}
        pieces = rng.sample(sorted(words), rng.randrange(3, len(words)))
        ours, theirs = both({"name": "words", "pieces": pieces}, tmp_path)
        for _ in range(60):
            text = "".join(rng.choices(letters + " ", k=rng.randrange(1, 60)))
            assert theirs.encode(text) == ours.encode_ordinary(text)


def test_the_readme_and_the_card_are_true_of_transformers(tmp_path, monkeypatch):
    exported(tmp_path, block_size=64)
    monkeypatch.chdir(tmp_path)
    for block in snippets("transformers"):
        exec(compile(block, "elsewhere.md", "exec"), {})
    write = transformers.pipeline("text-generation", "local_k2_hf")
    texts, options = ["ab", "abba <b>, ab"], {"do_sample": False, "max_new_tokens": 9}
    assert write(texts, batch_size=2, **options) == [write(text, **options) for text in texts]
    batch = write.tokenizer(texts, padding=True, return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask"} and batch["attention_mask"][0, 0] == 0
    with pytest.raises(IndexError):
        write.model(torch.zeros(1, 65, dtype=torch.long))


GEOMETRIES = [
    {}, {"ablation": "global", "attn_unit": "head", "k_attn": 1}, {"ablation": "none"},
    {"n_head": 1, "n_layer": 1, "n_embd": 6}, {"attention_layers": "local", "window_size": 5},
    {"attention_layers": "global,local", "window_size": 3, "n_layer": 4},
    {"attention_layers": "local,global,global", "window_size": 1, "n_layer": 6},
    {"attention_layers": "local", "window_size": 99}, {"block_size": 1}]


@pytest.mark.parametrize("changes", GEOMETRIES, ids=str)
def test_transformers_computes_the_same_and_import_gives_the_same_bits(changes, tmp_path, typed):
    model = exported(tmp_path, **changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "local_k2_hf")
    idx = ids(3, model.config.block_size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx), rtol=0, atol=1e-5)
    assert typed(hf.main, "import", tmp_path / "local_k2_hf", tmp_path / "again")[0] is None
    before, after = (eval.open_run(str(tmp_path / path)) for path in ("out/local_k2", "again"))
    for name, weight in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], weight)
    assert after.model.config == model.config and after[2:6] == before[2:6]


def test_an_interrupted_export_leaves_nothing(run, tmp_path, typed, monkeypatch):
    monkeypatch.setattr(hf, "model_card", lambda *_: hf.os.kill(hf.os.getpid(), 15))
    assert typed(hf.main, "export", run, tmp_path / "hub")[0] == "stopped"
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out"}
    monkeypatch.undo()
    for again in ("hub", "undisturbed"):
        assert typed(hf.main, "export", run, tmp_path / again)[0] is None
    assert contents(tmp_path / "hub") == contents(tmp_path / "undisturbed")
    card = (tmp_path / "hub" / "README.md").read_text()
    row, = json.loads(typed(eval.main, run, "--json")[1])
    assert f"| ppl_clean | {row['ppl_clean']:.3f} ± {row['ppl_clean_se']:.3f} |" in card
    assert f"| l1 | {row['l1']:.4f} |" in card and "| k_mlp | 2 |" in card and "{" not in card
    assert "not allowed with" in typed(hf.main, "export", run, "x", "--no_figures", "--data=y")[0]


@pytest.mark.parametrize("file, end, message", [
    ("model.safetensors", b"\0", "weights have changed since they were exported"),
    ("training.json", b"", "training.json")])
def test_a_damaged_export_is_not_taken_for_the_run(file, end, message, tmp_path, typed):
    exported(tmp_path)
    path = tmp_path / "local_k2_hf" / file
    path.write_bytes(path.read_bytes()[:-1] + end)
    words = "import", path.parent, tmp_path / "again"
    said = typed(hf.main, *words)[0]
    assert said.startswith("error: ") and message in said and "\n" not in said
    assert typed(hf.main, *words, "--data", tmp_path / "data")[0] is None
    assert eval.open_run(str(tmp_path / "again")).model.config.ablation == "none"


@pytest.fixture
def neo(run, tmp_path):
    """A random GPT-Neo of transformers, in the folder neo with the tokenizer of the data."""
    torch.manual_seed(0)
    model = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(
        vocab_size=V, max_position_embeddings=32, hidden_size=12, num_heads=3, num_layers=4,
        attention_types=[[["global", "local"], 2]], window_size=4)).eval()
    model.save_pretrained(tmp_path / "neo")
    hf.write_tokenizer(tmp_path / "neo", load_tokenizer(eval.open_run(str(run)).tokenizer), 32)
    return model


@pytest.mark.parametrize("form", ["sharded", "torch's", "without its head"])
def test_a_gpt_neo_comes_back_as_it_was(form, neo, tmp_path, typed):
    folder, words = tmp_path / "neo", ["import", tmp_path / "neo", tmp_path / "again"]
    (folder / "model.safetensors").unlink()
    if form == "sharded":
        neo.save_pretrained(folder, max_shard_size="5KB")
    if form == "torch's":  # with a buffer that earlier versions saved
        mask = {"transformer.h.0.attn.attention.bias": torch.ones(1, dtype=torch.bool)}
        torch.save(neo.state_dict() | mask, folder / "pytorch_model.bin")
    if form == "without its head":
        neo.transformer.save_pretrained(folder)
    assert "no training.json" in typed(hf.main, *words)[0]
    assert typed(hf.main, *words, "--data", tmp_path / "data")[0] is None
    again = eval.with_data(eval.open_run(str(tmp_path / "again"))).model
    with torch.no_grad():
        torch.testing.assert_close(again(ids(2, 32)), neo(ids(2, 32)).logits, rtol=0, atol=1e-5)
    assert all(map(torch.equal, again.state_dict().values(), neo.state_dict().values()))


BIAS, ONES = "transformer.ln_f.bias", torch.ones(12)
WEIGHTS = [{BIAS: ONES / 0}, {BIAS: ONES.char()}, {"lm_head.weight": torch.zeros(V, 12)}]
DAMAGE = [(weights, "config.json", b"", b"") for weights in WEIGHTS]
DAMAGE += [({}, "pytorch_model.bin", b"\0\0\x80?" * 12, b"\0\0\x81?" * 12),  # 1.0
           ({}, "config.json", b'"hidden_size": 12', b'"hidden_size": null'),
           ({}, "tokenizer.json", b"<b>", b"<c>"),
           ({}, "tokenizer.json", b'"add_prefix_space": false', b'"add_prefix_space": true')]


@pytest.mark.parametrize("weights, file, before, after", DAMAGE, ids=lambda value: str(value)[:30])
def test_damage_is_refused(weights, file, before, after, neo, tmp_path, typed):
    folder = tmp_path / "neo"
    (folder / "model.safetensors").unlink()
    torch.save({**neo.state_dict(), BIAS: ONES, **weights}, folder / "pytorch_model.bin")
    (folder / file).write_bytes((folder / file).read_bytes().replace(before, after))
    message = typed(hf.main, "import", folder, tmp_path / "again", "--data", tmp_path / "data")[0]
    assert message.startswith("error: ") and "\n" not in message


def write_saes(run, **changes):
    """A sae.pt beside a run, as interp/sae.py writes it. -> its rows"""
    model, row = eval.open_run(str(run)).model, {"layer": 1, "site": "mlp_out", "seed": 1}
    d, F = Site(model, 1, changes.get("site", "mlp_out")).d, 24
    shapes = {"W_enc": (d, F), "b_enc": (F,), "W_dec": (F, d), "b_dec": (d,)}
    row["weights"] = {name: torch.randn(shape) for name, shape in shapes.items()}
    rows = [{**row, "l1": l1, **changes} for l1 in (5.000000001, 5.0)]  # %g shows both as 5
    key = {"settings": {"center": True}, **digests(model.state_dict())}
    torch.save({**key, "saes": rows}, run / "sae.pt")
    return rows


def features(row, model, idx, center):
    """By the formula of interp/sae.py: idx (B, T) -> (B, T, F)"""
    x = Site(model, row["layer"], row["site"], center).read(idx)  # (B, T, d)
    return (x @ row["weights"]["W_enc"] + row["weights"]["b_enc"]).relu()


@pytest.mark.parametrize("site", hf.HOOKS)
def test_exported_autoencoders_have_the_same_features(site, run, tmp_path, typed):
    rows = write_saes(run, site=site)
    assert typed(hf.main, "sae", run, tmp_path / "saes")[0] is None
    model, hook = eval.open_run(str(run)).model, hf.HOOKS[site].format(1)
    for row, l1 in zip(rows, ("5.000000001", "5")):
        folder = tmp_path / "saes" / f"{hook}_l1_{l1}_seed1"
        weights = safetensors.torch.load_file(folder / "sae_weights.safetensors")
        theirs = features({**row, "weights": weights}, model, ids(2, 8), center=False)
        ours = features(row, model, ids(2, 8), center=True)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)
        assert all(torch.equal(weights[name], row["weights"][name]) for name in ("W_dec", "b_dec"))


def test_an_edited_sae_is_refused(run, tmp_path, typed):
    other, nan = {"W_enc": torch.ones(7, 24)}, {"W_enc": torch.full((8, 24), torch.nan)}
    for changes in {"layer": 3}, {"weights": other}, {"weights": nan}:
        write_saes(run, **changes)
        assert typed(hf.main, "sae", run, tmp_path / "saes")[0].startswith("error: ")
