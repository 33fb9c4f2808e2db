"""An exported model in TransformerLens, SAELens and AutoCircuit, the library that the paper found its circuits with.

    make test-lens        makes .venv-lens and .venv-saelens, and runs this file in both

Elsewhere all of it is skipped.
"""

import os
import sys
import types
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may need the hub
os.environ["WANDB_MODE"] = "disabled"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "interp")]
import acdc
from eval import open_run
from interp import hf
from interp.activations import Site
from test_hf import GEOMETRIES, data, ids, snippets, write_run, write_saes  # noqa: F401


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


LENS, SAELENS, CIRCUITS = map(installed, ("transformer-lens", "sae-lens", "auto-circuit"))
lens = pytest.mark.skipif(not LENS, reason="TransformerLens is not installed here: make test-lens")
saelens = pytest.mark.skipif(not SAELENS, reason="SAELens is not installed here: make test-lens")
circuits = pytest.mark.skipif(not CIRCUITS, reason="AutoCircuit is not installed here: make test-lens")


def exported(tmp_path, data, **changes):
    model = write_run(tmp_path / "out" / "local_k2", data, **changes)
    hf.export_run(open_run(str(tmp_path / "out" / "local_k2")), tmp_path / "local_k2_hf")
    return model


def bridge(folder):
    from transformer_lens.model_bridge import TransformerBridge
    return TransformerBridge.boot_transformers(str(folder), device="cpu")


# ---- TransformerLens


@lens
@pytest.mark.parametrize("changes", GEOMETRIES, ids=str)
def test_transformerlens_computes_the_same(changes, data, tmp_path):
    ours = exported(tmp_path, data, **changes)
    idx = ids(3, ours.config.block_size)
    theirs = bridge(tmp_path / "local_k2_hf")
    with torch.no_grad():
        want = ours(idx)
        print(f"TransformerLens {LENS}: {(theirs(idx) - want).abs().max():.1e}")
        torch.testing.assert_close(theirs(idx), want, rtol=0, atol=1e-5)
        theirs.enable_compatibility_mode()  # its weight processing shifts all logits of a token alike
        torch.testing.assert_close(theirs(idx).log_softmax(-1), want.log_softmax(-1), rtol=0, atol=1e-5)


@lens
def test_its_cache_holds_our_activations(data, tmp_path):
    ours = exported(tmp_path, data)
    idx = ids(3, 16)
    _, cache = bridge(tmp_path / "local_k2_hf").run_with_cache(idx)
    for site, hook in hf.HOOKS.items():
        seen = Site(ours, 1, site, center=False).read(idx)
        torch.testing.assert_close(cache[hook.format(1)].reshape(seen.shape), seen, rtol=0, atol=1e-5)


@lens
def test_the_readme_is_true_of_transformerlens(data, tmp_path, monkeypatch):
    exported(tmp_path, data)
    monkeypatch.chdir(tmp_path)
    first, *_ = snippets("transformer_lens")
    exec(compile(first, "README.md", "exec"), {})


# ---- SAELens


@saelens
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
@pytest.mark.parametrize("site", list(hf.HOOKS))
def test_autoencoders_have_the_same_features_in_saelens(activation, site, data, tmp_path):
    from sae_lens import SAE
    ours = exported(tmp_path, data)
    run = tmp_path / "out" / "local_k2"
    autoencoder, _ = write_saes(run, activation, site)
    name, _ = hf.export_saes(open_run(str(run)), tmp_path / "saes")
    theirs, idx = SAE.load_from_disk(tmp_path / "saes" / name), ids(3, 16)
    _, cache = bridge(tmp_path / "local_k2_hf").run_with_cache(idx)
    x = Site(ours, 1, site, autoencoder.center).read(idx)
    with torch.no_grad():
        got = theirs.encode(cache[theirs.cfg.metadata.hook_name])
        want = autoencoder.encode(x.flatten(0, 1))
        print(f"SAELens {SAELENS}: {(got.flatten(0, 1) - want).abs().max():.1e}")
        torch.testing.assert_close(got.flatten(0, 1), want, rtol=0, atol=2e-5)
        torch.testing.assert_close(theirs.decode(got).reshape(want.shape[0], -1), autoencoder.decode(want), rtol=0, atol=5e-5)


@saelens
def test_the_readme_is_true_of_saelens(data, tmp_path, monkeypatch):
    exported(tmp_path, data, block_size=256, n_embd=128)
    run = tmp_path / "out" / "local_k2"
    write_saes(run, "relu")
    name, _ = hf.export_saes(open_run(str(run)), tmp_path / "local_k2_saes")
    (tmp_path / "local_k2_saes" / name).rename(tmp_path / "local_k2_saes" / "blocks.0.hook_mlp_out_l1_5_seed1")
    (tmp_path / "stories.txt").write_text("".join(f"word{i % 43} word{i % 7} the end word{i % 5}\n" * 5 for i in range(200)))
    monkeypatch.chdir(tmp_path)
    encode, train = snippets("sae_lens")
    found = {}
    exec(compile(encode, "README.md", "exec"), found)
    assert found["features"].shape[-1] == 24
    exec(compile(train, "README.md", "exec"), found)
    assert found["sae"].W_dec.shape == (2048, 128) and (tmp_path / "local_k2_trained" / "sae_weights.safetensors").exists()


# ---- the circuit


def hooked(folder):
    """TransformerLens' HookedTransformer of an exported folder, in float64, with the hooks that AutoCircuit needs."""
    import transformers
    from transformer_lens import HookedTransformer, loading_from_pretrained
    from transformer_lens.pretrained.weight_conversions import convert_neo_weights
    config = loading_from_pretrained.get_pretrained_model_config(str(folder), device="cpu", dtype=torch.float32)
    model = HookedTransformer(config, transformers.AutoTokenizer.from_pretrained(folder))
    weights = convert_neo_weights(transformers.AutoModelForCausalLM.from_pretrained(folder), config)
    unprocessed = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    model.load_and_process_state_dict(weights, **unprocessed)
    model.cfg.dtype = torch.float64
    model.to(torch.float64)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    return model


def circuit_of_the_library(folder, clean, corrupt, names, tau):
    """The edges that AutoCircuit's ACDC keeps when it asks for them in this order, by name."""
    import transformer_lens
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
    moved = types.ModuleType("transformer_lens.past_key_value_caching")  # where TransformerLens 2 had it
    moved.HookedTransformerKeyValueCache = TransformerLensKeyValueCache
    transformer_lens.HookedTransformerKeyValueCache = TransformerLensKeyValueCache
    sys.modules[moved.__name__] = moved
    from auto_circuit.prune_algos.ACDC import acdc_prune_scores
    from auto_circuit.utils.graph_utils import patchable_model
    model = patchable_model(hooked(folder), factorized=True, slice_output="last_seq", separate_qkv=True,
                            device=torch.device("cpu"))
    edges = {edge.name: edge for edge in model.edges}
    assert edges.keys() == set(names)
    model.edges = [edges[name] for name in names]  # else a set of strings, whose order hangs on a hash seed
    scores = acdc_prune_scores(model, [SimpleNamespace(clean=clean, corrupt=corrupt)], None, tao_exps=[0],
                               tao_bases=[tau])
    return [name for name in names if edges[name].prune_score(scores) == torch.inf]


@circuits
@pytest.mark.parametrize("tau", [0.001, 0.003])
def test_the_papers_library_finds_the_circuit_that_acdc_finds(tau, data, tmp_path):
    ours = exported(tmp_path, data, noise=0.4, n_head=3, n_embd=12, attention_layers="global,local", window_size=4)
    clean, corrupt = ids(4, 9), ids(4, 9).flip(0)
    config, lengths = ours.config, torch.full((4,), 9)
    model = acdc.PatchedModel(ours.clean_state_dict(), config.n_head, config.windows, clean, corrupt, lengths, torch.float64)
    edges = acdc.sweep_order(model.graph)
    state = acdc.discover(acdc.Circuit(model), edges, tau)
    names = [model.graph.edge_name(edge) for edge in edges]
    kept = [name for name, (put_back, _) in zip(names, state["decided"]) if put_back]
    assert state["margin"] > 1e-9 and 0 < len(kept) < len(edges)
    assert circuit_of_the_library(tmp_path / "local_k2_hf", clean, corrupt, names, tau) == kept
    print(f"AutoCircuit {CIRCUITS} and acdc.py, tau {tau}: the same {len(kept)} of {len(edges)} edges")
