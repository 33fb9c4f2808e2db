"""interp/sae.py: against the paper's own library, a planted dictionary and definitions by hand.

Where ../shared/oracles/interp exists, ten training steps and the CE scores are compared with what
SAELens 5.1.0 and TransformerLens computed.
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import ORACLES, T, letters, make_run, tiny_model
from interp import sae
from interp.activations import SITES, UNITS, Site, held_out_windows, windows_at
from model import GPTNeo, GPTNeoConfig
from prepare import load_tokens
from test_activations import ids

QUICK = ("--device=cpu", "--steps=40", "--batch_size=32", "--lr=0.003", "--expansion=4")
needs_oracles = pytest.mark.skipif(not ORACLES.exists(), reason="no ../shared/oracles")


def settings(**changes):
    return {"batch_size": 32, "tokens": None, "buffer": 10**6, **changes}


@needs_oracles
def test_ten_steps_are_those_of_saelens_5():
    """Its code in float64: scale, losses, gradients, weights after 1, 5, 10 steps, folded ones."""
    log, z = json.loads((ORACLES / "sae_v51.json").read_text()), np.load(ORACLES / "sae_v51.npz")
    z = {name: torch.from_numpy(z[name]) for name in z.files}
    x, scale = z["x"], log["scaling_factor"]  # (15, 32, 16): for the scale, training, held out
    assert math.sqrt(16) / x[:3].norm(dim=-1).mean().item() == pytest.approx(scale, abs=1e-12)
    one = sae.SAE(16, 64).double()
    one.load_state_dict({name: z[f"init_{name}"] for name in one.state_dict()})
    optimizer, near = sae.Learner(one, 5.0).optimizer, {"rtol": 0, "atol": 1e-9}
    for step, row in enumerate(log["steps_log"]):
        error, penalty, f = sae.train_step(
            one, optimizer, x[3 + step] * scale, row["lr"], row["l1_coefficient"])
        assert error.item() == pytest.approx(row["mse_loss"], abs=1e-9)
        assert penalty.item() == pytest.approx(row["l1_loss"], abs=1e-9)
        assert (f > 0).sum().item() / 32 == row["l0"]
        clipping = max(1, row["grad_norm_before_clip"] + 1e-6)
        for name, p in one.named_parameters() if step + 1 in (1, 5, 10) else ():
            assert torch.allclose(p, z[f"after{step + 1}_{name}"], **near)
            assert torch.allclose(p.grad, z[f"grad{step + 1}_{name}"] / clipping, **near)
    held_out = x[13:].flatten(0, 1)
    assert torch.allclose(one(held_out * scale) / scale, z["eval_unfolded_xhat"], atol=1e-9)
    one.fold(scale)
    assert all(torch.allclose(p, z[f"folded_{name}"], atol=1e-9)
               for name, p in one.named_parameters())
    assert (one.encode(held_out) > 0).sum().item() / 64 == log["eval_folded"]["l0"]


def test_the_schedules_and_defaults_are_table_5(monkeypatch):
    paper = {"steps": 100_000, "batch_size": 4096, "lr": 1e-5, "l1": [5.0], "expansion": 16,
             "buffer": 262_144, "tokens": None, "site": ["mlp_out"], "raw": False}
    small = paper | {"steps": 4000, "batch_size": 1024, "lr": 1e-3, "buffer": 1_000_000,
                     "tokens": 1_000_000}
    for expected, words in ((paper, ()), (small, ("--small", "--lr=1e-3"))):
        monkeypatch.setattr("sys.argv", ["sae.py", "out/x", *words])
        args = vars(sae.parse_arguments())
        assert args == args | expected
    for t in (0, 1, 2500, 5000, 79_999, 80_000, 80_001, 90_000, 99_999):
        lr, l1 = sae.schedule(t, 100_000, 1e-5, 5)
        assert l1 == pytest.approx(5 * min(t, 5000) / 5000)
        assert lr == pytest.approx(1e-5 * min(1, (100_000 - t) / 20_000))


def test_the_initial_weights():
    one, other = (sae.SAE(16, 64).initialise(seed) for seed in (3, 4))
    assert torch.allclose(one.W_dec.norm(dim=1), torch.ones(64))
    assert torch.allclose(F.normalize(one.W_enc.T, dim=1), one.W_dec, atol=1e-6)
    assert 1.35 < one.W_enc.norm(dim=0).mean() < 1.48  # kaiming's, not 1
    assert not torch.equal(one.W_dec, other.W_dec)


def test_a_planted_dictionary_is_recovered():
    """24 directions in 20 dimensions, one at a time on average. Folding changes no output."""
    torch.manual_seed(0)
    planted = F.normalize(torch.randn(24, 20), dim=1)
    learner, steps = sae.Learner(sae.SAE(20, 48).initialise(0), 1.0), 700
    for step in range(steps):
        on = torch.rand(256, 24) < 1 / 24
        x = (on * (1 + torch.rand(256, 24))) @ planted * 2.5  # (256, 20)
        learner.update(x, step, steps, 1e-2)
    match = (planted @ F.normalize(learner.sae.W_dec, dim=1).T).amax(1)  # (24), cosines
    assert (match > 0.95).sum() >= 22, match
    f, x_hat = learner.sae.encode(x), learner.sae(x)
    assert (f > 0).sum(1).float().mean() < 2.5
    assert torch.allclose(learner.sae.fold(0.37)(x / 0.37) * 0.37, x_hat, atol=1e-4)


def test_a_place_that_is_always_the_same_stays_finite():
    model, one = tiny_model(), sae.SAE(8, 32).initialise(0)
    c_proj = model.transformer["h"][1].mlp.c_proj
    c_proj.weight.data.zero_()
    for bias, explained in ((torch.zeros(8), "ce_clean"), (torch.arange(1, 9) / 7, "ce_score")):
        c_proj.bias.data.copy_(bias)
        site = Site(model, 1, "mlp_out", center=False)
        (row,) = sae.score_saes(site, [one], ids(letters(800)))
        assert row["explained_variance"] is None and row[explained] is not None
        assert "nan" not in json.dumps(row).lower()
        batches = sae.Batches(site, letters(200), settings(), 0)
        sae.Learner(one, 5.0).update(batches.at(0), 0, 1, 0.01)
        assert all(p.isfinite().all() for p in one.parameters())


def test_a_cached_corpus_is_shuffled_again_and_again():
    site, stream = Site(tiny_model(), 1, "mlp_out"), letters(525)
    batches = sae.Batches(site, stream, settings(), 0)
    windows = windows_at(stream, np.arange(65) * T, T, "cpu")
    every = site.read(windows).flatten(0, 1)  # (520, d): 5 tokens fill no window
    scale = math.sqrt(8) / every.norm(dim=1).mean().item()
    assert batches.cached and batches.scale == pytest.approx(scale, rel=1e-5)
    served = [torch.cat([batches.at(step) for step in range(low, low + 16)]) for low in (0, 16)]
    for rows in served:  # 512 of the 520, each once
        distance = torch.cdist(rows / scale, every, compute_mode="donot_use_mm_for_euclid_dist")
        assert (distance.amin(1) < 1e-5).all()
        assert (rows.sort(0).values - every.sort(0).values[:512] * scale).abs().mean() < 0.05
    assert not torch.equal(*served)


def test_what_a_stream_has_served_makes_room():
    site = Site(tiny_model(), 1, "mlp_out")
    batches = sae.Batches(site, letters(525), settings(buffer=200), 0)
    seen = torch.cat([batches.at(step) for step in range(3)])  # 96 rows: half of the buffer
    old = batches.buffer.clone()
    batches.at(3)
    changed = (batches.buffer != old).any(1).nonzero()[:, 0]
    assert torch.equal(old[batches.rows(0)], seen)
    assert torch.equal(changed, batches.rows(0).sort().values)


def test_every_epoch_reads_every_window_once_in_another_order():
    site, orders = Site(tiny_model(), 1, "mlp_out"), []
    for seed in (0, 1):
        batches = sae.Batches(site, letters(525), settings(buffer=200), seed)
        batches.site = SimpleNamespace(read=lambda idx: idx)
        orders += torch.cat([*batches.read(0, 130)]).view(2, 65, T).tolist()
    every = windows_at(letters(525), np.arange(65) * T, T, "cpu").tolist()
    assert all(sorted(order) == sorted(every) for order in orders)
    assert len({str(order) for order in orders}) == 4


THEIR_NAMES = {
    "ce_clean": "ce_loss_without_sae", "ce_zero": "ce_loss_with_ablation",
    "ce_sae": "ce_loss_with_sae", "ce_score": "ce_loss_score", "kl_score": "kl_div_score",
    "kl_zero": "kl_div_with_ablation", "kl_sae": "kl_div_with_sae", "l0": "l0",
    "explained_variance": "explained_variance"}


@needs_oracles
@pytest.mark.parametrize("name", ["centered", "raw"])
def test_ce_scores_are_those_of_the_published_evaluation(name):
    z = np.load(ORACLES / "ce_oracle.npz")
    expected = json.loads((ORACLES / "ce_oracle.json").read_text())[name]
    model = GPTNeo(GPTNeoConfig(vocab_size=61, block_size=12, n_layer=3, n_head=4, n_embd=16,
                                ablation="none")).double()
    model.load_state_dict({key: torch.from_numpy(z[key]) for key in model.state_dict()})
    one = sae.SAE(16, 48).double()
    one.load_state_dict({key: torch.from_numpy(z[f"sae.{key}"]) for key in one.state_dict()})
    site, idx = Site(model, 1, "mlp_out", name == "centered"), torch.from_numpy(z["tokens"])
    (row,) = sae.score_saes(site, [one], idx)
    for ours, theirs in THEIR_NAMES.items():
        assert row[ours] == pytest.approx(expected[theirs], abs=1e-6), ours
    assert row["nats_lost"] == row["ce_sae"] - row["ce_clean"]


@pytest.mark.parametrize("name", list(SITES))
def test_nothing_lost_scores_1_and_everything_lost_0(name):
    """Zeroing against a plain hook on the model's own module."""
    model, idx = tiny_model().double(), ids(letters(80))
    site = Site(model, 1, name)
    d, one = site.d, torch.eye(site.d).double()
    whole, nothing = sae.SAE(d, 2 * d).double(), sae.SAE(d, 2 * d).double()
    whole.W_enc.data.copy_(torch.cat([one, -one], 1))  # x = ReLU(x) - ReLU(-x)
    whole.W_dec.data.copy_(torch.cat([one, -one]))
    full, zero = sae.score_saes(site, [whole, nothing], idx)
    assert full["nats_lost"] == pytest.approx(0, abs=1e-9) and full["l0"] == d
    for measure in ("ce_score", "kl_score", "explained_variance"):
        assert full[measure] == pytest.approx(1)
    assert zero["ce_score"] == zero["kl_score"] == zero["l0"] == 0 and zero["never"] == 1
    assert sum(full["density"]["features"]) == 2 * d * (1 - full["never"])

    def nats():
        return F.cross_entropy(model(idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).item()

    assert full["ce_clean"] == pytest.approx(nats(), abs=1e-9)
    if name in UNITS:
        site.module.register_forward_pre_hook(lambda module, args: args[0] * 0)
    else:
        site.module.register_forward_hook(lambda module, args, out: (
            (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0))
    assert full["ce_zero"] == pytest.approx(nats(), abs=1e-9)


def test_numbers_at_an_l0_are_on_the_line_through_its_neighbours():
    """By hand: L0 2 is halfway from 1 to 4 in its logarithm, 8 halfway from 4 to 16."""
    points = {16: None, 8: 0.9, 1: 0.2, 4: 0.5, 0: 0.0}  # in any order; 0 has no logarithm
    rows = [{"l0": l0, "ce_score": score} for l0, score in points.items()]
    for l0, score in {1: 0.2, 4: 0.5, 2: 0.35, 32**0.5: 0.7, 0.9: None, 9: None, 17: None}.items():
        assert sae.value_at(rows, "ce_score", l0) == (score and pytest.approx(score))
    assert sae.value_at([], "ce_score", 3) is None


def test_equal_l0_averages_over_the_seeds_that_all_reach_it():
    rows = [{"layer": layer, "site": "resid", "seed": seed, "l0": l0, "nats_lost": seed / l0,
             "ce_score": None}
            for layer in (0, 1) for seed in (1, 2) for l0 in (1.5, 6 - 4 * layer * (seed - 1))]
    first, second = sae.at_equal_l0(rows)["places"]
    lost = [(seed / 1.5 + seed / 6) / 2 for seed in (1, 2)]  # 3 is halfway from 1.5 to 6
    assert first == {"layer": 0, "site": "resid", "seeds": 2, "ce_score": None,
                     "nats_lost": pytest.approx(1.5 * lost[0]),
                     "nats_lost_sd": pytest.approx(np.std(lost, ddof=1))}
    assert second["nats_lost"] is None  # its second seed has 1.5 and 2


def test_warnings():
    row = {"layer": 1, "site": "resid", "seed": 7, "l0": 60, "l1": 5.0, "features": 1000,
           "nats_zero": 0.04}
    dense, little = sae.warnings(row)
    assert "l1 5, seed 7: L0 60 is more than" in dense and "only 0.0400 nats" in little
    assert not [*sae.warnings(row | {"l0": 40, "nats_zero": 0.1})]


def numbers_of(folder):
    """What must not depend on when and where a result was made."""
    result = json.loads((folder / "sae.json").read_text())
    names = ("checkpoint", "gates", "settings", "saes", "at_l0", "warnings")
    weights = [one.state_dict() for one in sae.load_saes(folder / "sae.pt")]
    lists = [{name: w.tolist() for name, w in state.items()} for state in weights]
    return {name: result[name] for name in names} | {"weights": lists}


def test_a_run_from_end_to_end(run, typed, stop_at):
    other = make_run(run.parent / "$other", run.parent.parent / "data", tiny_model("none"))
    words = (run, other, *QUICK, "--l1=0.1,1", "--seeds=1,2")
    message, out = typed(sae.main, *words, "--plot", run.parent / "all.svg")
    assert message is None and b"<svg" in (run.parent / "all.svg").read_bytes()[:500]
    result, content = json.loads((run / "sae.json").read_text()), torch.load(run / "sae.pt")
    saes, kept = result["saes"], content.pop("saes")
    assert content == {name: result[name] for name in ("settings", "checkpoint", "gates")}
    for row, weights in zip(saes, kept, strict=True):
        assert weights.pop("weights") and row == row | weights
    assert [(row["seed"], row["l1"]) for row in saes] == [(1, 0.1), (1, 1.0), (2, 0.1), (2, 1.0)]
    # what was saved is what was measured
    val = load_tokens(run.parent.parent / "data", "val")
    idx = windows_at(val, held_out_windows(val, T, 400), T, "cpu")
    loaded = sae.load_saes(run / "sae.pt")
    site = Site(GPTNeo.from_checkpoint(run), loaded[0].layer, loaded[0].site, loaded[0].center)
    measured = sae.score_saes(site, loaded, idx)
    assert saes == [row | again for row, again in zip(saes, measured)]
    # the table: means over the seeds, nats first
    lost = [row["nats_lost"] for row in saes[::2]]
    assert f" 0.1  2  {np.mean(lost):.4f} ± {np.std(lost, ddof=1):.4f}" in out.splitlines()[1]
    stop_at(sae, "measure", 1)  # it is not measured again
    assert typed(sae.main, *words) == (None, out)


def test_places_together_are_those_alone_to_the_bit(run, typed, monkeypatch):
    monkeypatch.setattr(sae, "draw_saes", lambda *_: None)
    words = (run, *QUICK, "--l1=0.1,1", "--seeds=1,2", "--force")
    assert typed(sae.main, *words, "--layer=2,0", "--site=mlp_act,resid")[0] is None
    together, alone = numbers_of(run), []
    for layer, site in ((2, "mlp_act"), (2, "resid"), (0, "mlp_act"), (0, "resid")):
        assert typed(sae.main, *words, f"--layer={layer}", f"--site={site}")[0] is None
        alone.append(numbers_of(run))
    for name in ("saes", "weights"):
        assert together[name] == [row for result in alone for row in result[name]]


@pytest.mark.parametrize("words", [("--l1=0.5", "--layer=0,1"), ("--buffer=200", "--l1=0.1,1")])
def test_resumed_is_uninterrupted(run, typed, stop_at, monkeypatch, words):
    monkeypatch.setattr(sae, "draw_saes", lambda path, _: path.touch())
    monkeypatch.setattr(sae, "DEAD_AFTER", 3)
    monkeypatch.setattr(sae, "SAVE_EVERY", -1)  # before each step
    words = (run, *QUICK, *words, "--seeds=1,2")
    assert typed(sae.main, *words)[0] is None
    expected = numbers_of(run)
    assert any(row["history"]["dead"][-1] for row in expected["saes"])
    (run / "sae.json").unlink()

    steps, scored = stop_at(sae, "train_step", 18, 103), stop_at(sae, "score_saes", 1)
    assert [typed(sae.main, *words)[0] for _ in range(4)] == ["stopped"] * 3 + [None]
    assert len(steps) <= 163 and len(scored) <= 3  # 160 steps, at most three of them twice
    assert numbers_of(run) == expected and not (run / "sae.resume.pt").exists()
