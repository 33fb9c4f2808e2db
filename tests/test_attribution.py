"""Circuits by attribution (--method eap) against hooks on the model and naive passes."""

import json
import random
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from test_circuits import LENGTHS, OWN, circuit_of, pairs, run, tiny  # noqa: F401

from interp import circuits
from interp.activations import Site
from interp.graph import Dest


def tokens_of(near=False):
    """Prompts of several lengths; near: the corrupt ones have the tokens of `neighbours`."""
    clean, corrupt, lengths = pairs(LENGTHS, 12)
    corrupt = torch.where(clean > 0, clean + 11, 0) if near else corrupt
    return circuits.Tokens(clean, corrupt, lengths, torch.tensor([1, 2, 3, 4]),
                           torch.tensor([5, 6, 7, 8]))


def neighbours(model, distance):
    """The model in which tokens 12 to 22 are embedded close to 1 to 11."""
    embeddings = model.lm_head.weight.data
    embeddings[12:] = embeddings[1:12] + distance * torch.randn_like(embeddings[12:])
    return model


def patched(model, tokens):
    return circuit_of(model, tokens[:3]).model


def hooked(model, tokens, keep):
    """The mean logit difference of the GPTNeo itself, prompt by prompt and without padding, when
    all units but keep, a set of (node, unit), have the values of the corrupt prompt."""
    c, sites, masks, differences = model.config, [], [], []
    for number in range(c.n_layer):
        first = 1 + number * (c.n_head + 1)
        heads = [(first + head, unit) for head in range(c.n_head)
                 for unit in range(c.n_embd // c.n_head)]
        neurons = [(first + c.n_head, unit) for unit in range(4 * c.n_embd)]
        for site, names in (("attn_act", heads), ("mlp_act", neurons)):
            sites.append(Site(model, number, site))
            masks.append(torch.tensor([name in keep for name in names]))
    for clean, other, length, answer, wrong in zip(*tokens):
        corrupt = [site.read(other[None, -length:]) for site in sites]
        with ExitStack() as hooks:
            for site, mask, old in zip(sites, masks, corrupt):
                hooks.enter_context(site.hook(partial(torch.where, mask, other=old)))
            found = model(clean[None, -length:])[0, -1]
        differences.append(found[answer] - found[wrong])
    return torch.stack(differences).mean().item()


def metric_of(model, tokens):
    return lambda end: circuits.logit_difference(model, end, tokens).mean().item()


@torch.no_grad()
@pytest.mark.parametrize("share", [0, 0.05, 0.4, 0.9, 1])
def test_circuits_of_units_are_those_of_the_model_with_hooks(share):
    model, tokens = tiny(attention_layers="local,global", window_size=4), tokens_of()
    fast, rng = patched(model, tokens), random.Random(3)
    kept = {(node, unit) for node, units in circuits.record(fast, fast.clean[0]).items()
            if not isinstance(node, Dest)
            for unit in range(units.size(-1)) if rng.random() < share}
    got = metric_of(fast, tokens)(circuits.unit_circuits(fast)(kept))
    assert got == pytest.approx(hooked(model, tokens, kept), abs=1e-10)


def test_a_score_is_the_effect_of_its_edge_or_unit_where_the_model_is_linear():
    """Between prompts that are almost the same, each edge and each unit is removed alone."""
    model, tokens = neighbours(tiny(), 1e-6), tokens_of(near=True)
    fast = patched(model, tokens)
    scores, metric = circuits.attribute(fast, tokens), metric_of(fast, tokens)
    full = metric(fast.clean_residual[-1])
    for level, found in scores.items():
        run_circuit, names = circuits.CIRCUITS[level](fast), {*found}
        effect = {name: metric(run_circuit(names - {name})) - full for name in found}
        largest = max(map(abs, effect.values()))
        assert largest > 0
        assert found == pytest.approx(effect, abs=1e-4 * largest)


def test_scores_of_the_edges_out_of_the_start_add_up_to_the_whole_effect():
    """Integrated gradients are complete; few points on the path come close."""
    model, tokens = tiny(), tokens_of()
    fast, metric = patched(model, tokens), metric_of(patched(model, tokens), tokens)
    effect = metric(fast.corrupt_residual[-1]) - metric(fast.clean_residual[-1])
    for points, error in ((100, 1e-3), (5, 0.2)):
        path = [(point + 0.5) / points for point in range(points)]
        scores = circuits.attribute(fast, tokens, path)["edges"]
        total = sum(score for edge, score in scores.items() if edge.source == 0)
        assert total == pytest.approx(effect, abs=error * abs(effect))
    assert circuits.PATH == pytest.approx(path)


def test_areas_sizes_and_overlaps_by_hand():
    heights = {1: 0.5, 2: 0.5, 5: 0.9, 10: 1.0}
    found = circuits.faithfulness(heights.__getitem__, 10)
    assert found["curve"] == [[1, 2, 5, 10], [0.5, 0.5, 0.9, 1.0]]
    assert found["cpr"] == pytest.approx(0.1 * 0.25 + 0.1 * 0.5 + 0.3 * 0.7 + 0.5 * 0.95)
    assert found["cmd"] == pytest.approx(0.1 * 0.75 + 0.1 * 0.5 + 0.3 * 0.3 + 0.5 * 0.05)
    assert circuits.sufficient_size(lambda n: n / 100, 100) == 82  # ... 68, 75, 82: steps of 10 %
    assert circuits.sufficient_size(lambda n: 0, 20) == 20
    ranking = [*range(30)]
    assert circuits.overlap(ranking, [1, 2, 0, *ranking[3:]]) == 1
    assert circuits.overlap(ranking, [1, 9, 0, *ranking[3:]]) == 2 / 4
    assert circuits.best_first({"a": -3, "b": 1, "c": 2}) == ["a", "c", "b"]


@pytest.mark.parametrize("verdict, knows", [("does not know", 2), ("no effect", 0)])
def test_a_model_without_an_effect_gets_no_numbers(typed, run, monkeypatch, verdict, knows):
    monkeypatch.setattr(circuits, "KNOWS", knows)
    monkeypatch.setattr(circuits, "LEAST_EFFECT", 1e9)
    message, out = typed(circuits.main, run, "--method=eap", "--device=cpu", "--count=4",
                         "--task=names")
    rows = json.loads((run / "eap.json").read_text())["rows"]
    assert message is None and [row["level"] for row in rows] == ["edges", "units"]
    assert out.count(verdict) == 2 and not {"size", "cpr"} & rows[0].keys()
    assert not (run / "eap.png").exists()


@pytest.fixture
def every_model_knows(monkeypatch):
    monkeypatch.setattr(circuits, "KNOWS", 0)
    monkeypatch.setattr(circuits, "LEAST_EFFECT", -1e9)


def test_numbers_are_means_over_three_sets_of_prompts(typed, run, monkeypatch, every_model_knows):
    def area(seed):
        words = ("--method=eap", "--device=cpu", "--count=4", "--task=names", "--level=units")
        assert typed(circuits.main, run, *words, f"--seed={seed}", "--force")[0] is None
        row, = json.loads((run / "eap.json").read_text())["rows"]
        return row["cpr"]

    mean = area(0)  # of the prompts of seeds 0, 1, 2
    monkeypatch.setattr(circuits, "SETS", 1)
    areas = [area(seed) for seed in range(3)]
    assert mean == pytest.approx(sum(areas) / 3) and len({*areas}) == 3


def test_an_interrupted_command_ends_with_the_same_result(
        typed, run, stop_at, monkeypatch, every_model_knows):
    monkeypatch.setattr(circuits, "SETS", 1)
    words = (run, "--method=eap", "--device=cpu", "--count=4")
    message, out = typed(circuits.main, *words)
    whole = json.loads((run / "eap.json").read_text())["rows"]
    assert message is None and {row["task"] for row in whole} == {*circuits.TASKS}
    assert (run / "eap.png").read_bytes()[:4] == b"\x89PNG" and "f_random" in out
    assert {"size", "f_random", "cpr", "cmd", "cpr_random", "jaccard", "curve"} <= whole[0].keys()
    (run / "eap.json").unlink()
    stop_at(circuits.Result, "save", 3)  # of the last task
    assert typed(circuits.main, *words)[0] == "stopped" and not (run / "eap.json").exists()
    assert typed(circuits.main, *words)[0] is None
    assert json.loads((run / "eap.json").read_text())["rows"] == whole


def test_prompts_of_ones_own_need_some_to_hold_out(typed, run, tmp_path, every_model_knows):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(OWN * 2))
    words = (run, "--device=cpu", f"--prompts={path}")
    message, out = typed(circuits.main, *words)
    assert message is None and "heldout" not in out  # acdc can do without
    words += ("--method=eap",)
    message, _ = typed(circuits.main, *words)
    assert "has 4 prompts, and --count=64 of them are scored: lower --count" in message
    assert typed(circuits.main, *words, "--count=2", "--level=units")[0] is None
    row, = json.loads((run / "eap.json").read_text())["rows"]
    assert row["level"] == "units" and row["total"] == 8 + 32
