"""interp/sae.py: against the paper's own library, a planted dictionary, definitions by hand; stops, resumes and mistakes.

    python -m pytest tests/test_sae.py

Where ../shared/oracles/interp exists, ten training steps and the CE scores are compared with what SAELens 5.1.0 and
TransformerLens computed.
"""

import hashlib
import json
import math
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "interp")]
import config as knobs
import sae
from interp.activations import Snippet, Stopped, Text
from model import GPTNeo, GPTNeoConfig, load_checkpoint, save_checkpoint

ORACLES = sorted(ROOT.parent.glob("shared/oracles/interp"))
EOT, V, T = 258, 259, 8
KINDS = [("relu", "saelens5"), ("relu", "saelens6"), ("topk", "saelens5"), ("batchtopk", "saelens5")]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny(ablation="local", **changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, block_size=T, n_layer=3, n_head=2, n_embd=8, ablation=ablation)
    model = GPTNeo(GPTNeoConfig(**{**sizes, **changes}))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.3)
    return model


def tokens(count, seed=0):
    """Stories of letters, the frequent ones first, each with its end-of-text."""
    rng = np.random.default_rng(seed)
    letters = rng.zipf(1.5, count).clip(1, 26) + 96
    letters[rng.random(count) < 0.1] = EOT
    return letters.astype("<u2")


@pytest.fixture
def run(tmp_path):
    """A run folder and its data as train.py and prepare.py leave them: 65 training windows, 12 held-out ones."""
    data, out = tmp_path / "data", tmp_path / "out" / "tiny"
    data.mkdir()
    out.mkdir(parents=True)
    meta = {"tokenizer": {"name": "words", "pieces": ["ab", "<b>"]}, "vocab_size": V, "eot": EOT, "checksum": "abc", "source": {}}
    for seed, (name, count) in enumerate({"train": 525, "val": 100}.items()):
        split = tokens(count, seed)
        split.tofile(data / f"{name}.bin")
        meta[name] = {"tokens": count, "stories": int((split == EOT).sum()), "bytes": count,
                      "sha256": hashlib.sha256(split.tobytes()).hexdigest()}
    (data / "meta.json").write_text(json.dumps(meta))
    save_checkpoint(out / "best.pt", tiny().config, tiny().state_dict(), step=7, tokenizer=meta["tokenizer"], data="abc",
                    train_config={"data": str(data), "seed": 5})
    return out


def kept(checkpoint):
    """What save_checkpoint wants beside config and weights."""
    return {key: checkpoint[key] for key in ("step", "tokenizer", "data", "train_config")}


QUICK = ("--device=cpu", "--steps=40", "--batch_size=32", "--lr=0.003", "--expansion=4")


@pytest.fixture
def call(monkeypatch, capsys):
    """sae.py with these words, without the seconds that a new Python takes -> its exit message, what it printed.

    call.stop.requested = True is a Ctrl-C.
    """
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["sae.py", *map(str, words)])
        call.stop, message = SimpleNamespace(requested=False), None
        try:
            knobs.cli(sae.main)
        except SystemExit as stop:
            message = stop.code
        return message, capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(knobs, "StopRequest", lambda: call.stop)  # pytest keeps its own Ctrl-C
        yield call


def settings(**changes):
    return dict(activation="relu", recipe="saelens5", l1=[0.5], k=None, expansion=4, steps=30, batch_size=32, lr=0.01,
                tokens=None, buffer=10**6) | changes


# ---- the autoencoder


@pytest.mark.parametrize("oracles", ORACLES, ids=lambda folder: folder.name)
def test_ten_steps_are_those_of_saelens_5(oracles):
    """Its code in float64: the scale, losses, gradient norms, weights after 1, 5 and 10 steps, the folded weights."""
    log, z = json.loads((oracles / "sae_v51.json").read_text()), np.load(oracles / "sae_v51.npz")
    worst = 0
    x = torch.from_numpy(z["x"])  # (15, 32, 16): for the scale, for training, held out
    scale = log["scaling_factor"]
    assert math.sqrt(16) / x[:3].norm(dim=-1).mean().item() == pytest.approx(scale, abs=1e-12)
    one = sae.SAE(16, 64).double()
    one.load_state_dict({name: torch.from_numpy(z[f"init_{name}"]) for name in one.state_dict()})
    optimizer = sae.make_adam(one, "saelens5")
    for step, row in enumerate(log["steps_log"]):
        error, penalty, f = sae.train_step(one, optimizer, x[3 + step] * scale, row["lr"], row["l1_coefficient"], "saelens5")
        assert (error.item(), penalty.item()) == pytest.approx((row["mse_loss"], row["l1_loss"]), abs=1e-9)
        assert (f > 0).sum().item() / 32 == row["l0"]
        assert one.W_dec.norm(dim=1).mean().item() == pytest.approx(row["W_dec_row_norm_mean_after"], abs=1e-9)
        for name, p in one.named_parameters():
            if step + 1 in (1, 5, 10):
                clipped = torch.from_numpy(z[f"grad{step + 1}_{name}"]) / max(1, row["grad_norm_before_clip"] + 1e-6)
                for ours, theirs in ((p, torch.from_numpy(z[f"after{step + 1}_{name}"])), (p.grad, clipped)):
                    worst = max(worst, (ours - theirs).abs().max().item())
    held_out = x[13:].flatten(0, 1)
    assert worst < 1e-9
    print(f"ten steps: gradients and weights within {worst:.0e} of SAELens 5.1.0's")
    assert (one(held_out * scale) / scale - torch.from_numpy(z["eval_unfolded_xhat"])).abs().max() < 1e-9
    one.fold(scale)
    for name, p in one.named_parameters():
        assert (p - torch.from_numpy(z[f"folded_{name}"])).abs().max() < 1e-9
    assert (one.encode(held_out) > 0).sum().item() / 64 == log["eval_folded"]["l0"]


def test_the_schedules_and_defaults_are_table_5():
    args = sae.parse_arguments(["out/x"])
    assert (args.steps, args.batch_size, args.lr, args.l1, args.expansion, args.buffer) == (100_000, 4096, 1e-5, [5.0], 16, 262_144)
    assert (args.recipe, args.activation, args.site, args.raw, args.tokens) == ("saelens5", "relu", ["mlp_out"], False, None)
    small = sae.parse_arguments(["out/x", "--small", "--lr=1e-3"])
    assert (small.steps, small.batch_size, small.lr, small.tokens) == (4000, 1024, 1e-3, 1_000_000)
    for t in (0, 1, 2500, 5000, 79_999, 80_000, 80_001, 90_000, 99_999):
        assert sae.l1_at(t, 100_000, 5) == pytest.approx(5 * min(t, 5000) / 5000)
        assert sae.lr_at(t, 100_000, 1e-5) == pytest.approx(1e-5 * min(1, (100_000 - t) / 20_000))
    assert sae.lr_at(0, 1, 0.1) == 0.1 and sae.l1_at(0, 1, 5) == 0  # no division by 0


def test_the_recipes():
    """Initial norms; the penalty and its gradient of saelens6 against autograd of the formula; betas."""
    five, six = (sae.SAE(16, 64).initialise(recipe, 3) for recipe in ("saelens5", "saelens6"))
    assert torch.allclose(five.W_dec.norm(dim=1), torch.ones(64)) and not five.b_enc.any() and not five.b_dec.any()
    assert five.W_enc.norm(dim=0).mean().item() == pytest.approx(math.sqrt(2), rel=0.05)  # kaiming's, not made 1
    assert torch.allclose(torch.nn.functional.normalize(five.W_enc.T, dim=1), five.W_dec, atol=1e-6)
    assert torch.allclose(six.W_dec.norm(dim=1), torch.full((64,), 0.1)) and torch.equal(six.W_enc, six.W_dec.T)
    assert not torch.equal(sae.SAE(16, 64).initialise("saelens5", 4).W_dec, five.W_dec)
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    before = {name: p.detach().clone().requires_grad_() for name, p in six.named_parameters()}
    optimizer = sae.make_adam(six, "saelens6")
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    error, penalty, _ = sae.train_step(six, optimizer, x, 1e-3, 0.3, "saelens6")
    f = torch.relu(x @ before["W_enc"] + before["b_enc"])
    loss = ((f @ before["W_dec"] + before["b_dec"] - x) ** 2).sum(1).mean()
    weighted = 0.3 * (f * before["W_dec"].norm(dim=1)).sum(1).mean()
    (loss + weighted).backward()
    assert (error.item(), penalty.item()) == pytest.approx((loss.item(), weighted.item()), rel=1e-5)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in before.values()))
    for name, p in six.named_parameters():
        assert torch.allclose(p.grad, before[name].grad / max(1, norm), atol=1e-6)


def test_k_features_are_kept():
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    relu, top, batch = (sae.SAE(16, 64, kind, 3).initialise("saelens5", 0) for kind in ("relu", "topk", "batchtopk"))
    whole, f = relu.encode(x), top.encode(x)
    assert ((f > 0).sum(1) == 3).all() and torch.equal(f[f > 0], whole[f > 0])
    assert torch.equal(f.topk(3).values, whole.topk(3).values)
    f = batch.encode(x)  # training: 3 a token on average, the largest of the batch
    assert (f > 0).sum() == 150 and f[f > 0].min() > whole[(whole > 0) & (f == 0)].max()
    assert batch.threshold == f[f > 0].min()
    one = batch.eval().encode(x[:1])  # evaluation: a bar, so a token does not depend on the others
    assert torch.allclose(one, f[:1])


@pytest.mark.parametrize("activation, recipe", KINDS)
def test_a_planted_dictionary_is_recovered(activation, recipe):
    """24 directions in 20 dimensions, one at a time on average: the decoder finds them, and little else stays on."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(24, 20, generator=generator), dim=1)
    one, steps = sae.SAE(20, 48, activation, {"topk": 2, "batchtopk": 1}.get(activation)).initialise(recipe, 0), 700
    optimizer = sae.make_adam(one, recipe)
    l1 = 1.0 if activation == "relu" else 0.0
    for step in range(steps):
        on = torch.rand(256, 24, generator=generator) < 1 / 24
        x = (on * (1 + torch.rand(256, 24, generator=generator))) @ planted * 2.5  # (256, 20)
        sae.train_step(one, optimizer, x, sae.lr_at(step, steps, 1e-2), sae.l1_at(step, steps, l1), recipe)
    match = (planted @ torch.nn.functional.normalize(one.W_dec, dim=1).T).amax(1)  # (24), cosines
    assert (match > 0.95).sum() >= 22, match
    assert (one.eval().encode(x) > 0).sum(1).float().mean() < 2.5


@pytest.mark.parametrize("activation, recipe", KINDS)
def test_folding_changes_no_output(activation, recipe):
    one, x, s = sae.SAE(16, 64, activation, 3).initialise(recipe, 0).double(), torch.randn(40, 16).double(), 0.37
    for p in one.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)
    one.encode(s * torch.randn(40, 16).double())  # batchtopk's bar: of other rows, or one of these would lie on it
    one.eval()
    f, x_hat = one.encode(s * x), one(s * x) / s
    one.fold(s)
    assert torch.allclose(one.encode(x), f, atol=1e-12) and torch.allclose(one(x), x_hat, atol=1e-12)


@pytest.mark.parametrize("activation, recipe", KINDS)
def test_everything_stays_finite(activation, recipe):
    """Features that never fire, a decoder row of 0, activations that are all the same or 0, batches without a row."""
    one = sae.SAE(8, 32, activation, 3).initialise(recipe, 0)
    one.b_enc.data[:16] = -1e9
    if recipe == "saelens5":
        one.W_dec.data[3] = 0
    optimizer = sae.make_adam(one, recipe)
    for x in (torch.ones(20, 8), torch.zeros(20, 8), torch.empty(0, 8), torch.full((1, 8), 1e4), torch.randn(20, 8)) * 3:
        for value in sae.train_step(one, optimizer, x, 0.01, 5.0, recipe):
            assert value.isfinite().all()
    assert all(p.isfinite().all() for p in one.parameters())
    assert one.fold(0.5).eval()(torch.empty(0, 8)).shape == (0, 8)
    model = tiny()
    model.transformer["h"][1].mlp.c_proj.weight.data.zero_()  # a place that is always the same: nothing to explain
    model.transformer["h"][1].mlp.c_proj.bias.data.zero_()
    (row,) = sae.score_saes(sae.Site(model, 1, "mlp_out"), [one], torch.from_numpy(tokens(40).astype(np.int64)).view(5, T))
    assert row["ce_score"] is None and row["explained_variance"] is None and "nan" not in json.dumps(row).lower()
    assert sae.Batches(sae.Site(model, 1, "mlp_out"), tokens(200), settings(), 0).at(0).isfinite().all()
    model.double().transformer["h"][1].mlp.c_proj.bias.data.copy_(torch.arange(1, 9).double() / 7)  # the same, but not 0
    site, idx = sae.Site(model, 1, "mlp_out", center=False), torch.from_numpy(tokens(800).astype(np.int64)).view(100, T)
    (row,) = sae.score_saes(site, [one.double()], idx)
    assert row["explained_variance"] is None and row["ce_score"] is not None


# ---- its training data


@pytest.mark.parametrize("buffer, cached", [(10**6, True), (200, False)])
def test_batches_are_the_corpus_reshuffled(buffer, cached):
    model, stream = tiny(), tokens(525)
    site = sae.Site(model, 1, "mlp_out")
    batches = sae.Batches(site, stream, settings(buffer=buffer, batch_size=32), 0)
    every = site.read(sae.windows_at(stream, np.arange(65) * T, T, "cpu")).flatten(0, 1)  # (520, d): 5 tokens make no window
    assert batches.cached is cached and batches.size == (520 if cached else 200)
    assert batches.scale == pytest.approx(math.sqrt(8) / every.norm(dim=1).mean().item(), rel=1e-5)
    if cached:
        served = torch.cat([batches.at(step) for step in range(16)])  # 512 of the 520
        nearest = torch.cdist(served / batches.scale, every, compute_mode="donot_use_mm_for_euclid_dist")
        assert (nearest.amin(1) < 1e-5).all()
        again = torch.cat([batches.at(step) for step in range(16, 32)])
        assert served.sort(0).values.sub(every.sort(0).values[:512] * batches.scale).abs().mean() < 0.05  # each of them once
        assert not torch.equal(served, again)
    else:
        seen = [batches.at(step) for step in range(3)]  # half of the buffer, 96 rows, in three batches
        old = batches.buffer.clone()
        batches.at(3)
        changed = (batches.buffer != old).any(1)
        assert changed.sum() == 96 and torch.equal(old[batches.order(0)], torch.cat(seen))
        assert torch.equal(changed.nonzero()[:, 0], batches.order(0).sort().values)  # what was served made room


def test_the_text_is_read_in_another_order_every_epoch_and_every_window_once():
    site = sae.Site(tiny(), 1, "mlp_out")
    read, orders = [], []
    site.read = lambda idx: read.append(idx) or torch.ones(*idx.shape, 8)
    for seed in (0, 0, 1):
        batches = sae.Batches(site, tokens(525), settings(buffer=200), seed)
        read.clear()
        list(batches.read(0, 130))
        orders.append(torch.cat(read))
    first, second = orders[0][:65], orders[0][65:]
    every = sae.windows_at(tokens(525), np.arange(65) * T, T, "cpu")
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(every.tolist())
    assert not torch.equal(first, second) and torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


# ---- the evaluation


@pytest.mark.parametrize("oracles", ORACLES, ids=lambda folder: folder.name)
@pytest.mark.parametrize("name", ["centered", "raw"])
def test_ce_scores_are_those_of_the_published_evaluation(oracles, name):
    z, expected = np.load(oracles / "ce_oracle.npz"), json.loads((oracles / "ce_oracle.json").read_text())[name]
    model = GPTNeo(GPTNeoConfig(vocab_size=61, block_size=12, n_layer=3, n_head=4, n_embd=16, ablation="none")).double()
    model.load_state_dict({key: torch.from_numpy(z[key]) for key in model.state_dict()})
    one = sae.SAE(16, 48).double()
    one.load_state_dict({key: torch.from_numpy(z[f"sae.{key}"]) for key in one.state_dict()})
    site, idx = sae.Site(model, 1, "mlp_out", center=name == "centered"), torch.from_numpy(z["tokens"])
    assert (site.read(idx) - torch.from_numpy(z[f"mlp_out_{name}"])).abs().max() < 1e-5  # theirs is float32
    assert 4 / site.read(idx).norm(dim=-1).mean().item() == pytest.approx(expected["norm_scaling_factor"], abs=1e-6)
    (row,) = sae.score_saes(site, [one], idx)
    for ours, theirs in {"ce_clean": "ce_loss_without_sae", "ce_zero": "ce_loss_with_ablation", "ce_sae": "ce_loss_with_sae",
                         "ce_score": "ce_loss_score", "kl_zero": "kl_div_with_ablation", "kl_sae": "kl_div_with_sae",
                         "kl_score": "kl_div_score", "l0": "l0", "explained_variance": "explained_variance"}.items():
        assert row[ours] == pytest.approx(expected[theirs], abs=1e-6), ours
        print(f"{name} {ours}: {row[ours]:.9f}, theirs {expected[theirs]:.9f}")


@pytest.mark.parametrize("site", list(sae.SITES))
def test_nothing_lost_scores_1_and_everything_lost_0(site):
    place = sae.Site(tiny().double(), 1, site)
    whole, nothing = (sae.SAE(place.d, 2 * place.d).double() for _ in range(2))
    for sign, half in ((1, slice(0, place.d)), (-1, slice(place.d, None))):  # x = ReLU(x) - ReLU(-x)
        whole.W_enc.data[:, half] = whole.W_dec.data[half] = sign * torch.eye(place.d).double()
    idx = torch.from_numpy(tokens(80).astype(np.int64)).view(10, T)
    full, zero = sae.score_saes(place, [whole, nothing], idx)
    assert full["ce_sae"] == pytest.approx(full["ce_clean"], abs=1e-9) and full["ce_score"] == pytest.approx(1)
    assert full["kl_score"] == pytest.approx(1) and full["explained_variance"] == pytest.approx(1) and full["l0"] == place.d
    assert zero["ce_sae"] == zero["ce_zero"] == full["ce_zero"] and zero["ce_score"] == zero["kl_score"] == 0 == zero["l0"]
    nats = torch.nn.functional.cross_entropy(place.model(idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).item()
    assert full["ce_clean"] == pytest.approx(nats, abs=1e-9)
    for row, silent in ((full, (whole.encode(place.read(idx).flatten(0, 1)) <= 0).all(0).sum().item()), (zero, 2 * place.d)):
        assert row["never"] == silent / (2 * place.d) and sum(row["density"]["features"]) == 2 * place.d - silent


def test_warnings():
    row = {"layer": 1, "site": "resid", "seed": 7, "l0": 60, "l1": 5.0, "features": 1000, "ce_zero": 3.04, "ce_clean": 3.0}
    heads = ["resid of block 1, l1 5, seed 7: L0 60", "resid of block 1: without this place the model loses only 0.0400 nats"]
    assert all(w.startswith(head) for w, head in zip(sae.warnings(row), heads, strict=True))
    without = {name: row[name] for name in row if name != "l1"}  # topk: as asked
    assert [w.split(": ")[1].split()[0] for w in sae.warnings(without)] == ["without"]
    assert not list(sae.warnings(row | {"l0": 40, "ce_zero": 3.1}))


@pytest.mark.parametrize("raw", [False, True])
def test_zeroing_costs_what_plain_hooks_say(raw):
    """Hooks that return zeros, on the model's own modules; and the evaluation of autoencoders says the same bits."""
    model, idx = tiny(), torch.from_numpy(tokens(400).astype(np.int64)).view(50, T)
    sites = [sae.Site(model, layer, site, not raw) for layer in (0, 2) for site in sae.SITES]

    def nats():
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(idx)[:, :-1].double().flatten(0, 1), idx[:, 1:].flatten()).item()

    def zeros(module, args, out):
        return (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0

    def no_units(module, args):
        return args[0] * 0,

    expected = []
    for layer in (0, 2):
        block = model.transformer["h"][layer]
        modules = {"mlp_out": block.mlp, "attn_out": block.attn.attention, "resid": block}
        written = {"mlp_act": block.mlp.c_proj, "attn_act": block.attn.attention.out_proj}
        for site in sae.SITES:
            handle = written[site].register_forward_pre_hook(no_units) if site in written else modules[site].register_forward_hook(zeros)
            expected.append((layer, site, nats()))
            handle.remove()
    found = sae.score_zeroing(sites, idx)
    for row, site, (layer, name, ce_zero) in zip(found, sites, expected, strict=True):
        assert (row["layer"], row["site"]) == (layer, name) and row["ce_zero"] == pytest.approx(ce_zero, abs=1e-6)
        assert row["ce_clean"] == pytest.approx(nats(), abs=1e-6)
        (scored,) = sae.score_saes(site, [sae.SAE(site.d, 5)], idx)
        assert (scored["ce_clean"], scored["ce_zero"]) == (row["ce_clean"], row["ce_zero"])
    assert len({row["ce_zero"] for row in found}) == len(found)  # each of them is another place


def test_the_score_at_an_l0_is_read_off_the_line_through_its_neighbours():
    """By hand: L0 2 is halfway from 1 to 4 in its logarithm, 8 halfway from 4 to 16."""
    points = {16: 0.9, 1: 0.2, 4: 0.5}
    rows = [{"l0": l0, "ce_score": score} for l0, score in points.items()]  # in any order
    for l0, score in {**points, 2: 0.35, 8: 0.7, 2 * 2**0.5: 0.425}.items():
        assert sae.score_at_l0(rows, l0) == pytest.approx(score)
    assert sae.score_at_l0(rows, 0.99) is None and sae.score_at_l0(rows, 16.1) is None
    assert sae.score_at_l0([], 3) is None and sae.score_at_l0([{"l0": 0.0, "ce_score": 0.0}], 3) is None
    nothing = {"l0": 0.0, "ce_score": 0.0}  # has no logarithm
    assert sae.score_at_l0([*rows, nothing], 2) == pytest.approx(0.35) and sae.score_at_l0([*rows, nothing], 0.5) is None
    rows[0]["ce_score"] = None
    assert sae.score_at_l0(rows, 8) is None and sae.score_at_l0(rows, 2) == pytest.approx(0.35)
    twice = [{"l0": 4, "ce_score": 0.1}, {"l0": 4, "ce_score": 0.2}, {"l0": 9, "ce_score": 0.8}]
    assert sae.score_at_l0(twice, 6) == pytest.approx(0.5)


def test_snippets_show_the_tokens_that_a_feature_reads():
    """Features that read a letter off the activations, where one-hot ones, that grow with time, stand for them."""
    stream, common, rare, never = tokens(800, seed=3), ord("a"), 200, 0
    stream[[1, 3, 50, 300, 301, 302, 500, 700, 703]] = rare
    idx = torch.from_numpy(stream.astype(np.int64)).view(100, T)
    site = sae.Site(tiny(), 0, "resid")
    growth = dict(zip(map(tuple, idx.tolist()), (1 + torch.arange(800) / 800).view(100, T)))
    site.read = lambda part: (torch.nn.functional.one_hot(part, V)
                              * torch.stack([growth[tuple(window)] for window in part.tolist()])[..., None])
    one = sae.SAE(V, 3).eval()
    for feature, token in enumerate((common, rare, never)):
        one.W_enc.data[token, feature], one.W_dec.data[feature, 0] = 2, 1
    text = Text(stream, EOT, T, "cpu")
    (shown,) = sae.top_snippets(site, one, text, count=5, snippets=4, context=3)  # common: too dense; never: silent
    assert shown["feature"] == 1 and shown["density"] == pytest.approx(9 / 800)
    stories = np.cumsum([0, *(stream == EOT)])[:800]
    last = {stories[i]: i for i in np.flatnonzero(stream == rare)}  # of each story, where it is strongest
    assert len(last) < 9  # some story has two
    expected = sorted(last.values(), reverse=True)[:4]
    assert len(shown["snippets"]) == len(expected) and shown["max"] == pytest.approx(2 * (1 + expected[0] / 800))
    for i, (words, values, peak) in zip(expected, shown["snippets"]):
        around = [j for j in range(i - 3, i + 4) if 0 <= j < 800 and stories[j] == stories[i] and j // T == i // T]
        assert words == stream[around].tolist() and around[peak] == i
        assert values == pytest.approx([2 * (1 + j / 800) if stream[j] == rare else 0 for j in around])


# ---- the command line


def numbers_of(folder):
    """What must not depend on when and where a result was made; the weights."""
    result = json.loads((folder / "sae.json").read_text())
    for row in result["saes"]:
        del row["seconds"]
    weights = [one.state_dict() for one in sae.load_saes(folder / "sae.pt")]
    return {name: result[name] for name in ("checkpoint", "settings", "saes", "warnings")}, weights


def same(one, other):
    return one[0] == other[0] and all(torch.equal(a[name], b[name]) for a, b in zip(one[1], other[1], strict=True) for name in a)


def copy(run, name, factor=None):
    out = run.parent / name
    out.mkdir()
    checkpoint = load_checkpoint(run)
    weights = {key: value * factor if factor else value for key, value in checkpoint["model"].items()}
    save_checkpoint(out / "best.pt", tiny().config, weights, **kept(checkpoint))
    return out


def test_a_run_from_end_to_end(run, call):
    other = copy(run, "other", factor=1.1)
    words = (run, other, *QUICK, "--l1=0.1,1", "--seeds=1,2", "--plot", run.parent / "all.svg")
    message, out = call(*words, "--features=3")
    assert message is None
    result, content = json.loads((run / "sae.json").read_text()), torch.load(run / "sae.pt", weights_only=True)
    assert [(row["seed"], row["l1"]) for row in result["saes"]] == [(1, 0.1), (1, 1.0), (2, 0.1), (2, 1.0)]
    first, _ = sae.table_rows(result)  # means over the seeds
    assert first["l0"] == pytest.approx((result["saes"][0]["l0"] + result["saes"][2]["l0"]) / 2)
    assert first["ce_score"] == pytest.approx((result["saes"][0]["ce_score"] + result["saes"][2]["ce_score"]) / 2)
    place = {name: result["settings"][name] for name in ("data", "layer", "site", "center")}
    assert place == {"data": "abc", "layer": [1], "site": ["mlp_out"], "center": True}
    assert result["saes"][0]["l0"] > result["saes"][1]["l0"] and result["saes"][0]["tokens"] == 96
    assert content["settings"] == result["settings"] and content["checkpoint"] == result["checkpoint"]
    lengths = {len(values) for row in result["saes"] for values in row["history"].values()}
    assert lengths == {40} and not (run / "sae.resume.pt").exists()
    # what was saved is what was measured
    model = GPTNeo.from_checkpoint(run)
    val = sae.load_tokens(run.parent.parent / "data", "val")
    idx = sae.windows_at(val, sae.held_out_windows(val, T, 400), T, "cpu")
    again = sae.score_saes(sae.Site(model, 1, "mlp_out"), sae.load_saes(run / "sae.pt"), idx)
    assert all(row[name] == value for row, measured in zip(result["saes"], again) for name, value in measured.items())
    table = out[out.index("run  "):].splitlines()
    assert table[1].split()[:8] == [str(run), "mlp_out", "of", "block", "1", "l1", "0.1", "2"]
    assert f"{first['ce_score']:.3f} ±" in table[1] and table[1].endswith(f"{first['ce_zero'] - first['ce_clean']:.4f}")
    assert len([line for line in table if line.startswith(str(run.parent))]) == 4 + 2  # the second: the score at one L0
    assert (run / "sae.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in (run.parent / "all.svg").read_bytes()[:500]
    page = (run / "sae_features.html").read_text()
    assert page.startswith("<!doctype html>") and "<b>" in page and "http" not in page and "feature" in out
    # the same command again makes nothing again
    before = (run / "sae.json").read_bytes()
    message, repeated = call(*words[:-2])
    assert message is None and repeated.endswith(out[out.index("run  "):]) and (run / "sae.json").read_bytes() == before


def without(rows, *names):
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def test_places_together_are_those_alone_to_the_bit(run, call, monkeypatch):
    """Also of other widths; and what load_saes gives can be put back where it belongs."""
    monkeypatch.setattr(sae, "draw_saes", lambda *_: None)
    words = (*QUICK, "--l1=0.1,1", "--seeds=1,2")
    message, out = call(run, *words, "--layer=2,0", "--site=mlp_act,resid")
    assert message is None
    (result, weights), rows, saes = numbers_of(run), [], []
    for layer in (2, 0):
        for site in ("mlp_act", "resid"):
            alone = copy(run, f"{layer} {site}")
            assert call(alone, *words, f"--layer={layer}", f"--site={site}")[0] is None
            rows += numbers_of(alone)[0]["saes"]
            saes += numbers_of(alone)[1]
    assert same((result["saes"], weights), (rows, saes))
    assert [(row["layer"], row["site"]) for row in rows[::4]] == [(2, "mlp_act"), (2, "resid"), (0, "mlp_act"), (0, "resid")]
    table = [line.split() for line in out.splitlines() if line.startswith(str(run)) and "l1 0.1" in line]
    assert [" ".join(words[1:5]) for words in table] == ["mlp_act of block 2", "resid of block 2", "mlp_act of block 0", "resid of block 0"]
    model, val = GPTNeo.from_checkpoint(run), sae.load_tokens(run.parent.parent / "data", "val")
    idx = sae.windows_at(val, sae.held_out_windows(val, T, 400), T, "cpu")
    for row, one in zip(rows, sae.load_saes(run / "sae.pt"), strict=True):
        (scored,) = sae.score_saes(sae.Site(model, one.layer, one.site, one.center), [one], idx)
        assert scored["ce_sae"] == row["ce_sae"]


def test_one_buffer_at_a_time(run, call, monkeypatch):
    """Of several places and seeds none keeps its activations when the next one reads its own."""
    monkeypatch.setattr(sae, "draw_saes", lambda *_: None)
    alive, fill = weakref.WeakSet(), sae.Batches.fill

    def counted(batches):
        assert not alive
        alive.add(batches)
        fill(batches)

    monkeypatch.setattr(sae.Batches, "fill", counted)
    assert call(run, *QUICK, "--layer=0,1", "--seeds=1,2")[0] is None


def test_places_prints_what_zeroing_costs_and_no_more(run, call):
    """Beside a result made with other settings, of every place or of some, of several runs."""
    (run / "sae.json").write_text("of something else")
    other = copy(run, "other", factor=1.1)
    before = sorted(run.iterdir())
    message, out = call(run, other, "--small", "--device=cpu", "--places")
    head, *lines = out.splitlines()
    assert message is None and sorted(run.iterdir()) == before and len(lines) == 2 * 3 * len(sae.SITES)
    model, val = GPTNeo.from_checkpoint(run), sae.load_tokens(run.parent.parent / "data", "val")
    idx = sae.windows_at(val, sae.held_out_windows(val, T, 400), T, "cpu")
    sites = [sae.Site(model, layer, site) for layer in range(3) for site in sae.SITES]
    rows = sae.score_zeroing(sites, idx)
    for row, line in zip(rows, lines):
        cost = row["ce_zero"] - row["ce_clean"]
        assert line.startswith(f"{run}  ") and f" {row['site']} of block {row['layer']} " in line and f" {cost:.4f}" in line
        assert line.endswith("says little") == (cost < 0.05)
    assert 0 < sum(line.endswith("says little") for line in lines) < len(lines)
    some = call(run, "--device=cpu", "--places", "--site=resid", "--layer=0,2")[1].splitlines()[1:]
    assert [" ".join(line.split()[1:5]) for line in some] == ["resid of block 0", "resid of block 2"]


def test_the_picture_has_a_line_for_every_run_and_place(monkeypatch):
    figures, history = [], {"step": [0, 1], "error": [2.0, 1.0], "l0": [9.0, 4.0], "dead": [0, 0]}
    monkeypatch.setattr(sae, "save_figure", lambda path, figure: figures.append(figure))
    settings = {"layer": [0, 3], "site": ["mlp_out", "resid"], "activation": "relu", "recipe": "saelens5", "steps": 2, "batch_size": 1}
    rows = [{"layer": layer, "site": site, "seed": seed, "l1": l1, "l0": 10 / l1, "ce_score": 1 / l1 + layer, "explained_variance": None,
             "history": history, "density": {"features": [1], "log10_edges": [-1, 0]}}
            for layer in (0, 3) for site in ("mlp_out", "resid") for seed in (1, 2) for l1 in (1.0, 2.0)]
    results = [{"run": f"out/{name}", "settings": settings, "saes": rows} for name in ("plain/base", "ramp/base", "last.pt")]
    for chosen, names in ((results, ["plain/base", "ramp/base", "last.pt"]), (results[:1], ["base"])):
        sae.draw_saes("all.png", chosen)
        (legend,), score = figures[-1].legends, figures[-1].axes[4]
        assert [text.get_text() for text in legend.get_texts()] == [
            *names, "mlp_out of block 0", "resid of block 0", "mlp_out of block 3", "resid of block 3"]
        frontiers = [line for line in score.lines if len(line.get_xdata())]
        looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in frontiers}
        assert len(frontiers) == len(looks) == 4 * len(names) and len({color for color, *_ in looks}) == len(names)
        assert all(list(line.get_xdata()) == [5, 10] for line in frontiers)
        assert [list(line.get_ydata()) for line in frontiers[:4]] == [[0.5, 1], [0.5, 1], [3.5, 4], [3.5, 4]]


def test_a_result_of_one_place_from_before_there_were_several(run, call, monkeypatch):
    monkeypatch.setattr(sae, "draw_saes", lambda *_: None)
    assert call(run, *QUICK)[0] is None
    expected = numbers_of(run)
    for path, read, write in ((run / "sae.json", lambda path: json.loads(path.read_text()), lambda old, path: path.write_text(json.dumps(old))),
                              (run / "sae.pt", torch.load, torch.save)):
        old = read(path)
        old["settings"] |= {"layer": 1, "site": "mlp_out"}
        old["saes"] = without(old["saes"], "layer", "site")
        write(old, path)
    assert call(run, *QUICK)[0] == f"error: {run / 'sae.json'} was made with layer=1, not [1]: --force replaces it"
    with pytest.raises(ValueError, match="sae.pt does not hold autoencoders of this version .*: delete it, and make it again"):
        sae.load_saes(run / "sae.pt")
    assert call(run, *QUICK, "--force")[0] is None and same(numbers_of(run), expected)


def test_tokens_are_escaped_in_the_page(tmp_path, capsys):
    from prepare import load_tokenizer
    tokenizer = load_tokenizer({"name": "words", "pieces": ["<b>", "\n"]})
    snippet = Snippet([256, 97, 257], [2.0, 0.5, 0.0], 0)
    sae.show_features([{"feature": 3, "density": 0.01, "max": 2.0, "snippets": [snippet]}],
                      tokenizer, tmp_path / "page.html", "a <title>")
    page = (tmp_path / "page.html").read_text()
    assert "a &lt;title&gt;" in page and "title='2.00'>&lt;b&gt;</span>" in page and "↵" in page and page.count("<b>") == 1
    assert "[<b>]a↵" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("--l1=0.5", "--seeds=1,2"), ("--buffer=200", "--l1=0.1,1"),
                                   ("--layer=0,1", "--site=resid", "--buffer=200", "--l1=0.5"),
                                   ("--buffer=200", "--activation=batchtopk", "--k=2,3", "--recipe=saelens6")])
def test_resumed_is_uninterrupted(run, call, monkeypatch, words):
    """Stopped in training, twice (cached and streaming), and in the evaluation; every number and bit is the same."""
    monkeypatch.setattr(sae, "draw_saes", lambda *_: None)
    monkeypatch.setattr(sae, "DEAD_AFTER", 3)
    assert call(run, *QUICK, *words)[0] is None
    expected, stopped = numbers_of(run), copy(run, "stopped")
    step, score, count = sae.train_step, sae.score_saes, [0]

    def train_step(*rest):
        count[0] += 1
        call.stop.requested |= count[0] in (14, 58)
        return step(*rest)

    def stop_once(*rest):
        monkeypatch.setattr(sae, "score_saes", score)
        call.stop.requested = True
        return score(*rest)

    monkeypatch.setattr(sae, "train_step", train_step)
    monkeypatch.setattr(sae, "score_saes", stop_once)
    for _ in range(3):
        assert call(stopped, *QUICK, *words)[0].startswith("stopped") and (stopped / "sae.resume.pt").exists()
        assert not (stopped / "sae.json").exists()
    assert call(stopped, *QUICK, *words)[0] is None and count[0] == 80
    assert same(numbers_of(stopped), expected) and not (stopped / "sae.resume.pt").exists()
    assert any(row["history"]["dead"][-1] for row in expected[0]["saes"])
    assert all(one.activation == "relu" or one.threshold > 0 for one in sae.load_saes(run / "sae.pt"))


def stop_at(call, monkeypatch, step):
    """A Ctrl-C in this step of training, of this patch's life."""
    train_step, count = sae.train_step, [0]

    def counted(*rest):
        count[0] += 1
        call.stop.requested |= count[0] == step
        return train_step(*rest)

    monkeypatch.setattr(sae, "train_step", counted)


def test_force_replaces_damaged_files(run, call, monkeypatch):
    monkeypatch.setattr(sae, "draw_saes", lambda *_: None)
    assert call(run, *QUICK)[0] is None
    expected = numbers_of(run)
    for names in (["sae.json"], ["sae.pt"], ["sae.resume.pt"], ["sae.json", "sae.pt", "sae.resume.pt"]):
        if "sae.resume.pt" in names:
            (run / "sae.json").unlink()  # a stopped run has none
        for name in names:
            (run / name).write_bytes(b"PK damaged")
        message, _ = call(run, *QUICK)
        assert message.startswith(f"error: {run / 'sae.'}") and "delete it" in message
        assert call(run, *QUICK, "--force")[0] is None
        assert same(numbers_of(run), expected) and not (run / "sae.resume.pt").exists()


def test_each_split_is_read_once(run, call, monkeypatch):
    """load_tokens verifies every byte; a result that is there needs no text."""
    monkeypatch.setattr(sae, "draw_saes", lambda *_: None)
    read, load_tokens = [], sae.load_tokens
    monkeypatch.setattr(sae, "load_tokens", lambda *which: read.append(which[1]) or load_tokens(*which))
    runs = (run, copy(run, "other"))
    assert call(*runs, *QUICK, "--seeds=1,2", "--features=2")[0] is None and read == ["train", "val"]
    assert call(*runs, *QUICK, "--seeds=1,2")[0] is None and read == ["train", "val"]
    assert call(*runs, *QUICK, "--seeds=1,2", "--features=2")[0] is None and read == ["train", "val"] * 2


def test_the_readme_loads_them_from_the_project_root(run, call, monkeypatch):
    monkeypatch.setattr(sae, "draw_saes", lambda *_: None)
    assert call(run, *QUICK, "--seeds=1,2")[0] is None
    lines = f"from interp.sae import load_saes; print([one.W_dec.shape[0] for one in load_saes({str(run / 'sae.pt')!r})])"
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[32, 32]\n", done.stderr


def test_a_signal_saves_and_leaves(run):
    """A real process and a real SIGTERM, and the same command again."""
    words = [sys.executable, ROOT / "interp" / "sae.py", run, *QUICK[2:], "--device=cpu", "--steps=100000"]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
        said = b""
        while b"L0" not in said:  # at least one step is done
            said += process.stderr.read(1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1].decode()
    assert process.returncode == 1 and said.endswith("stopped: the same command again goes on from here\n")
    assert torch.load(run / "sae.resume.pt", weights_only=True)["state"]["current"]["step"] > 0


def stopped(*_):
    raise Stopped


def test_results_with_other_settings_are_not_mixed_or_lost(run, call, monkeypatch):
    monkeypatch.setattr(sae, "draw_saes", lambda *_: None)
    assert call(run, *QUICK)[0] is None
    before = (run / "sae.json").read_bytes()
    message, _ = call(run, *QUICK, "--lr=0.001")
    assert message == f"error: {run / 'sae.json'} was made with lr=0.003, not 0.001: --force replaces it"
    assert (run / "sae.json").read_bytes() == before
    assert call(run, *QUICK, "--lr=0.001", "--force")[0] is None and (run / "sae.json").read_bytes() != before
    checkpoint = load_checkpoint(run)
    checkpoint["model"]["transformer.ln_f.bias"] += 1  # the run went on
    torch.save(checkpoint, run / "best.pt")
    assert "no longer has" in call(run, *QUICK, "--lr=0.001")[0]
    with monkeypatch.context() as patch:  # a half-made one is no less in the way
        patch.setattr(sae, "score_saes", stopped)
        assert call(run, *QUICK, "--force")[0].startswith("stopped")
    assert "sae.resume.pt was made with lr=0.003" in call(copy_files(run), *QUICK, "--lr=0.002")[0]
    deeper = run.parent / "deeper"
    deeper.mkdir()
    model = tiny(n_layer=4)
    save_checkpoint(deeper / "best.pt", model.config, model.state_dict(), **kept(checkpoint))
    monkeypatch.setattr(sae, "train_saes", lambda *_, **__: pytest.fail("too late"))
    assert "layer=[1]" in call(run, deeper, *QUICK, "--force")[0]
    (run / "sae.json").write_text("{")
    assert "sae.json is damaged" in call(run, *QUICK)[0]


def copy_files(run):
    """Only the checkpoint and the unfinished state."""
    out = run.parent / "half"
    out.mkdir()
    for name in ("best.pt", "sae.resume.pt"):
        (out / name).write_bytes((run / name).read_bytes())
    return out


def test_mistakes_get_one_line(run, call, tmp_path):
    (tmp_path / "not.pt").write_text("hello")
    torch.save({"settings": {}}, tmp_path / "other.pt")
    save_checkpoint(tmp_path / "bare.pt", tiny().config, tiny().state_dict())
    for words, expected in [
        ((tmp_path / "nowhere",), "no checkpoint at"), ((tmp_path / "not.pt",), "not a file of this project"),
        ((tmp_path / "other.pt",), "it has no config"), ((tmp_path / "bare.pt",), "bare.pt: 'step'"),
        ((run, "--data", tmp_path / "nowhere"), "no prepared data"), ((run, "--layer=3"), "--layer=3: the blocks"),
        ((run, "--layer=-1"), "--layer=-1"), ((run, "--l1=abc"), "--l1=abc"), ((run, "--l1=2,2"), "--l1=2,2"),
        ((run, "--l1=nan"), "--l1=nan"), ((run, "--site=mlp"), "--site"), ((run, "--k=3"), "--k has no effect"),
        ((run, "--activation=topk", "--l1=3"), "--l1 has no effect"), ((run, "--activation=topk", "--k=0"), "--k: keep"),
        ((run, "--activation=topk", "--k=200"), "--k: keep"), ((run, "--seeds=x"), "--seeds=x"), ((), "runs"),
        ((run, "--steps=0"), "--steps=0"), ((run, "--lr=nan"), "--lr=nan"), ((run, "--features=0"), "--features=0"),
        ((run, "--batch_size=1000"), "smaller --batch_size"), ((run, *QUICK, "--lr=1e30"), "smaller --lr"),
        ((run, "--plot=a.txt"), "--plot"), ((run, "--device=gpu"), "--device=gpu"), ((run, "--frobnicate"), "--frobnicate"),
    ]:
        message, _ = call(*words)
        assert expected in str(message) and str(message).startswith("error: ") and "\n" not in str(message), (words, message)
    with pytest.raises(ValueError, match="does not hold autoencoders"):
        sae.load_saes(run / "best.pt")
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    meta["val"] |= {"tokens": 5, "sha256": hashlib.sha256(tokens(5).tobytes()).hexdigest()}
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta))
    tokens(5).tofile(tmp_path / "data" / "val.bin")
    assert "5 validation tokens" in call(run, *QUICK)[0]
