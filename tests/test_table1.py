"""interp/table1.py: the join over seeds, the paper's row beside ours, what it refuses.

    python -m pytest tests/test_table1.py
"""

import csv
import functools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "interp")]
import table1
from eval import DEFAULTS, open_run
from interp.common import averages, name_recipes
from interp.results import fingerprint, write_json
from model import load_checkpoint
from test_eval import run, seeds, tiny, typed  # noqa: F401


@pytest.fixture
def call(typed):
    """table1.py with these words -> its exit message, what it printed."""
    return functools.partial(typed, table1.main)


@pytest.fixture
def no_measuring(monkeypatch):
    monkeypatch.setattr(table1, "evaluate_task", lambda *_: pytest.fail("too late"))


def found(run, experiment, settings=0, warnings=(), **facts):
    """The result of an experiment, as far as Table 1 reads it."""
    write_json(run / f"{experiment}.json", {
        "run": str(run), "checkpoint": fingerprint(open_run(run).model), "step": 7,
        "settings": {"knob": settings, "heldout": 2},
        "command": f"interp/{experiment}.py somewhere", "date": "2026-01-01 00:00", "warnings": list(warnings), **facts})


def found_circuit(run, edges, more=(), ablated_exact=None, **changes):
    """more: further circuits, (edges, kl_heldout)."""
    circuits = [{"tau": 0.03, "order": "descending", "edges": edges, "connected": edges - 2, "kl_heldout": 0.5},
                {"tau": 0.03, "order": 0, "edges": 999, "connected": 999, "kl_heldout": 0.01}]
    circuits += [{"tau": 0.01, "order": "descending", "edges": size, "kl_heldout": kl} for size, kl in more]
    found(run, "acdc", circuits=circuits, ioi_exact=0.5, ablated_exact=ablated_exact, kl_corrupt_heldout=4.0, **changes)


PLACE = {"layer": 1, "site": "mlp_out"}


def found_saes(run, *rows, **changes):
    """rows: (l1, l0, ce_score)."""
    names = ("l1", "l0", "ce_score")
    saes = [{**PLACE, "seed": seed, **dict(zip(names, row))} for seed, row in enumerate(rows)]
    found(run, "sae", saes=saes, **changes)


def test_it_joins_the_experiments_over_seeds(run, call):
    paths = [*seeds(run, of=(1, 2)), *seeds(run, "plain", ablation="none", of=(1,))]
    for path, edges in zip(paths, (10, 13, 50)):
        found_circuit(path, edges)
    found_saes(paths[0], (5.0, 4.0, 0.6))
    found_saes(paths[2], (5.0, 7.5, None), warnings=["do not believe it"])
    message, out = call(*paths)
    assert message is None
    head, local, plain = out.splitlines()[:3]
    assert "11.5 ± 2.1" in local and "4.00 (1 of 2)" in local and "0.60 (1 of 2)" in local and "0.71" in local
    assert "50.0" in plain and "7.50" in plain and "79" in plain and "50%" in plain
    markdown = (run.parent / "table1.md").read_text(encoding="utf-8").splitlines()
    # settings and doubts go with it
    acdc, sae = (f"{name}: knob 0, heldout 2; {reading}" for name, reading in table1.READING.items())
    for note in (acdc, sae, f"warning: {paths[2]}: do not believe it"):
        assert note in out.splitlines() and note in markdown
    assert len(markdown) == 4 + 2 * 3
    assert [cell.strip() for cell in markdown[0].split("|")][4:6] == ["edges", "paper edges"]
    assert "| 11.5 ± 2.1 | 54 |" in markdown[2]
    with open(run.parent / "table1.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["edges"], first["edges_sd"][:6], first["paper edges"], first["seeds"]) == ("11.5", "2.1213", "54", "2")
    assert second["ce_score"] == "" and second["paper CE score"] == "0.63"
    assert (run.parent / "table1.png").read_bytes().startswith(b"\x89PNG")
    (row, _), again = json.loads(call(*paths, "--json")[1]), call(*run.parent.glob("*"))
    assert row["edges"] == 11.5 and row["rows"][1]["edges"] == 13
    assert again[0] is None and "tiny" in again[1]  # out/* finds the table of the last call too


def test_of_many_autoencoders_the_first_coefficient_counts_over_its_seeds(run, call):
    plain, = seeds(run, "plain", ablation="none", of=(1,))
    found_saes(run, (5.0, 4.0, 0.5), (9.0, 100.0, 0.9), (5.0, 7.0, 0.8))
    found_saes(plain, (5.0, 1.0, 0.5), (5.0, 2.0, None))
    local, baseline = json.loads(call(run, plain, "--json")[1])
    assert local["l0"] == 5.5 and local["ce_score"] == pytest.approx(0.65)
    assert baseline["l0"] == 1.5 and "ce_score" not in baseline
    found(run, "sae", saes=[{**PLACE, "seed": 1, "k": k, "l0": k, "ce_score": 0.5} for k in (8, 16)])
    assert json.loads(call(run, "--json")[1])[0]["l0"] == 8


def test_of_many_places_the_first_counts_and_at_one_l0_every_seed_is_interpolated(run):
    rows = [(1, "mlp_out", 7, 5.0, 4.0, 0.6), (1, "mlp_out", 7, 9.0, 2.25, 0.4), (1, "mlp_out", 8, 5.0, 6.0, 0.8),
            (1, "mlp_out", 8, 9.0, 1.5, 0.4), (2, "mlp_out", 7, 5.0, 50.0, 0.1), (1, "resid", 7, 5.0, 70.0, 0.1)]
    names = ("layer", "site", "seed", "l1", "l0", "ce_score")
    rows = [dict(zip(names, row)) for row in rows]
    numbers = table1.sae_numbers({"saes": rows})  # 3 lies half-way between 2.25 and 4, and 1.5 and 6, in log
    assert numbers == pytest.approx({"l0": 5.0, "ce_score": 0.7, "ce_score_at_l0": (0.5 + 0.6) / 2})
    rows[3]["l0"] = 3.5  # now the sweep of one seed does not reach 3
    assert table1.sae_numbers({"saes": rows}).keys() == {"l0", "ce_score"}


def test_edges_at_equal_kl_and_both_streams_answers(run, call):
    first, second = seeds(run, of=(1, 2))
    found_circuit(first, 10, more=[(30, 0.125)], ablated_exact=0.25)  # KL 4, 0.5 and 0.125 with 0, 10 and 30 edges
    found_circuit(second, 20, more=[(30, 0.0625)], ablated_exact=0.75)
    message, out = call(first, second)
    assert message is None
    head, line = out.splitlines()[:2]
    assert "edges for KL <= 0.3" in head and "by the ablated stream" in head and "50% ± 35%" in line
    with open(run.parent / "table1.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    expected = [10 + 20 * math.log(0.5 / 0.3) / math.log(4), 20 + 10 * math.log(0.5 / 0.3) / math.log(8)]
    assert float(row["edges_kl_0.3"]) == pytest.approx(sum(expected) / 2)
    assert float(row["edges_kl_0.3_sd"]) == pytest.approx(abs(expected[0] - expected[1]) / 2**0.5)
    assert float(row["edges_kl_1"]) == pytest.approx((10 + 20) / 2 * 2 / 3)  # two of the three halvings from 4 to 0.5
    assert f"{float(row['edges_kl_0.1']):.1f} (1 of 2)" in line  # the first reaches 0.125 only
    assert row["ablated_exact"] == "0.5" and row["ppl_ablated"]


def test_of_a_single_tau_no_edges_are_interpolated(run, call):
    found_circuit(run, 10)
    assert not {name for name in json.loads(call(run, "--json")[1])[0] if "edges_kl" in name}


# ---- the names of recipes, and the bargain


def names_of(*rows):
    configs = [{"n_layer": 8, "ablated_coeff": 1.0, "ramp_start": 0.0, "ramp_end": 0.0, **knobs} for *_, knobs in rows]
    defaults = DEFAULTS
    table = [{"ablation": ablation, "k_attn": k, "k_mlp": k, "gate": gate, "attn_unit": "dim", **trained}
             for (ablation, k, gate, _), trained in zip(rows, configs)]
    name_recipes(table, [defaults | trained for trained in configs])
    return [row["recipe"] for row in table]


def test_a_recipe_is_called_after_its_gate_its_ramp_and_what_the_others_do_not_have():
    ramp, plain = {"ramp_start": 0.3, "ramp_end": 0.8, "out": "a", "seed": 3}, {"out": "b"}
    assert names_of(("none", 0, "softmax", plain), ("local", 2, "softmax", plain), ("local", 2, "constant", ramp),
                    ("local", 2, "constant", {**ramp, "ablated_coeff": 0.1, "ramp_start": 0})) == [
        "baseline", "local k=2", "local k=2, constant, ramp 0.3 to 0.8",
        "local k=2, constant, ramp 0 to 0.8, ablated_coeff 0.1"]
    # what all have in common is not told, but for the gate and the ramp
    assert names_of(("local", 2, "constant", {**ramp, "n_layer": 4}), ("global", 1, "constant", {**ramp, "n_layer": 4})) == [
        "local k=2, constant, ramp 0.3 to 0.8", "global k=1, constant, ramp 0.3 to 0.8"]


def drawn(table, monkeypatch):
    """The panels of the bargain: their figure's axes."""
    figures = []
    monkeypatch.setattr(table1, "as_png", lambda figure: figures.append(figure) or b"png")
    assert table1.draw_bargain(table) == b"png"
    return figures[0]


def recipe_row(name, **numbers):
    """A row of these lists, an entry a seed; clean perplexities are 5, 6, ..."""
    rows = [{"ppl_clean": 5.0 + i, **dict(zip(numbers, values))} for i, values in enumerate(zip(*numbers.values()))]
    rows = rows or [{"ppl_clean": 5.0}]
    return {"recipe": name, "rows": rows, **averages(rows, ("ppl_clean", *numbers))}


def test_the_bargain_has_a_dot_a_seed_and_up_is_better(monkeypatch):
    table = [recipe_row("baseline"), recipe_row("ours", ppl_ablated=[8.0, 10.0], ce_score_at_l0=[0.5, 0.7]),
             recipe_row("theirs", ppl_ablated=[12.0])]
    figure = drawn(table, monkeypatch)
    score, ablated = figure.axes  # nobody has edges
    assert score.get_ylabel().startswith("CE score at L0 = 3") and not score.yaxis_inverted()
    assert ablated.get_ylabel() == "ablated perplexity" and ablated.yaxis_inverted()
    dots = [line.get_xydata().tolist() for line in ablated.lines if line.get_marker() == "."]
    assert dots == [[[5.0, 8.0], [6.0, 10.0]], [[5.0, 12.0]]]
    means = [container.lines[0].get_xydata().tolist() for container in ablated.containers]
    assert means == [[[5.5, 9.0]], [[5.0, 12.0]]]
    across, up = (bars.get_segments()[0] for bars in ablated.containers[0].lines[2])
    assert across[:, 0].tolist() == pytest.approx([5.5 - 0.5**0.5, 5.5 + 0.5**0.5])
    assert up[:, 1].tolist() == pytest.approx([9 - 2**0.5, 9 + 2**0.5])
    assert len([line for line in score.lines if line.get_linestyle() == ":"]) == 2  # without such a number
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == ["baseline", "ours", "theirs"]


def test_without_any_number_there_is_no_bargain(run, call):
    (plain,) = seeds(run, "plain", ablation="none", of=(1,))
    assert table1.draw_bargain([recipe_row("baseline")]) is None
    message, out = call(plain)
    assert message is None and "bargain.png" not in out and not (run.parent / "bargain.png").exists()
    assert "bargain.png" in call(plain, run)[1] and (run.parent / "bargain.png").read_bytes().startswith(b"\x89PNG")


def test_it_has_the_papers_row_for_the_papers_models_only(run, call):
    rows = {"dim": {}, "head": {"attn_unit": "head", "k_attn": 1, "k_mlp": 1}, "sigmoid": {"gate": "sigmoid"},
            "odd": {"k_mlp": 3}}
    paths = []
    for name, changes in rows.items():
        (path,) = seeds(run, name, of=(1,), **changes)
        checkpoint = load_checkpoint(path)
        checkpoint["config"] |= changes
        if name == "head":
            checkpoint["model"] = tiny(**changes).state_dict()
        torch.save(checkpoint, path / "best.pt")
        paths.append(path)
    message, out = call(*paths)
    assert message is None
    dim, head, sigmoid, odd = out.splitlines()[1:5]
    assert "6.55" in dim and "local k=1, heads" in head and "local k=2, sigmoid" in sigmoid and "local k=2,3" in odd
    # before the perplexity of the ablated stream, the last column, there are L1's
    assert dim.split()[-2] == "0.71" and [line.split()[-2] for line in (head, sigmoid, odd)] == ["-"] * 3


def test_it_refuses_what_does_not_belong_together(run, call, tmp_path, no_measuring):
    first, second = seeds(run, of=(1, 2))
    found_circuit(first, 1)
    found_circuit(second, 1, settings=3)
    assert "knob=0, not 3" in call(first, second)[0]
    checkpoint = load_checkpoint(first)
    checkpoint["model"]["lm_head.weight"] += 1
    torch.save(checkpoint, first / "best.pt")
    assert "with --force; it came from python interp/acdc.py somewhere" in call(first)[0]
    other = shutil.copytree(tmp_path / "data", tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"checksum": "def"}))
    checkpoint["train_config"]["data"], checkpoint["data"] = str(other), "def"
    torch.save(checkpoint, first / "best.pt")
    assert "other texts" in call(run, first)[0]


@pytest.mark.parametrize("name, facts", [
    ("acdc", {}), ("acdc", {"circuits": []}), ("acdc", {"circuits": [{"edges": 1, "connected": 1}], "ioi_exact": 0.5}),
    ("acdc", {"circuits": [{"edges": 1, "connected": 1, "order": "ascending"}], "ioi_exact": 0.5, "ablated_exact": 0.5}),
    ("acdc", {"circuits": [{"edges": 1, "connected": 1, "order": "ascending", "kl_heldout": "0"}], "ioi_exact": 0.5,
              "ablated_exact": None, "kl_corrupt_heldout": 1}),
    ("acdc", {"circuits": [{"edges": 1, "connected": 1}]}),
    ("acdc", {"circuits": [{"edges": "many", "connected": 1}], "ioi_exact": 1}), ("acdc", {"circuits": 5}),
    ("sae", {}), ("sae", {"saes": []}), ("sae", {"saes": [{"l1": 5, "l0": 1}]}), ("sae", {"saes": ["l1"]}),
    ("sae", {"saes": [{**PLACE, "seed": 1, "l1": 5, "l0": "1", "ce_score": 1}]}), ("sae", {"saes": [{"l0": 1, "ce_score": 1}]})])
def test_a_half_result_is_one_line(run, call, no_measuring, name, facts):
    found(run, name, **facts)
    assert call(run)[0] == f"error: {run / name}.json is damaged, or of an earlier version: delete it, and make it again"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checkpoint": 1, "settings": {}}', '{"checkpoint"'])
def test_a_damaged_result_is_one_line(run, call, no_measuring, text):
    (run / "acdc.json").write_text(text)
    message, _ = call(run)
    assert message.startswith("error: ") and "acdc.json is damaged: delete it" in message and "\n" not in message


@pytest.mark.parametrize("name", ["table1.md", "table1.csv", "table1.png", "bargain.png"])
def test_what_cannot_be_saved_is_found_out_at_once(run, call, no_measuring, name):
    (run.parent / name).mkdir()
    assert call(run)[0] == f"error: cannot write {run.parent / name}: there is a folder of that name"


def test_it_does_not_count_a_seed_twice(run, call, no_measuring):
    shutil.copy(run / "best.pt", run / "last.pt")
    assert "are the same run with the same seed" in call(run, run / "last.pt")[0]


def test_it_works_from_elsewhere(run, tmp_path):
    """As a user types it, in a process of its own."""
    done = subprocess.run([sys.executable, ROOT / "interp" / "table1.py", run], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "paper ppl" in done.stdout, done.stderr
