"""interp/tables.py: what it takes from the results, the means over seeds, the paper's numbers.

    python -m pytest tests/test_tables.py
"""

import math
import re
import shutil
import statistics
from collections import Counter
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from conftest import make_data, make_run, tiny_model

from eval import measure_run, open_runs
from interp import tables
from interp.results import digests, result_path, write_json
from model import load_checkpoint

PLACE = {"layer": 1, "site": "mlp_out"}


@pytest.fixture
def make(tmp_path):
    """make(name, ...) -> run folders out/NAME_seed1, ... of one recipe, on the same data."""
    make_data(tmp_path / "data")

    def make_runs(name="local", seeds=(1, 2), ablation="local", data="data", **changes):
        model = tiny_model(ablation, **changes)
        return [make_run(tmp_path / "out" / f"{name}_seed{seed}", tmp_path / data, model, seed=seed)
                for seed in seeds]

    return make_runs


def found(run, experiment, knob=0, **facts):
    """Write the result of an experiment, as far as the tables read it."""
    write_json(result_path(run, f"{experiment}.json"), {
        "settings": {"knob": knob}, **digests(load_checkpoint(run)["model"]), **facts})


def found_circuit(run, edges, edges_at_kl=(None, None, None), exact=0.5, knob=0):
    found(run, "acdc", knob, circuits=[{"edges": edges, "connected": edges - 2}, {"edges": 999}],
          edges_at_kl=dict(zip(("0.1", "0.3", "1"), edges_at_kl)), exact=exact)


def found_saes(run, saes, nats=None, score=None, **more):
    """saes: (l1, l0, ce_score) at the first place."""
    rows = [{**PLACE, "seed": seed, **dict(zip(("l1", "l0", "ce_score"), numbers))}
            for seed, numbers in enumerate(saes)]
    places = [{**PLACE, "nats_lost": nats, "ce_score": score}, {"nats_lost": 99, "ce_score": 99}]
    found(run, "sae", saes=[*rows, {**rows[0], "layer": 2, "l0": 999}], at_l0={"places": places},
          **more)


def found_units(run, names, pronouns=None):
    """None: a task that the model does not know."""
    rows = [{"task": "names", "level": "edges", "size": 999}, {"task": "names", "level": "units"},
            {"task": "pronouns", "level": "units"}]
    for row, size in zip(rows[1:], (names, pronouns)):
        row |= {} if size is None else {"size": size}
    found(run, "eap", rows=rows)


def found_unlearning(run, retain, siblings):
    costs = {"fisher": {"retain": retain, "siblings": siblings},
             "logits": {"retain": 0.0, "siblings": None}}
    found(run, "unlearn", mean=costs | {"chance": {"retain": 999, "siblings": 999}})


def graphs(value, **more):
    """What n2g.json says of all layers, or of one; every number another."""
    numbers = {name: value + place for place, name in enumerate(tables.GRAPHS)}
    return numbers | {"neurons": 8, "non_empty": 6, "types": {}, **more}


def found_graphs(run, value, pools=({" a": 4, "b": 2}, {"b": 1, "c": 1})):
    layers = [graphs(value + layer, layer=layer, pool=pool) for layer, pool in enumerate(pools)]
    found(run, "n2g", **{"all": graphs(value)}, layers=layers)


def found_scores(run, mean, name="explain", control=None):
    layers = [{"layer": layer, "mean": mean + layer} for layer in range(2)]
    found(run, name, layers=layers, control=control, **{"all": {"mean": mean, "random_mean": 0.2}})


def found_use(run, value):
    kind = {"dead": [3, 4], "entropy": [value, value + 1], "token_share": [0.25, 0.75],
            "stability": [0.5, None]}
    found(run, "units", kinds={"attn": kind, "mlp": kind | {"entropy": [1.0, 1.0]}})


@pytest.fixture
def call(typed, tmp_path):
    """call(*words) -> what tables.py printed, and its .csv files."""
    def run_tables(*words):
        message, out = typed(tables.main, *words)
        assert message is None
        return out, {path.stem: pd.read_csv(path) for path in (tmp_path / "out").glob("*.csv")}

    return run_tables


# ---- Table 1


def test_table_1_joins_experiments_over_seeds(make, call, tmp_path):
    first, second, plain = make(seeds=(1, 2)) + make("plain", (1,), "none")
    found_circuit(first, 10, (None, 5.0, 2.0))
    found_circuit(second, 13, (9.0, 8.0, 4.0))
    found_circuit(plain, 50, exact=1.0)
    found_units(first, 80.0)
    found_units(second, 90.0, 50.0)
    found_unlearning(first, 0.005, 0.25)
    found_unlearning(second, None, None)
    found_saes(first, [(5.0, 4.0, 0.5), (9.0, 100.0, 0.9), (5.0, 7.0, 0.75)], 1.25, 0.5)
    found_saes(plain, [(5.0, 7.5, None), (5.0, 8.5, 0.5)], warnings=["do not believe it"])
    out, files = call(first, second, plain)
    local, base = files["table1"].to_dict("records")
    assert (local["n"], local["run"]) == (2, f"{tmp_path}/out/local_seed*")
    assert (local["edges"], local["edges_sd"]) == (11.5, statistics.stdev([10, 13]))
    assert (local["edges for KL <= 0.1"], local["edges for KL <= 0.1_n"]) == (9, 1)
    assert (local["answers exact"], base["answers exact"]) == (0.5, 1)
    assert (local["units for names"], local["units for names_n"]) == (85, 2)
    assert (local["units for pronouns"], local["units for pronouns_n"]) == (50, 1)
    assert (local["unlearning, retain"], local["unlearning, siblings_n"]) == (0.005, 1)
    assert local["logits edit, retain"] == 0 and "logits edit, siblings" not in local
    # of the first place: means over its two seeds for the first coefficient, and at L0 = 3
    assert (local["SAE L0"], local["CE score"]) == (5.5, 0.625)
    assert (local["nats lost at L0 = 3"], local["CE score at L0 = 3"]) == (1.25, 0.5)
    assert base["SAE L0"] == 8 and math.isnan(base["CE score"])  # one of its seeds has none
    measured = measure_run(*open_runs([str(first)]), batch_size=3, device="cpu")
    assert local["ppl_clean"] == pytest.approx(measured["ppl_clean"])
    assert (local["paper edges"], base["paper CE score"], base["paper l1"]) == (54, 0.63, 0.44)

    assert f"warning: {plain}: do not believe it\n" in out
    assert "settings of acdc: {'knob': 0}\n" in out
    assert "| 11.5 ± 2.1 | 54 |" in (tmp_path / "out" / "table1.md").read_text()
    assert "no results for table2" in out and not list(tmp_path.glob("out/table2*"))
    call(*(tmp_path / "out").iterdir())  # out/* finds the tables of the last call, too


def test_the_papers_numbers_stand_beside_its_models_only(make, call):
    changes = {"same": {}, "heads": {"attn_unit": "head", "k_attn": 1, "k_mlp": 1},
               "sigmoid": {"gate": "sigmoid"}, "odd": {"k_mlp": 3}}
    _, files = call(*[make(name, (1,), **knobs)[0] for name, knobs in changes.items()])
    assert files["table1"]["paper ppl_clean"].fillna(0).tolist() == [6.55, 0, 0, 0]
    assert files["table1"]["differs"].fillna("").tolist() == [
        "", "attn_unit=head", "gate=sigmoid", ""]


def test_the_tradeoff_has_means_of_seeds_and_hollow_marks_where_some_lack_it(monkeypatch):
    figures = []
    monkeypatch.setattr(tables, "save_figure", lambda path, figure: figures.append(figure))
    name = "edges for KL <= 0.3"
    frame = pd.DataFrame({"k_mlp": [1, 1, 2, 2], "ppl_clean": [5.0, 7.0, 5.0, 9.0],
                          name: [1.0, 2.0, 4.0, None], "ppl_ablated": 8.0})
    tables.draw_tradeoff("x.png", frame, pd.DataFrame({"run": ["$a$", "b"], name: 1.0}), "title")
    (axes,) = figures[0].axes  # nobody has the other two
    marks = [bars.lines[0] for bars in axes.containers]
    assert [mark.get_xydata().tolist() for mark in marks] == [[[6, 1.5]], [[5, 4]]]
    assert [mark.get_markerfacecolor() for mark in marks] == ["C0", "none"]
    assert figures[0].legends[0].get_texts()[0].get_text() == r"\$a\$"


# ---- Table 2


def test_table_2_has_three_parts(make, call):
    first, second, plain = make(seeds=(1, 2)) + make("plain", (1,), "none")
    for run, value in ((first, 1.0), (second, 2.0), (plain, 3.0)):
        found_graphs(run, value)
    found_scores(first, 0.5, control={"layers": [], "all": {"mean": 0.1}})
    found_scores(second, 0.25, "explain_openai")
    found_use(first, 2.0)
    found_use(second, 4.0)
    _, files = call(first, second, plain)
    local, base = files["table2"].to_dict("records")
    assert (local["density_mean_non_empty"], base["f1"]) == (1.5 + 1, 3 + 16)
    assert (local["with_graph"], local["density_mean_all_sd"]) == (0.75, statistics.stdev([1, 2]))
    assert (local["score"], local["score_random"], local["score_control"]) == (0.5, 0.2, 0.1)
    assert local["llm_score"] == 0.25 and math.isnan(base["score"])
    assert (local["attn_entropy"], local["mlp_dead"], local["mlp_stability"]) == (3.5, 3.5, 0.5)
    assert "llm_score_control" not in local and math.isnan(base["attn_dead"])


def test_layers_are_rows_and_nothing_is_measured(make, call, monkeypatch):
    monkeypatch.setattr(tables, "measure_run", lambda *_: pytest.fail("not needed"))
    runs = make(seeds=(1, 2)) + make("plain", (1,), "none")
    for run, value in zip(runs, (1.0, 2.0, 3.0)):
        found_graphs(run, value)
        found_scores(run, 0.5)
        found_use(run, value)
    _, files = call(*runs, "--layers")
    table = files["table2_layers"]  # of three layers the results have two
    assert list(zip(table["layer"], table["n"])) == [(0, 2), (0, 1), (1, 2), (1, 1), (2, 2), (2, 1)]
    assert table["f1"].tolist()[:4] == [17.5, 19, 18.5, 20] and table["f1"].isna().sum() == 2
    assert table["score"].tolist()[:4] == [0.5, 0.5, 1.5, 1.5]
    assert table["attn_entropy"].tolist()[:4] == [1.5, 3, 2.5, 4]
    assert table["mlp_stability"].tolist()[0] == 0.5 and table["mlp_stability"].isna().sum() == 4


def test_entropy_and_diversity_are_means_over_all_subsets_of_a_pool():
    pool, size = "aaaabbc", 3
    entropies, kinds = [], []
    for drawn in combinations(pool, size):
        shares = [count / size for count in Counter(drawn).values()]
        entropies.append(-sum(share * math.log2(share) for share in shares))
        kinds.append(len(shares))
    expected = statistics.mean(entropies), statistics.mean(kinds)
    assert tables.subsampled([4, 2, 1], size) == pytest.approx(expected)


def test_pools_are_compared_at_equal_size(make):
    runs = open_runs(map(str, make(seeds=(1,)) + make("plain", (1,), "none")))
    found_graphs(runs[0].path, 1.0, ({" a": 10, "c": 5}, {"c": 3, "d": 2}))
    found_graphs(runs[1].path, 1.0)
    found, _ = tables.read_experiments(runs, tables.EXPERIMENTS2)
    for layer, counts in ((0, ([10, 5], [4, 2])), (None, ([10, 8, 2], [4, 3, 1]))):
        expected = [tables.subsampled(one, sum(counts[1])) for one in counts]  # the smaller pool
        numbers = tables.numbers_of(runs, found, layer)[["entropy", "diversity"]]
        assert numbers.values == pytest.approx(np.array(expected))
    found_graphs(runs[1].path, 1.0, ({}, {}))  # no neuron has a graph
    numbers = tables.numbers_of(runs, tables.read_experiments(runs, tables.EXPERIMENTS2)[0])
    assert "entropy" not in numbers and numbers["f1"].tolist() == [17, 17]


def test_what_does_not_belong_together_is_refused_before_it_is_measured(
        make, typed, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "measure_run", lambda *_: pytest.fail("too late"))
    first, second = make(seeds=(1, 2))
    found(first, "acdc", circuits=[{"edges": 1}], edges_at_kl={})  # of an older version
    assert "acdc.json has no 'connected'" in typed(tables.main, first)[0]
    found_circuit(first, 1)
    found_circuit(second, 1, knob=3)
    assert "was made with knob=0, not 3" in typed(tables.main, first, second)[0]
    shutil.copytree(first, tmp_path / "again")
    assert "same run with the same seed" in typed(tables.main, first, tmp_path / "again")[0]
    make_data(tmp_path / "other", train=400)
    (other,) = make("other", (1,), data="other")
    assert "different data" in typed(tables.main, first, other)[0]
    assert not list(tmp_path.glob("*/table*"))


def test_names_that_markdown_and_matplotlib_would_read(make, call, tmp_path):
    (run,) = make("_a|b$x$", (1,))
    call(run)
    line = (tmp_path / "out" / "table1.md").read_text().splitlines()[2]
    (cell,) = re.findall(r"^\| (.*?) \| local", line)
    assert cell == str(run).replace("|", r"\|").replace("$", r"\$")
