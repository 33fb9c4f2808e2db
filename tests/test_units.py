"""interp/units.py: every number against brute force, and against distributions that are known."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from conftest import SIZE, T, letters, make_run, tiny_model
from interp import activations, units
from model import GPTNeo

def kept_by(model, starts=(0, 8, 16, 24, 32)):
    return units.read_kept(model, letters(100, 1), starts, torch.device("cpu"))


def bits(probabilities):
    return -sum(p * math.log2(p) for p in probabilities if p > 0)


def shares(values):
    """{value: its share of them}."""
    return {value: count / len(values) for value, count in Counter(values).items()}


def mutual(a, b):
    """In bits, of every number of a row of a (n, i) and every number of the same row of b (n, j):
    sum p(a, b) log p(a, b) / p(a) p(b)."""
    rows = zip(a.tolist(), b.tolist())
    pairs = [pair for row in rows for pair in itertools.product(*row)]
    of_a, of_b = (shares(numbers) for numbers in zip(*pairs))
    return sum(p * math.log2(p / of_a[x] / of_b[y]) for (x, y), p in shares(pairs).items())


def random_choices(rng, n, N, k):
    """(n, k) different units below N, the small numbers more often."""
    weights = 1 / np.arange(1, N + 1)
    return np.array([rng.choice(N, k, replace=False, p=weights / weights.sum()) for _ in range(n)])


@pytest.mark.parametrize("changes", [{}, {"ablation": "global"}, {"attn_unit": "head", "k_attn": 1},
                                     {"k_mlp": 5}])
def test_kept_units_are_the_masks_of_the_ablated_stream(changes, monkeypatch):
    model = tiny_model(**changes)
    found = kept_by(model)
    out = model.ablated(torch.from_numpy(letters(100, 1)[:40].astype(np.int64)).view(5, T))
    for kind, mask in (("attn", out.attn_mask), ("mlp", out.mlp_mask)):
        mask = mask.flatten(0, 1).transpose(0, 1)  # (L, n, N)
        assert found[kind].shape == (*mask.shape[:2], mask[0, 0].sum())
        again = torch.zeros_like(mask).scatter_(2, torch.from_numpy(found[kind].astype(int)), 1.0)
        assert torch.equal(again, mask)
    monkeypatch.setattr(activations, "TOKENS", 2 * T)  # in smaller batches
    again = kept_by(model)
    assert all(np.array_equal(found[kind], again[kind]) for kind in units.KINDS)


@pytest.mark.parametrize("k", [1, 3])
def test_numbers_of_a_layer_are_those_of_a_count_by_hand(k):
    rng = np.random.default_rng(k)
    tokens, kept = rng.integers(0, 12, 60), random_choices(rng, 60, 9, k)
    shuffled = rng.permutation(kept)
    facts = units.layer_facts(tokens, kept, shuffled, 11)
    rates = [(kept == unit).any(1).sum() / 60 for unit in range(11)]
    assert facts["rate"] == rates and facts["dead"] == rates.count(0) >= 2
    H = bits(shares(kept.ravel()).values())
    found, chance = mutual(tokens[:, None], kept), mutual(tokens[:, None], shuffled)
    share = (found - chance) / (H - math.log2(k) - chance)
    expected = {"entropy": H, "effective": 2**H, "counted_information": found,
                "shuffled_information": chance, "token_share": share,
                "mutual_information": share * (H - math.log2(k))}
    assert {name: facts[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 2])
def test_stability_is_that_of_all_pairs_of_places(k):
    rng = np.random.default_rng(k)
    tokens = rng.integers(0, 20, 40)
    kept = random_choices(rng, 40, 8, k) + tokens[:, None] % 3
    places = [i for i in range(40) if (tokens == tokens[i]).sum() > 1]
    assert len(places) < 40  # some tokens occur once

    def overlap(i, only):
        return np.mean([len({*kept[i]} & {*kept[j]}) / k for j in places if j != i and only[j]])

    alike = [overlap(i, tokens == tokens[i]) for i in places]
    any_two = np.mean([overlap(i, tokens >= 0) for i in places])
    joint = units.count_pairs(tokens[:, None], kept, 12)
    found = units.stability(np.bincount(tokens), joint, k)
    assert found == pytest.approx((np.mean(alike) - any_two) / (1 - any_two))
    once = units.count_pairs(np.arange(40)[:, None], kept, 12)
    assert units.stability(np.ones(40, int), once, k) is None


@pytest.mark.parametrize("k", [1, 2])
def test_dependence_is_that_of_all_pairs_of_units(k):
    rng = np.random.default_rng(k)
    kept = np.stack([random_choices(rng, 80, 6, k) for _ in range(3)])
    kept[1] = (kept[0] + (rng.random((80, 1)) < 0.3)) % 7  # mostly the same as layer 0
    shuffled = [rng.permutation(layer) for layer in kept]
    found = units.dependence(kept, shuffled, 7)
    for a, b in itertools.combinations(range(3), 2):
        largest = (mutual(kept[a], kept[a]) + mutual(kept[b], kept[b])) / 2
        chance = mutual(shuffled[a], shuffled[b])
        expected = (mutual(kept[a], kept[b]) - chance) / (largest - chance)
        assert found[a][b] == found[b][a] == pytest.approx(expected)
    assert np.diag(found).tolist() == [1] * 3 and found[0][1] > 0.3 > abs(found[0][2])


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("decided, error", [
    (0, {"abs": 0.01}), (0.3, {"rel": 0.06}), (0.7, {"rel": 0.06}), (1, {})])
def test_a_gate_that_the_token_decides_sometimes(decided, error, k):
    """Else any k of N units: information and stability have closed forms. Counted naively, the
    token would tell bits even of a choice that ignores it."""
    rng, n, N = np.random.default_rng(1), 60_000, 64
    weights = 1 / np.arange(5, 3005)
    tokens = rng.choice(3000, n, p=weights / weights.sum())
    usual, free = (rng.random((rows, N)).argsort(1)[:, :k] for rows in (3000, n))
    kept = np.where(rng.random((n, 1)) < decided, usual[tokens], free)
    use = units.use_of_units(tokens, {"mlp": kept[None]}, {"mlp": N}, seed=0)["mlp"]
    facts = {name: use[name][0] for name in use if name not in ("units", "kept")}
    H = facts["entropy"]
    other = (1 - decided) / N  # what a unit has by chance
    truth = H - bits([decided / k + other] * k + [other] * (N - k))
    assert facts["token_share"] == pytest.approx(truth / (H - math.log2(k)), **error)
    assert decided == 1 or facts["counted_information"] > 1.1 * truth + 0.1
    same = decided**2 + (1 - decided**2) * k / N  # overlap at two places with the same token
    any_two = np.square(facts["rate"]).sum() / k
    expected = (same - any_two) / (1 - any_two)
    assert facts["stability"] == pytest.approx(expected, abs=0.01 * (1 - decided) + 1e-9)


@pytest.mark.parametrize("k", [2, 3, 29])
def test_a_gate_that_always_keeps_the_same(k):
    kept = np.tile(np.arange(k) + 1, (1, 100, 1))
    use = units.use_of_units(np.arange(100) % 7, {"mlp": kept}, {"mlp": 64}, seed=0)
    found = use["mlp"]
    assert found["rate"] == [[0] + [1] * k + [0] * (63 - k)] and found["dead"] == [64 - k]
    assert found["entropy"] == pytest.approx([math.log2(k)]) and found["dependence"] == [[1]]
    assert found["token_share"] == found["mutual_information"] == found["stability"] == [None]
    assert not list(units.warnings(use))


def test_a_stopped_call_continues_and_its_result_is_printed(run, typed, stop_at):
    plain = make_run(run.parent / "plain", run.parents[1] / "data", tiny_model("none"))
    words = run, plain, "--windows=2", "--plot", run.parent / "all.png"
    calls = stop_at(units, "read_kept", 2)
    assert typed(units.main, *words)[0] == "stopped" and not (run / "units.json").exists()
    message, out = typed(units.main, *words)
    assert message is None and len(calls) == 3  # the trained model is read once
    assert not (plain / "units.json").exists()  # it has no gate
    result = json.loads((run / "units.json").read_text())
    tokens = letters(100, 1).reshape(-1, 4)[[0, 1, 12, 13]].ravel()  # of windows 0 and 6 of 12
    trained = tiny_model()
    torch.manual_seed(0)
    models = {"kinds": trained, "untrained": GPTNeo(trained.config).eval()}
    for name, model in models.items():
        kept = kept_by(model, (0, 48))
        expected = units.use_of_units(tokens, kept, {"attn": 8, "mlp": 32}, seed=0)
        assert result[name] == json.loads(json.dumps(expected))
    lines = out.splitlines()
    assert len(lines) == 6 + len(result["warnings"]) > 6
    assert "2 of 8" in lines[1] and "2 of 32" in lines[2] and ", untrained" in lines[3]
    assert f"{np.mean(result['kinds']['attn']['entropy']):.2f}" in lines[1]
    assert (run / "units.png").read_bytes() and (run.parent / "all.png").read_bytes()
    assert typed(units.main, *words) == (None, out)
    assert json.loads((run / "units.json").read_text()) == result
    _, by_layer = typed(units.main, run, "--windows=2", "--layers")
    assert len(by_layer.splitlines()) == len(lines) - 1 + 4 * (SIZE["n_layer"] - 1)
    assert "has ablation=none" in typed(units.main, plain)[0]
