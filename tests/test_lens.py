"""Exports in TransformerLens, SAELens, AutoCircuit, which the paper used, and old transformers.

    make test-lens        makes environments for them and runs this file; elsewhere it is skipped
"""

import json
import os
import subprocess
import sys
import types
from importlib.metadata import distributions
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may need the hub
os.environ["WANDB_MODE"] = "disabled"

import pytest
import torch
from conftest import ROOT
from test_hf import GEOMETRIES, exported, features, ids, snippets, write_saes

from eval import open_run
from interp import circuits, hf
from interp.activations import Site
from interp.graph import Circuit, PatchedModel
from prepare import load_tokenizer

INSTALLED = {package.name for package in distributions()}
OLD = ROOT / ".venv-old" / "bin" / "python"  # with tests/requirements-old.txt
READ = """
import json, sys, torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
text = sys.argv[2]
batch = tokenizer([text, text[:9]], padding=True, return_tensors="pt")
logits = model(**tokenizer(text, return_tensors="pt")).logits.double().tolist()
print(json.dumps([transformers.__version__, [*batch], batch["input_ids"].tolist(), logits]))
"""


def needs(name):
    reason = f"{name} is not installed here: make test-lens"
    return pytest.mark.skipif(name not in INSTALLED, reason=reason)


def bridge(folder):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(folder), device="cpu")


@pytest.mark.skipif(not OLD.exists(), reason="there is no .venv-old here: make test-lens")
def test_old_transformers_reads_the_same(tmp_path):
    ours, text = exported(tmp_path, block_size=64), "ab <b>\u00e9 <|endoftext|>\n\n ab"
    words = [OLD, "-c", READ, tmp_path / "local_k2_hf", text]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    number, names, (tokens, padded), logits = json.loads(printed)
    tokenizer = load_tokenizer(open_run(str(tmp_path / "out" / "local_k2")).tokenizer)
    start = tokenizer.encode(text[:9])
    assert number == "4.44.2" and names == ["input_ids", "attention_mask"]
    assert tokens == tokenizer.encode(text, allowed_special="all")
    assert padded == [tokenizer.eot_token] * (len(tokens) - len(start)) + start
    with torch.no_grad():
        want = ours(torch.tensor([tokens])).double()
    torch.testing.assert_close(torch.tensor(logits).double(), want, rtol=0, atol=1e-5)


@needs("transformer-lens")
@pytest.mark.parametrize("changes", GEOMETRIES, ids=str)
def test_transformerlens_computes_the_same(changes, tmp_path):
    ours = exported(tmp_path, **changes)
    idx = ids(3, ours.config.block_size)
    theirs = bridge(tmp_path / "local_k2_hf")
    with torch.no_grad():
        want, (got, cache) = ours(idx), theirs.run_with_cache(idx)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        for site, hook in hf.HOOKS.items():
            seen = Site(ours, 0, site, center=False).read(idx)
            found = cache[hook.format(0)].reshape(seen.shape)
            torch.testing.assert_close(found, seen, rtol=0, atol=1e-5)
        theirs.enable_compatibility_mode()  # shifts all logits of a token alike
        got = theirs(idx).log_softmax(-1)
        torch.testing.assert_close(got, want.log_softmax(-1), rtol=0, atol=1e-5)


@needs("transformer-lens")
def test_the_readme_is_true_of_transformerlens(tmp_path, monkeypatch):
    exported(tmp_path, block_size=64)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippets("transformer_lens")[0], "elsewhere.md", "exec"), {})


@needs("sae-lens")
@pytest.mark.parametrize("site", hf.HOOKS)
def test_autoencoders_have_the_same_features_in_saelens(site, tmp_path):
    from sae_lens import SAE

    ours, run = exported(tmp_path), tmp_path / "out" / "local_k2"
    row, _ = write_saes(run, site=site)
    hf.export_saes(open_run(str(run)), tmp_path)
    name = hf.HOOKS[site].format(1) + "_l1_5_seed1"
    theirs, idx = SAE.load_from_disk(tmp_path / name), ids(3, 8)
    _, cache = bridge(tmp_path / "local_k2_hf").run_with_cache(idx)
    want = features(row, ours, idx, center=True).flatten(0, 1)  # (n, F)
    decoded = want @ row["weights"]["W_dec"] + row["weights"]["b_dec"]  # (n, d)
    with torch.no_grad():
        got = theirs.encode(cache[theirs.cfg.metadata.hook_name])
        torch.testing.assert_close(got.flatten(0, 1), want, rtol=0, atol=2e-5)
        back = theirs.decode(got).reshape(decoded.shape)
        torch.testing.assert_close(back, decoded, rtol=0, atol=1e-4)


@needs("sae-lens")
def test_the_readme_is_true_of_saelens(tmp_path, monkeypatch):
    exported(tmp_path, block_size=256, n_embd=128)
    run = tmp_path / "out" / "local_k2"
    write_saes(run, layer=0)
    (tmp_path / "local_k2_saes").mkdir()
    hf.export_saes(open_run(str(run)), tmp_path / "local_k2_saes")
    (tmp_path / "stories.txt").write_text("abc the <b> end, ab ab\na cab is bad\n" * 2000)
    monkeypatch.chdir(tmp_path)
    encode, train = snippets("sae_lens")
    found = {}
    exec(compile(encode, "elsewhere.md", "exec"), found)
    assert found["features"].shape[-1] == 24
    exec(compile(train, "elsewhere.md", "exec"), found)
    assert found["sae"].W_dec.shape == (2048, 128)
    assert (tmp_path / "local_k2_trained" / "sae_weights.safetensors").exists()


def patchable(folder):
    """An exported folder as a model of AutoCircuit, in float64."""
    import transformer_lens
    import transformers
    from transformer_lens import HookedTransformer, loading_from_pretrained
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
    from transformer_lens.pretrained.weight_conversions import convert_neo_weights

    # where TransformerLens 2 had it
    moved = types.ModuleType("transformer_lens.past_key_value_caching")
    moved.HookedTransformerKeyValueCache = TransformerLensKeyValueCache
    transformer_lens.HookedTransformerKeyValueCache = TransformerLensKeyValueCache
    sys.modules[moved.__name__] = moved
    from auto_circuit.utils.graph_utils import patchable_model

    config = loading_from_pretrained.get_pretrained_model_config(
        str(folder), device="cpu", dtype=torch.float32)
    model = HookedTransformer(config, transformers.AutoTokenizer.from_pretrained(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.load_and_process_state_dict(
        convert_neo_weights(theirs, config), fold_ln=False, center_writing_weights=False,
        center_unembed=False, fold_value_biases=False)
    model.cfg.dtype = torch.float64
    model.to(torch.float64)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    return patchable_model(model, factorized=True, slice_output="last_seq", separate_qkv=True,
                           device=torch.device("cpu"))


@pytest.fixture
def models(tmp_path):
    """An exported model as a PatchedModel and as AutoCircuit's, and its prompts as a batch."""
    ours = exported(tmp_path, n_layer=2, n_head=3, n_embd=12, block_size=16, window_size=4,
                    attention_layers="global,local")
    clean, corrupt, lengths = ids(4, 9), ids(4, 9).flip(0), torch.full((4,), 9)
    model = PatchedModel(ours.clean_state_dict(), 3, ours.config.windows, clean, corrupt, lengths,
                         torch.float64)
    batch = SimpleNamespace(key=0, clean=clean, corrupt=corrupt, answers=clean[:, :1],
                            wrong_answers=corrupt[:, 1:2])
    return model, patchable(tmp_path / "local_k2_hf"), batch


@needs("auto-circuit")
@pytest.mark.parametrize("tau", [0.001, 0.003])
def test_the_papers_library_finds_the_circuit_that_acdc_finds(tau, models):
    from auto_circuit.prune_algos.ACDC import acdc_prune_scores

    model, theirs, batch = models
    edges = circuits.sweep_order(model.graph)
    state = circuits.discover(Circuit(model), edges, tau)
    names = [model.graph.edge_name(edge) for edge in edges]
    kept = [name for name, (put_back, _) in zip(names, state["decided"]) if put_back]
    assert state["margin"] > 1e-9 and 0 < len(kept) < len(edges)
    library = {edge.name: edge for edge in theirs.edges}
    assert library.keys() == set(names)
    theirs.edges = [library[name] for name in names]  # else a set, in the order of a hash seed
    scores = acdc_prune_scores(theirs, [batch], None, tao_exps=[0], tao_bases=[tau])
    found = [name for name in names if library[name].prune_score(scores) == torch.inf]
    assert found == kept


@needs("auto-circuit")
def test_the_papers_library_finds_the_scores_of_edge_attribution(models):
    """It has no path between embeddings: compared at the clean prompt, its end."""
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores

    model, theirs, batch = models
    scores = mask_gradient_prune_scores(theirs, [batch], None, "logit", "avg_diff", mask_val=0.0)
    library = {edge.name: -edge.prune_score(scores).item() for edge in theirs.edges}  # of a loss
    lengths = torch.full((4,), 9)
    tokens = circuits.Tokens(batch.clean, batch.corrupt, lengths, batch.answers[:, 0],
                             batch.wrong_answers[:, 0])
    found = circuits.attribute(model, tokens, path=[1.0])["edges"]
    found = {model.graph.edge_name(edge): score for edge, score in found.items()}
    assert max(map(abs, found.values())) > 1e-3
    assert found == pytest.approx(library, rel=1e-5, abs=1e-8)
