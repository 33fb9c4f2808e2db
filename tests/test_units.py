"""interp/units.py: every number against brute force, and against distributions whose numbers are known.

    python -m pytest tests/test_units.py
"""

import functools
import itertools
import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "interp")]
import interp.activations as activations
import units
from eval import open_run
from interp import tables
from interp.results import fingerprint
from model import GPTNeo, load_checkpoint, save_checkpoint
from prepare import UserError
from test_eval import EOT, T, V, run, seeds, split, tiny, typed  # noqa: F401

CPU = torch.device("cpu")


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(units, "draw_units", lambda *_: None)


@pytest.fixture
def call(typed):
    """units.py with these words -> its exit message, what it printed."""
    return functools.partial(typed, units.main)


def choices(model, starts=(0, 8, 16, 24, 32)):
    return units.read_choices(model, split(), np.array(starts), CPU)


def bits(probabilities):
    return -sum(p * math.log2(p) for p in probabilities if p > 0)


def shares(values):
    """{value: its share of them}."""
    values = list(values)
    return {value: count / len(values) for value, count in Counter(values).items()}


def counted(a, b):
    """Mutual information of two sequences as counted, in bits, a formula of its own: sum p(a, b) log p(a, b) / p(a) p(b)."""
    of_a, of_b, of_both = shares(a), shares(b), shares(zip(a, b))
    return sum(p * math.log2(p / of_a[x] / of_b[y]) for (x, y), p in of_both.items())


def random_choices(rng, n, N, k):
    """(n, k) different units under N, the small numbers more often."""
    weights = 1 / np.arange(1, N + 1)
    return np.array([rng.choice(N, k, replace=False, p=weights / weights.sum()) for _ in range(n)])


# ---- what the gate chooses


@pytest.mark.parametrize("changes", [{}, {"ablation": "global"}, {"attn_unit": "head", "k_attn": 1}, {"k_mlp": 5}])
def test_choices_are_the_masks_of_the_ablated_stream(changes):
    model = tiny(**changes)
    found = choices(model)
    windows = torch.from_numpy(split()[:40].astype(np.int64)).view(5, T)
    out = model.ablated(windows)
    assert found.tokens.tolist() == windows.flatten().tolist()
    for kind, mask in (("attn", out.attn_mask), ("mlp", out.mlp_mask)):
        n, L, N = mask.flatten(0, 1).shape
        assert found.kept[kind].shape == (L, n, mask[0, 0, 0].sum()) and found.kept[kind].dtype == np.uint8
        again = torch.zeros(L, n, N).scatter_(2, torch.from_numpy(found.kept[kind].astype(np.int64)), 1.0)
        assert torch.equal(again.transpose(0, 1), mask.flatten(0, 1))


def test_choices_do_not_depend_on_the_batch_size(monkeypatch):
    one = choices(tiny())
    monkeypatch.setattr(activations, "TOKENS", 2 * T)
    many = choices(tiny())
    assert (one.tokens == many.tokens).all() and all((one.kept[kind] == many.kept[kind]).all() for kind in units.KINDS)


# ---- the statistics, against brute force


@pytest.mark.parametrize("pairs", [1, 100, 2**24])  # at a time
@pytest.mark.parametrize("n", [7, 400])  # fewer and more pairs than there can be
def test_pairs_are_counted(n, pairs, monkeypatch):
    monkeypatch.setattr(units, "PAIRS", pairs)
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 30, (n, 2)), random_choices(rng, n, 10, 3)
    expected = Counter(pair for row in zip(a.tolist(), b.tolist()) for pair in itertools.product(*row))
    joint = units.count_pairs(a, b.astype(np.uint8), 10)
    assert dict(zip(zip(joint.a.tolist(), joint.b.tolist()), joint.counts.tolist())) == expected


@pytest.mark.parametrize("k", [1, 3])
def test_numbers_of_a_layer_are_those_of_a_count_by_hand(k):
    rng = np.random.default_rng(k)
    tokens, kept = rng.integers(0, 12, 60), random_choices(rng, 60, 9, k)
    shuffled = rng.permutation(kept)
    facts = units.layer_facts(tokens, kept, shuffled, 11)
    slots = [(int(token), int(unit)) for token, row in zip(tokens, kept) for unit in row]
    assert facts["rate"] == pytest.approx([sum(unit in row for row in kept) / 60 for unit in range(11)])
    assert facts["dead"] == sum(rate == 0 for rate in facts["rate"]) >= 2
    H = bits(shares(unit for _, unit in slots).values())
    assert (facts["entropy"], facts["effective"]) == pytest.approx((H, 2**H))
    found = counted(*zip(*slots))
    chance = counted([int(token) for token in tokens for _ in range(k)], shuffled.ravel().tolist())
    assert (facts["counted_information"], facts["shuffled_information"]) == pytest.approx((found, chance))
    share = (found - chance) / (H - math.log2(k) - chance)
    assert facts["token_share"] == pytest.approx(share) and facts["mutual_information"] == pytest.approx(share * (H - math.log2(k)))


@pytest.mark.parametrize("k", [1, 2])
def test_stability_is_that_of_all_pairs_of_places(k):
    rng = np.random.default_rng(k)
    tokens = rng.integers(0, 20, 40)
    kept = (random_choices(rng, 40, 8, k) + tokens[:, None] % 3).astype(int)
    places = [i for i in range(40) if (tokens == tokens[i]).sum() > 1]
    assert len(places) < 40  # some types come once

    def overlap(i, others):
        return np.mean([len({*kept[i]} & {*kept[j]}) / k for j in others if j != i])

    alike = np.mean([overlap(i, [j for j in places if tokens[j] == tokens[i]]) for i in places])
    any_two = np.mean([overlap(i, places) for i in places])
    joint = units.count_pairs(tokens[:, None], kept, 12)
    assert units.stability(tokens, joint, k) == pytest.approx((alike - any_two) / (1 - any_two))
    once = np.arange(40)
    assert units.stability(once, units.count_pairs(once[:, None], kept, 12), k) is None


@pytest.mark.parametrize("k", [1, 2])
def test_dependence_is_that_of_all_pairs_of_units(k):
    rng = np.random.default_rng(k)
    kept = np.stack([random_choices(rng, 80, 6, k) for _ in range(3)])
    kept[1] = (kept[0] + (rng.random((80, 1)) < 0.3)) % 7  # mostly the same as layer 0
    shuffled = [rng.permutation(layer) for layer in kept]

    def told(a, b):
        pairs = [pair for rows in zip(a.tolist(), b.tolist()) for pair in itertools.product(*rows)]
        return counted(*zip(*pairs))

    found = units.dependence(kept, shuffled, 7)
    for a, b in itertools.combinations(range(3), 2):
        most, chance = (told(kept[a], kept[a]) + told(kept[b], kept[b])) / 2, told(shuffled[a], shuffled[b])
        assert found[a][b] == found[b][a] == pytest.approx((told(kept[a], kept[b]) - chance) / (most - chance))
    assert [found[a][a] for a in range(3)] == [1.0] * 3 and found[0][1] > 0.3 > abs(found[0][2])


def test_an_overlap_is_counted_token_by_token_beside_what_rates_alone_give():
    one, other = choices(tiny()), choices(tiny("global"))
    found = units.overlap_of(one, other, units.units_of(tiny().config))
    for kind, per_layer in found.items():
        for layer, (A, B) in enumerate(zip(one.kept[kind].tolist(), other.kept[kind].tolist())):
            assert per_layer["overlap"][layer] == pytest.approx(np.mean([len({*a} & {*b}) / 2 for a, b in zip(A, B)]))
            # independent gates of these rates: any place of one with any place of the other
            anywhere = np.mean([len({*a} & {*b}) / 2 for a in A for b in B])
            assert per_layer["chance"][layer] == pytest.approx(anywhere)
    same = units.overlap_of(one, one, units.units_of(tiny().config))
    assert same["attn"]["overlap"] == same["mlp"]["overlap"] == [1.0, 1.0]


# ---- known distributions


def facts_of(tokens, kept, N, seed=0):
    found = units.use_of_units(units.Choices(tokens, {"mlp": kept[None]}), {"mlp": N}, seed)["mlp"]
    return {name: found[name][0] for name in found if name not in ("units", "kept")}


def zipf_tokens(rng, n, types=3000):
    weights = 1 / np.arange(5, types + 5)
    return rng.choice(types, n, p=weights / weights.sum())


@pytest.mark.parametrize("k", [1, 4])
def test_a_gate_that_ignores_the_token(k):
    """Counted naively, the token would tell bits of the choice: the text has 30,000 tokens of 3,000 types."""
    rng = np.random.default_rng(0)
    tokens = zipf_tokens(rng, 30_000)
    kept = rng.random((30_000, 64)).argsort(1)[:, :k]
    facts = facts_of(tokens, kept, 64)
    assert facts["entropy"] == pytest.approx(6, abs=0.01) and facts["effective"] == pytest.approx(64, abs=0.5)
    assert facts["counted_information"] > 0.5
    assert abs(facts["token_share"]) < 0.01 and abs(facts["mutual_information"]) < 0.03 and abs(facts["stability"]) < 0.01


@pytest.mark.parametrize("k", [1, 4])
def test_a_gate_that_the_token_decides(k):
    rng = np.random.default_rng(0)
    tokens = zipf_tokens(rng, 20_000)
    kept = rng.random((3000, 64)).argsort(1)[:, :k][tokens]
    facts = facts_of(tokens, kept, 64)
    assert facts["token_share"] == pytest.approx(1) and facts["stability"] == pytest.approx(1)
    assert facts["mutual_information"] == pytest.approx(facts["entropy"] - math.log2(k))


@pytest.mark.parametrize("decided", [0.3, 0.7])
def test_a_gate_that_the_token_decides_sometimes(decided):
    """With k = 1, else any of N units alike: information and stability have closed forms. Shuffling alone, without
    the second step of the adjustment, would lose much of the information; as counted there is too much."""
    rng, n, N = np.random.default_rng(1), 60_000, 64
    tokens = zipf_tokens(rng, n)
    kept = np.where(rng.random(n) < decided, tokens % N, rng.integers(0, N, n))[:, None]
    facts = facts_of(tokens, kept, N)
    own = decided + (1 - decided) / N
    truth = facts["entropy"] - bits([own] + [(1 - decided) / N] * (N - 1))
    assert facts["mutual_information"] == pytest.approx(truth, rel=0.06)
    assert facts["counted_information"] > 1.1 * truth > 1.3 * (facts["counted_information"] - facts["shuffled_information"])
    again = own**2 + (1 - own) ** 2 / (N - 1)  # two places of one type
    p = np.bincount(kept.ravel(), minlength=N) / n
    assert facts["stability"] == pytest.approx((again - p @ p) / (1 - p @ p), abs=0.01)


def test_a_gate_that_always_keeps_the_same():
    facts = facts_of(np.arange(50) % 7, np.full((50, 2), [3, 5]), 8)
    assert facts["rate"] == [0, 0, 0, 1, 0, 1, 0, 0] and facts["dead"] == 6
    assert facts["entropy"] == pytest.approx(1) and facts["effective"] == pytest.approx(2)
    # nothing is left to tell
    assert facts["token_share"] is facts["mutual_information"] is facts["stability"] is None
    assert facts["dependence"] == [1.0]


def test_a_text_is_not_too_short_for_a_gate_that_always_keeps_the_same():
    for k in range(1, 40):  # log k is rounded otherwise than an entropy is
        kept = np.tile(np.arange(k), (1, 100, 1))
        use = units.use_of_units(units.Choices(np.arange(100) % 7, {"mlp": kept}), {"mlp": 64}, 0)
        assert not list(units.warnings(use)) and use["mlp"]["token_share"] == [None]


@pytest.mark.parametrize("k", [1, 3])
def test_layers_that_choose_alike_or_independently(k):
    """Other names for the same choices are the same choices."""
    rng = np.random.default_rng(0)
    first, third = (rng.random((20_000, 32)).argsort(1)[:, :k] for _ in range(2))
    kept = np.stack([first, rng.permutation(32)[first], third])
    (_, alike, none), *_ = units.dependence(kept, [rng.permutation(layer) for layer in kept], 32)
    assert alike == pytest.approx(1) and abs(none) < 0.01
    same = np.zeros((2, 50, 1), dtype=int)
    assert units.dependence(same, same, 4)[0][1] is None


def test_the_first_gate_of_a_model_without_positions_is_decided_by_the_token():
    model = tiny()
    with torch.no_grad():
        model.transformer["wpe"].weight.zero_()
    found = units.use_of_units(choices(model), units.units_of(model.config), 0)
    for kind in units.KINDS:
        assert (found[kind]["token_share"][0], found[kind]["stability"][0]) == pytest.approx((1, 1))
        assert found[kind]["token_share"][1] < 0.99


# ---- the command line


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_result_is_written_once_and_says_what_was_found(run, call, monkeypatch):
    plain, = seeds(run, "plain", ablation="none", of=(1,))
    message, out = call(run, plain, "--windows=5", "--plot", run.parent / "all.png")
    assert message is None
    result = json.loads((run / "units.json").read_text())
    assert units.is_result(result) and result["settings"] == {"data": "abc", "windows": 5, "seed": 0}
    assert result["tokens"] == 5 * T and result["checkpoint"] == fingerprint(open_run(run).model)
    starts = activations.held_out_windows(split(), T, 5)
    expected = units.use_of_units(choices(tiny(), starts), {"attn": 8, "mlp": 32}, 0)
    assert result["kinds"] == json.loads(json.dumps(expected))
    assert result["untrained"] != result["kinds"]
    # one row of attention units, one of neurons, before and after training; a warning for each short layer
    lines = out.splitlines()
    assert [line.startswith(str(run)) for line in lines[:5]] == [False, True, True, True, True]
    assert "2 of 8" in lines[1] and "2 of 32" in lines[2] and ", untrained" in lines[3]
    assert f"{np.mean(expected['attn']['entropy']):.2f}" in lines[1] and "take more --windows" in out
    assert not (plain / "units.json").exists()
    assert (run / "units.png").read_bytes().startswith(b"\x89PNG") and (run.parent / "all.png").exists()
    before = contents(run)
    message, again = call(run, "--windows=5")
    assert message is None and again == out and contents(run) == before
    monkeypatch.setattr(units, "draw_units", lambda *_: None)
    message, by_layer = call(run, "--windows=5", "--layers")
    assert message is None and len(by_layer.splitlines()) == len(out.splitlines()) + 3
    assert "was made with windows=5, not 4: --force replaces it" in call(run, "--windows=4")[0]
    assert call(run, "--windows=4", "--force")[0] is None


def test_two_calls_find_the_same(run, call, no_pictures):
    call(run)
    first = json.loads((run / "units.json").read_text())
    (run / "units.json").unlink()
    call(run)
    again = json.loads((run / "units.json").read_text())
    assert first["kinds"] == again["kinds"] and first["untrained"] == again["untrained"]


def test_a_model_without_a_gate_is_one_line(run, call, capsys):
    plain, = seeds(run, "plain", ablation="none", of=(1,))
    message, _ = call(plain)
    assert message == f"error: {plain} has ablation=none, so there is no gate: give runs with local or global ablation"
    assert [path.name for path in plain.iterdir()] == ["best.pt"]
    units.gated_runs([str(plain), str(run)])
    assert f"{plain} has ablation=none, so there is no gate: left out" in capsys.readouterr().err


def test_two_checkpoints_are_compared(run, call, no_pictures):
    checkpoint = load_checkpoint(run)
    for name, weight in checkpoint["model"].items():
        weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    checkpoint["model"]["lm_head.weight"] = checkpoint["model"]["transformer.wte.weight"]
    torch.save(checkpoint, run / "last.pt")
    message, out = call(run, "--against", run / "last.pt")
    assert message is None and "overlap  chance" in out
    found = json.loads((run / "units_overlap.json").read_text())
    starts = activations.held_out_windows(split(), T, 1024)
    models = [open_run(path).model for path in (run, run / "last.pt")]
    expected = units.overlap_of(*(choices(model, starts) for model in models), units.units_of(models[0].config))
    assert found["kinds"] == expected and found["against"] == str(run / "last.pt") and 0.3 < expected["mlp"]["overlap"][0] < 1
    assert found["settings"]["against"] == fingerprint(models[1])
    other, = seeds(run, "other", of=(1,))  # the same weights as run
    assert "units_overlap.json was made with against=" in call(run, "--against", other)[0]


def move_gates(path, out):
    """A checkpoint with other gates, as training with the other weights frozen leaves it."""
    checkpoint = load_checkpoint(path)
    for name, weight in checkpoint["model"].items():
        if "_gate." in name:
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    torch.save(checkpoint, out)


def test_results_of_gates_that_were_trained_on_are_not_taken_for_theirs(run, call, no_pictures):
    last = run / "last.pt"
    move_gates(run / "best.pt", last)
    assert call(run, "--against", last)[0] is None
    move_gates(last, last)
    assert "units_overlap.json was made with gates that are no longer there: --force" in call(run, "--against", last)[0]
    move_gates(run / "best.pt", run / "best.pt")
    assert "units.json was made with gates that are no longer there: --force replaces it" in call(run)[0]
    with pytest.raises(UserError, match="is not of the checkpoint that .* has now"):
        tables.read_experiment("units", dict, open_run(run))
    assert call(run, "--against", last, "--force")[0] is None
    for name in ("units.json", "units_overlap.json"):  # results of earlier versions do not say of which gates they are
        found = json.loads((run / name).read_text())
        del found["gates"]
        (run / name).write_text(json.dumps(found))
    assert call(run, "--against", last)[0] is None and tables.read_experiment("units", dict, open_run(run))


@pytest.mark.parametrize("changes, expected", [
    ({"n_layer": 1}, "has n_layer=1, "), ({"k_mlp": 3}, "has k_mlp=3, "), ({"ablation": "none"}, "has ablation=none, "),
    ({"attn_unit": "head", "k_attn": 1}, "has attn_unit=head, "), ({"block_size": 4}, "has block_size=4, ")])
def test_only_gates_of_one_geometry_are_compared(run, call, changes, expected):
    other = shutil.copytree(run, run.parent / "other")
    checkpoint = load_checkpoint(run)
    kept = {name: checkpoint[name] for name in ("step", "tokenizer", "data", "train_config")}
    model = tiny(**changes)
    save_checkpoint(other / "best.pt", model.config, model.state_dict(), **kept)
    message, _ = call(run, "--against", other)
    assert expected in message and message.startswith("error: ") and not (run / "units.json").exists()


def test_ctrl_c_leaves_what_was_there(run, call, monkeypatch):
    before = contents(run)
    calls = []

    def interrupted(*words):
        calls.append(words)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return activations.windows_at(*words)

    monkeypatch.setattr(activations, "TOKENS", T)
    monkeypatch.setattr(units, "windows_at", interrupted)
    assert call(run)[0] == "stopped" and contents(run) == before


def test_untrained_models_are_those_that_training_begins_with():
    config = tiny().config
    torch.manual_seed(9)
    one, other = (units.untrained(config, seed) for seed in (3, 4))
    assert torch.initial_seed() == 9
    torch.manual_seed(3)
    weights = GPTNeo(config).state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in one.state_dict().items())
    assert fingerprint(one) != fingerprint(other)
