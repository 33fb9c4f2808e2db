"""interp/table2.py: what it takes from the results of three experiments, joined over seeds; what it refuses.

    python -m pytest tests/test_table2.py
"""

import csv
import functools
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "interp")]
import table2
from eval import open_run
from interp.n2g import METRICS, subsampled
from interp.results import fingerprint, write_json
from test_eval import run, seeds, tiny, typed  # noqa: F401


@pytest.fixture
def call(typed):
    """table2.py with these words -> its exit message, what it printed."""
    return functools.partial(typed, table2.main)


def found(run, experiment, settings=0, **facts):
    """The result of an experiment, as far as Table 2 reads it."""
    write_json(run / f"{experiment}.json", {
        "run": str(run), "checkpoint": fingerprint(open_run(run).model), "step": 7, "settings": {"knob": settings},
        "command": f"interp/{experiment}.py somewhere", "date": "2026-01-01 00:00", **facts})


def graphs(value, pool=None):
    """What n2g.json says of all layers, or of one; every number another."""
    row = {"neurons": 8, "non_empty": 6, "entropy": 99.0, "diversity": 99, "out_degree_pooled": value + 0.5}
    for place, name in enumerate((*METRICS, "precision", "recall", "f1")):
        row |= {name: value + place} if name not in METRICS else {
            f"{name}_mean_all": value + place, f"{name}_mean_non_empty": value + place + 0.25}
    return row if pool is None else row | {"pool": pool}


POOLS = {" a": 4, "b": 2}, {"b": 1, "c": 1}


def found_graphs(run, value, pools=POOLS, **changes):
    layers = [{"layer": layer, **graphs(value + layer, pool)} for layer, pool in enumerate(pools)]
    found(run, "n2g", layers=layers, **{"all": graphs(value)}, **changes)


def found_scores(run, mean, name="explain", control=0.1, **changes):
    def model(mean):
        rows = [{"mean": mean and mean + layer, "random_mean": None, "layer": layer} for layer in range(2)]
        return {"layers": rows, "all": {"mean": mean, "random_mean": 0.2}}
    found(run, name, **model(mean), control=control and model(control), **changes)


def found_use(run, value, stability=(0.5, None)):
    kind = {"dead": [3, 4], "entropy": [value, value + 1], "token_share": [0.25, 0.75], "stability": list(stability)}
    found(run, "units", kinds={"attn": kind, "mlp": {**kind, "entropy": [1.0, 1.0]}}, warnings=["the text is short"])


def test_it_joins_the_experiments_over_seeds(run, call):
    first, second, plain = [*seeds(run, of=(1, 2)), *seeds(run, "plain", ablation="none", of=(1,))]
    for path, value in ((first, 1.0), (second, 2.0), (plain, 3.0)):
        found_graphs(path, value)
    found_scores(first, 0.5)
    found_scores(plain, None, control=None)
    found_use(first, 2.0)
    found_use(second, 4.0)
    message, out = call(first, second, plain)
    assert message is None
    graphs_part, scores_part, use_part, *_ = out.split("\n\n")
    head, local, baseline = graphs_part.splitlines()
    assert "density, all" in head and "out-degree, pooled" in head and "75.0%" in local
    assert "1.750 ± 0.707" in local and "1.500 ± 0.707" in local and "3.250" in baseline
    # what an experiment has not looked at, or could not say
    head, local, baseline = scores_part.splitlines()
    assert "0.500 (1 of 2)" in local and "0.100 (1 of 2)" in local and "language model" not in head
    assert baseline.split() == [str(plain), "baseline", "1", "-", "0.200", "-"]
    head, local, baseline = use_part.splitlines()[:3]
    assert "attention: entropy" in head and "3.50 ± 1.41" in local and "50.0% ± 0.0%" in local and "0.500 ± 0.000" in local
    assert set(baseline.split()[3:]) == {"-"}
    notes = out.splitlines()
    assert f"warning: {first}: the text is short" in notes and any(note.startswith("n2g: knob 0; entropy and") for note in notes)
    markdown = (run.parent / "table2.md").read_text(encoding="utf-8")
    assert markdown.count("| run | recipe | seeds |") == 3 and "1.750 ± 0.707" in markdown and "warning" in markdown
    with open(run.parent / "table2.csv", newline="") as file:
        local, baseline = csv.DictReader(file)
    assert local["density_mean_non_empty"] == "1.75" and local["mlp_entropy_sd"] == "0.0" and local["layer"] == ""
    assert baseline["attn_entropy"] == "" and baseline["f1"] == "10.0" and baseline["score"] == ""
    assert (run.parent / "table2.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(table2, "draw_table2", lambda table: b"png")


def test_a_row_a_layer(run, call, no_pictures):
    paths = [*seeds(run, of=(1, 2)), *seeds(run, "plain", ablation="none", of=(1,))]
    for path, value in zip(paths, (1.0, 2.0, 3.0)):
        found_graphs(path, value)
        found_scores(path, 0.5)
        found_use(path, value)
    message, out = call(*paths, "--layers", "--json")
    rows = json.loads(out)
    assert message is None and [(row["n"], row["layer"]) for row in rows] == [(2, 0), (2, 1), (1, 0), (1, 1)]
    assert [row["density_mean_all"] for row in rows] == [1.5, 2.5, 3.0, 4.0]
    assert [row["score"] for row in rows] == [0.5, 1.5] * 2 and rows[0]["score_control"] == 0.1
    assert [row["attn_entropy"] for row in rows] == [1.5, 2.5, 3.0, 4.0] and rows[1]["mlp_token_share"] == 0.75
    assert rows[0]["attn_stability"] == 0.5 and "attn_stability" not in rows[1]
    _, out = call(*paths, "--layers")
    assert "layer" in out.splitlines()[0] and out.count("the text is short") == 3  # once a run
    assert {path.name for path in run.parent.glob("table2*")} == {f"table2_layers.{end}" for end in ("md", "csv", "png")}


def test_entropy_and_diversity_are_of_equal_pools(run, call, no_pictures):
    first, second, third = seeds(run)
    pools = {" a": 10, "c": 5}, {"c": 3, "d": 2}
    found_graphs(first, 1.0, pools)
    found_graphs(second, 1.0)
    found_scores(third, 0.5)
    (row,) = json.loads(call(first, second, third, "--json")[1])
    whole = [Counter(pools[0]) + Counter(pools[1]), Counter(POOLS[0]) + Counter(POOLS[1])]
    expected = [subsampled(list(pool.values()), 8) for pool in whole]  # the smaller one has 8
    assert [(one["entropy"], one["diversity"]) for one in row["rows"][:2]] == [pytest.approx(pair) for pair in expected]
    assert "entropy" not in row["rows"][2] and row["entropy_n"] == 2
    layers = json.loads(call(first, second, "--layers", "--json")[1])
    assert layers[1]["rows"][0]["entropy"] == pytest.approx(subsampled([3, 2], 2)[0])
    found_graphs(second, 1.0, ({}, {}))  # no neuron has a graph
    (row,) = json.loads(call(first, second, "--json")[1])
    assert "entropy" not in row and row["f1"] == 8.0


def test_a_language_models_scores_stand_beside_the_tables(run, call, no_pictures):
    found_scores(run, 0.5)
    found_scores(run, 0.25, "explain_openai", control=None)
    (row,) = json.loads(call(run, "--json")[1])
    assert (row["score"], row["score_llm"], row["score_llm_random"]) == (0.5, 0.25, 0.2) and "score_llm_control" not in row


def test_layers_that_were_not_looked_at_have_no_numbers(run, call, no_pictures):
    found_graphs(run, 1.0, POOLS[:1])
    (run / "units.json").unlink(missing_ok=True)
    first, second = json.loads(call(run, "--layers", "--json")[1])
    assert "f1" in first and "f1" not in second


def test_results_of_other_settings_or_weights_are_refused(run, call):
    first, second = seeds(run, of=(1, 2))
    found_graphs(first, 1.0)
    found_graphs(second, 1.0, settings=3)
    assert f"{first} was measured with knob=0, not 3 as {second}" in call(first, second)[0]
    (second / "n2g.json").write_text((first / "n2g.json").read_text())
    assert "n2g.json is not of the checkpoint" in call(first, second)[0]
    assert not list(run.parent.glob("table2*"))


@pytest.mark.parametrize("name, facts", [
    ("n2g", {}), ("n2g", {"all": {}, "layers": []}), ("n2g", {"all": graphs(1.0), "layers": [{"layer": 0, "pool": {"a": "x"}}]}),
    ("n2g", {"all": {**graphs(1.0), "neurons": 0}, "layers": []}), ("n2g", {"all": {**graphs(1.0), "f1": "x"}, "layers": []}),
    ("explain", {"all": {"mean": 1}}), ("explain", {"all": {"mean": 1, "random_mean": 1}, "layers": [], "control": {"all": 5}}),
    ("units", {}), ("units", {"kinds": {"attn": {"dead": 5}}})])
def test_a_half_result_is_one_line(run, call, name, facts):
    found(run, name, **facts)
    assert call(run)[0] == f"error: {run / name}.json is damaged, or of an earlier version: delete it, and make it again"


def test_without_any_result_there_is_no_table(run, call):
    assert call(run)[0].startswith("error: no experiment has looked at any of these runs: first do so with interp/n2g.py")
    assert not list(run.parent.glob("table2*"))
