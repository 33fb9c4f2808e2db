"""eval.py: every number against a slower, plainer computation; the command as a user types it."""

import csv
import functools
import io
import json
import math
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import EOT, T, letters, make_data, make_run, tiny_model
from matplotlib.figure import Figure

import eval as evaluation
from model import GPTNeo, GPTNeoConfig, load_checkpoint

TOKENS = letters(100, 1)  # of the validation split of `run`


@pytest.fixture
def run(run):
    """With metrics.jsonl, as train.py leaves it."""
    lines = [{"step": s, "val_clean": 5.0 - s, "val_ablated": 5.5 - s} for s in (0, 1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def call(typed):
    return functools.partial(typed, evaluation.main)


def seeds(run, name="tiny", of=(1, 2, 3), ablation="local", data="data", **knobs):
    """Run folders of other weights beside the fixture's, the same but for the seed."""
    for seed in of:
        model, out = tiny_model(ablation), run.parent / f"{name}_seed{seed}"
        for p in model.parameters():
            p.data.mul_(1 + seed / 50)
        knobs |= {"seed": seed, "out": str(out)}
        yield make_run(out, run.parents[1] / data, model, step=10 * seed, **knobs)


# ---- the measurements


@pytest.mark.parametrize("ablation", ["local", "global", "none"])
def test_losses_are_those_of_a_token_by_token_count(ablation):
    """Each token from the tokens of its window before it, the first after an end-of-text."""
    model, tokens = tiny_model(ablation).double(), TOKENS
    letters = (tokens != EOT).sum()
    result = evaluation.measure_split(model, tokens, EOT, letters, batch_size=3)
    assert len(tokens) % T  # the last window is a short one
    stream = [EOT, *tokens.tolist()]
    for name in ("clean", "ablated")[: 1 if ablation == "none" else 2]:
        nats = []
        for i, target in enumerate(tokens.tolist()):
            window = torch.tensor([stream[i - i % T : i + 1]])
            logits = model(window) if name == "clean" else model.ablated(window).logits_ablated
            nats.append(-logits[0, -1].log_softmax(-1)[target].item())
        nats = np.array(nats)
        ppl = math.exp(nats.mean())
        bits = nats[tokens != EOT].mean() / math.log(2)  # a letter is a byte
        assert result[f"loss_{name}"] == pytest.approx(nats.mean(), rel=1e-6)
        assert result[f"ppl_{name}"] == pytest.approx(ppl, rel=1e-6)
        assert result[f"bits_per_byte_{name}"] == pytest.approx(bits, rel=1e-6)
        # jackknife of the mean loss over windows, which the standard error approximates
        windows = [nats[i : i + T] for i in range(0, len(nats), T)]
        left_out = np.array([(nats.sum() - w.sum()) / (len(nats) - len(w)) for w in windows])
        error = ppl * left_out.std() * math.sqrt(len(windows) - 1)
        assert result[f"ppl_{name}_se"] == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("changes", [{}, {"attn_unit": "head", "k_attn": 1}])
def test_unit_use_is_that_of_a_count_by_hand(changes):
    model, tokens = tiny_model(**changes), TOKENS
    result = evaluation.measure_split(model, tokens, EOT, 100, batch_size=4)
    stream = [EOT, *tokens.tolist()]
    story, seen, rates = 0, {"attn": {}, "mlp": {}}, {"attn": {}, "mlp": {}}
    for i, target in enumerate(tokens):
        out = model.ablated(torch.tensor([stream[i - i % T : i + 1]]))
        for kind, mask in (("attn", out.attn_mask), ("mlp", out.mlp_mask)):
            for unit in map(tuple, mask[0, -1].nonzero().tolist()):
                seen[kind].setdefault(story, set()).add(unit)
                rates[kind][unit] = rates[kind].get(unit, 0) + 1 / len(tokens)
        story += target == EOT
    for kind in seen:
        rate = np.array(result[f"{kind}_rate"])  # (L, N)
        per_story = np.mean([len(units) for units in seen[kind].values()])
        assert result[f"{kind}_per_story"] == pytest.approx(per_story)
        assert result[f"{kind}_ever"] == pytest.approx(len(rates[kind]) / rate.size)
        assert {unit: rate[unit] for unit in rates[kind]} == pytest.approx(rates[kind])


def test_l1_is_the_mean_over_the_model_as_transformer_lens_lays_it_out():
    """Their tensors in their shapes, one by one; 14,535,249 entries at the paper's size."""
    for model in (tiny_model("global"), GPTNeo(GPTNeoConfig(ablation="none"))):
        c = model.config
        C, H, D = c.n_embd, c.n_head, c.n_embd // c.n_head
        p = {name: w.double().numpy() for name, w in model.state_dict().items()}
        W_E, W_pos = p["transformer.wte.weight"], p["transformer.wpe.weight"]
        tensors = [W_E - W_E.mean(1, keepdims=True), W_pos - W_pos.mean(1, keepdims=True),
                   W_E.T - W_E.T.mean(1, keepdims=True), np.zeros(c.vocab_size)]
        for layer in range(c.n_layer):
            name = f"transformer.h.{layer}"
            for kind in "qkv":
                W = p[f"{name}.attn.attention.{kind}_proj.weight"]
                tensors += [W.reshape(H, D, C).swapaxes(1, 2), np.zeros((H, D))]
            W_O = p[f"{name}.attn.attention.out_proj.weight"].T.reshape(H, D, C)
            b_O = p[f"{name}.attn.attention.out_proj.bias"]
            W_out, b_out = p[f"{name}.mlp.c_proj.weight"].T, p[f"{name}.mlp.c_proj.bias"]
            for written in (W_O, b_O, W_out, b_out):
                tensors.append(written - written.mean(-1, keepdims=True))
            tensors += [p[f"{name}.mlp.c_fc.weight"].T, p[f"{name}.mlp.c_fc.bias"]]
            for norm in ("ln_1", "ln_2"):
                tensors += [p[f"{name}.{norm}.weight"], p[f"{name}.{norm}.bias"]]
        tensors += [p["transformer.ln_f.weight"], p["transformer.ln_f.bias"]]
        entries = np.concatenate([np.abs(w).ravel() for w in tensors])
        norms = evaluation.l1_norms(model)
        assert norms["l1"] == pytest.approx(entries.mean(), rel=1e-9)
        own = {name: w for name, w in p.items() if "gate" not in name and "lm_head" not in name}
        blocks = [w for name, w in own.items() if ".h." in name or "ln_f" in name]
        for name, counted in ("l1_all", list(own.values())), ("l1_blocks", blocks):
            mean = np.concatenate([np.abs(w).ravel() for w in counted]).mean()
            assert norms[name] == pytest.approx(mean, rel=1e-9)
    assert len(entries) == 14_535_249


# ---- tables


def test_table_json_and_csv_have_the_same_numbers(run, call):
    expected = evaluation.measure_split(tiny_model(), TOKENS, EOT, 100)
    (row,) = json.loads(call(run, "--json")[1])
    assert (row["step"], row["seed"], row["checksum"], row["run"]) == (
        7, 5, "data-525-100", str(run))
    assert np.array(row["mlp_rate"]).shape == (3, 32)
    for name, value in expected.items():
        np.testing.assert_allclose(row[name], value, rtol=1e-12)
    (line,) = csv.DictReader(io.StringIO(call(run, "--csv")[1]))
    assert float(line["ppl_clean"]) == row["ppl_clean"] and line["ablation"] == "local"
    _, text = call(run, run / "metrics.jsonl", run.parent)[1].splitlines()  # as out/* has them
    assert text.split()[:6] == [str(run), "data", "7", "local", "2", "2"]
    assert f" {row['ppl_clean']:.3f} ± {row['ppl_clean_se']:.3f} " in text


def test_over_seeds_is_the_mean_and_the_spread(run, call):
    paths = list(seeds(run))
    single = json.loads(call(*paths, "--json")[1])
    (row,) = json.loads(call(*paths, "--json", "--over_seeds")[1])
    assert row["n"] == 3 and row["seeds"] == [1, 2, 3] and row["step_sd"] == 10
    measured = [name for name in row if f"{name}_sd" in row]
    assert {"ppl_ablated", "bits_per_byte_clean", "l1_blocks", "mlp_per_story"} <= {*measured}
    for name in measured:
        values = [one[name] for one in single]
        assert row[name] == pytest.approx(np.mean(values))
        assert row[f"{name}_sd"] == pytest.approx(np.std(values, ddof=1))
    _, line, note = call(*paths, "--over_seeds")[1].splitlines()
    assert "over the seeds" in note and line.startswith(f"{run.parent}/tiny_seed*")
    assert f" {row['ppl_clean']:.3f} ± {row['ppl_clean_sd']:.3f} " in line
    assert "±" not in call(paths[0], "--over_seeds")[1].splitlines()[1]


def test_over_seeds_joins_what_differs_in_seed_and_machine_only(run, call):
    groups = {
        "": [*seeds(run, of=(1, 2)), *seeds(run, "gpu", of=(4,), device="cuda", grad_accum=2)],
        "removed_knobs={'freeze': 'base'}": [*seeds(run, "frozen", of=(1, 2), freeze="base")],
        " ": [*seeds(run, "plain", ablation="none", of=(9,))],
        "init_from=out/a_seed{seed}": [*seeds(run, "a", of=(1,), init_from="out/a_seed1"),
                                       *seeds(run, "a", of=(2,), init_from="out/a_seed2")],
        "init_from=out/a_seed12": [*seeds(run, "b", of=(1,), init_from="out/a_seed12")]}
    paths = [path for group in groups.values() for path in group]
    rows = json.loads(call(*paths, "--over_seeds", "--json")[1])
    assert [row["n"] for row in rows] == [len(group) for group in groups.values()]
    assert [row["differs"] for row in rows] == [text.strip() for text in groups]
    line = call(*paths, "--over_seeds")[1].splitlines()[3]
    assert line.split()[3:6] == ["none", "0", "0"] and " - " in line
    make_data(run.parents[1] / "other")
    other = [*seeds(run, "other", of=(7,), data="other")]
    words = (paths[0], *other, "--over_seeds", "--json", "--data", run.parents[1] / "data")
    differs = [row["differs"] for row in json.loads(call(*words)[1])]
    assert differs == ["trained_on=data-525-100", "trained_on=other-525-100"]


# ---- samples, plots, and where the data lie


def test_samples_are_the_prompt_and_what_follows(run, call):
    """No end-of-text is shown, neither the one that an empty prompt stands for nor the last."""
    for prompt in ("", "ab"):
        words = (run, "--sample", prompt, "--max_new_tokens", 60, "--temperature", 2)
        first, second, other = [call(*words, "--seed", seed)[1] for seed in (1, 1, 2)]
        assert first == second != other and "endoftext" not in first
        assert f"clean stream\n{prompt}" in first and "ablated stream" in first


def test_plot_names_runs_of_any_name(run, call, monkeypatch):
    """$ begins no formula and _ hides no name. A run without metrics.jsonl has no curve."""
    monkeypatch.chdir(run.parent)
    for name in ("$x_{$", "_y$$", "z"):
        shutil.copytree("tiny", name)
    Path("z", "metrics.jsonl").unlink()
    with mock.patch.object(Figure, "savefig", autospec=True) as saved:
        assert call("$x_{$", "_y$$", "z", "--plot", "a.png")[0] is None
    saved.call_args.args[0].canvas.draw()  # a formula that is none would raise here
    loss, attn, mlp = saved.call_args.args[0].axes
    shown = [text.get_text() for text in loss.get_legend().get_texts()]
    assert shown == [r"\$x_{\$", r" _y\$\$"]
    assert [line.get_ydata().tolist() for line in loss.lines[:2]] == [[4, 3], [4.5, 3.5]]
    assert len(attn.lines) == len(mlp.lines) == 9  # three layers of three runs


def test_data_are_found_here_and_above_the_run(run, call, tmp_path, monkeypatch):
    """The nearest folder with the run's own texts; --data may name others."""
    torch.save({**load_checkpoint(run), "train_config": {"data": "data"}}, run / "best.pt")
    make_data(tmp_path / "elsewhere" / "data", val=99)
    monkeypatch.chdir(tmp_path / "elsewhere")
    opened = evaluation.open_run(run)
    assert evaluation.with_data(opened).folder == tmp_path / "data"
    assert evaluation.with_data(opened, "data").folder == Path("data")
    shutil.rmtree(tmp_path / "data")
    assert "changed since training" in call(run)[0]
    assert call(run, "--data=data")[0] is None
