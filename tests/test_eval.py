"""eval.py: every number against a slower, plainer computation; the command line as a user types it.

    python -m pytest tests/test_eval.py
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config
import eval as evaluation
from model import GPTNeo, GPTNeoConfig, load_checkpoint, save_checkpoint
from prepare import UserError

EOT, V, T = 258, 259, 8


def tiny(ablation="local", **changes):
    torch.manual_seed(0)
    model = GPTNeo(GPTNeoConfig(**{**dict(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_embd=8, k_attn=2, k_mlp=2,
                                          ablation=ablation), **changes}))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.3)
    return model


def stories(count=9):
    rng = np.random.default_rng(0)
    return [rng.integers(97, 123, rng.integers(3, 14)).tolist() for _ in range(count)]


def split(count=9):
    return np.array([token for story in stories(count) for token in (*story, EOT)], dtype="<u2")


@pytest.fixture
def run(tmp_path):
    """A run folder and its data as train.py and prepare.py leave them."""
    data, out = tmp_path / "data", tmp_path / "out" / "tiny"
    data.mkdir()
    out.mkdir(parents=True)
    meta = {"tokenizer": {"name": "words", "pieces": ["ab", "ba"]}, "vocab_size": V, "eot": EOT, "checksum": "abc", "source": {}}
    for name in ("train", "val"):
        split().tofile(data / f"{name}.bin")
        meta[name] = {"tokens": len(split()), "stories": 9, "bytes": len(split()) - 9,
                      "sha256": hashlib.sha256(split().tobytes()).hexdigest()}
    (data / "meta.json").write_text(json.dumps(meta))
    save_checkpoint(out / "best.pt", tiny().config, tiny().state_dict(), step=7, tokenizer=meta["tokenizer"], data="abc",
                    train_config={"data": str(data), "seed": 5})
    lines = [{"step": s, "val_clean": 5.0 - s, "val_ablated": 5.5 - s} for s in (0, 1, 2)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


@pytest.fixture
def typed(monkeypatch, capsys):
    """A script's main() with these words, without the seconds that a new Python takes -> its exit
    message (None: all went well), what it printed."""
    def typed(main, *words):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        message = None
        try:
            config.cli(main)
        except SystemExit as stop:
            message = stop.code
        return message, capsys.readouterr().out
    return typed


@pytest.fixture
def call(typed):
    """eval.py with these words -> its exit message, what it printed."""
    return functools.partial(typed, evaluation.main)


# ---- the measurements


@pytest.mark.parametrize("ablation", ["local", "global", "none"])
def test_losses_are_those_of_a_token_by_token_count(ablation):
    """Every token once, each from its own window's tokens before it, the first after an end-of-text."""
    model, tokens = tiny(ablation).double(), split()
    result = evaluation.measure_split(model, tokens, EOT, len(tokens) - 9, batch_size=3)
    assert len(tokens) % T  # the last window is a short one
    stream = [EOT, *tokens.tolist()]
    for name in ("clean", "ablated")[: 1 if ablation == "none" else 2]:
        nats = []
        for i, target in enumerate(tokens.tolist()):
            window = torch.tensor([stream[i - i % T : i + 1]])
            logits = model(window) if name == "clean" else model.ablated(window).logits_ablated
            nats.append(-logits[0, -1].log_softmax(-1)[target].item())
        nats = np.array(nats)
        text = nats[tokens != EOT]
        assert result[f"loss_{name}"] == pytest.approx(nats.mean(), rel=1e-6)
        assert result[f"ppl_{name}"] == pytest.approx(math.exp(nats.mean()), rel=1e-6)
        assert result[f"bits_per_byte_{name}"] == pytest.approx(text.sum() / math.log(2) / len(text), rel=1e-6)
        # standard error over windows: jackknife of the mean loss, which it approximates
        windows = [nats[i : i + T] for i in range(0, len(nats), T)]
        left_out = np.array([(nats.sum() - w.sum()) / (len(nats) - len(w)) for w in windows])
        jackknife = math.sqrt(((left_out - left_out.mean()) ** 2).sum() * (len(windows) - 1) / len(windows))
        assert result[f"ppl_{name}_se"] == pytest.approx(math.exp(nats.mean()) * jackknife, rel=0.05)


def test_results_do_not_depend_on_the_batch_size():
    model, tokens = tiny(), split(40)
    one, many = (evaluation.measure_split(model, tokens, EOT, 100, batch_size=size) for size in (1, 17))
    assert one.keys() == many.keys()
    for name in one:
        np.testing.assert_allclose(one[name], many[name], rtol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"attn_unit": "head", "k_attn": 1}])
def test_unit_use_is_that_of_a_count_by_hand(changes):
    model, tokens = tiny(**changes), split()
    result = evaluation.measure_split(model, tokens, EOT, 100, batch_size=4)
    stream = [EOT, *tokens.tolist()]
    story, seen, rates = 0, {"attn": {}, "mlp": {}}, {"attn": {}, "mlp": {}}
    for i, target in enumerate(tokens.tolist()):
        out = model.ablated(torch.tensor([stream[i - i % T : i + 1]]))
        for kind, mask in (("attn", out.attn_mask), ("mlp", out.mlp_mask)):
            for unit in map(tuple, mask[0, -1].nonzero().tolist()):
                seen[kind].setdefault(story, set()).add(unit)
                rates[kind][unit] = rates[kind].get(unit, 0) + 1 / len(tokens)
        story += target == EOT
    for kind in seen:
        rate = np.array(result[f"{kind}_rate"])  # (L, N)
        assert result[f"{kind}_per_story"] == pytest.approx(np.mean([len(units) for units in seen[kind].values()]))
        assert result[f"{kind}_ever"] == pytest.approx(len(rates[kind]) / rate.size)
        for unit, value in rates[kind].items():
            assert rate[unit] == pytest.approx(value)


def test_l1_is_the_mean_over_the_model_as_transformer_lens_lays_it_out():
    """Their tensors in their shapes, centred as they say, built here one by one; 14,535,249 entries at the paper's size."""
    for model in (tiny("global"), GPTNeo(GPTNeoConfig(ablation="none"))):
        c = model.config
        L, C, H, D, vocabulary = c.n_layer, c.n_embd, c.n_head, c.n_embd // c.n_head, c.vocab_size
        p = {name: w.double().numpy() for name, w in model.state_dict().items()}
        W_E, W_pos = p["transformer.wte.weight"], p["transformer.wpe.weight"]
        W_U = W_E.T.copy()
        tensors = [W_E - W_E.mean(1, keepdims=True), W_pos - W_pos.mean(1, keepdims=True),
                   W_U - W_U.mean(1, keepdims=True), np.zeros(vocabulary)]
        for layer in range(L):
            name = f"transformer.h.{layer}"
            for kind in "qkv":
                tensors += [p[f"{name}.attn.attention.{kind}_proj.weight"].reshape(H, D, C).swapaxes(1, 2), np.zeros((H, D))]
            W_O = p[f"{name}.attn.attention.out_proj.weight"].T.reshape(H, D, C)
            b_O, W_out, b_out = (p[f"{name}.attn.attention.out_proj.bias"], p[f"{name}.mlp.c_proj.weight"].T,
                                 p[f"{name}.mlp.c_proj.bias"])
            tensors += [W_O - W_O.mean(-1, keepdims=True), b_O - b_O.mean(), p[f"{name}.mlp.c_fc.weight"].T,
                        p[f"{name}.mlp.c_fc.bias"], W_out - W_out.mean(-1, keepdims=True), b_out - b_out.mean()]
            tensors += [p[f"{name}.{ln}.{part}"] for ln in ("ln_1", "ln_2") for part in ("weight", "bias")]
        tensors += [p["transformer.ln_f.weight"], p["transformer.ln_f.bias"]]
        entries = np.concatenate([np.abs(w).ravel() for w in tensors])
        assert evaluation.l1_norms(model)["l1"] == pytest.approx(entries.mean(), rel=1e-9)
    assert len(entries) == 14_535_249


def test_plain_l1_counts_the_tied_embedding_once_and_no_gates():
    model = tiny()
    kept = {name: p for name, p in model.named_parameters() if "gate" not in name}
    norms = evaluation.l1_norms(model)
    assert norms["l1_all"] == pytest.approx(torch.cat([p.flatten() for p in kept.values()]).abs().mean().item(), rel=1e-5)
    blocks = torch.cat([p.flatten() for name, p in kept.items() if "wte" not in name and "wpe" not in name])
    assert norms["l1_blocks"] == pytest.approx(blocks.abs().mean().item(), rel=1e-5)


# ---- the command line


def test_table_sample_and_picture(run):
    """As a user types it, in a process of its own."""
    picture = run / "picture.png"
    done = subprocess.run([sys.executable, "eval.py", run, run / "best.pt", "--sample", "ab",
                           "--max_new_tokens", "5", "--plot", picture], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()[:3]
    assert "ppl clean" in head
    assert rows[0].split()[1:5] == ["data", "7", "local", "k=2"] and "±" in rows[0]
    assert "clean stream" in done.stdout and "ablated stream" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_is_the_table_for_machines(run, call):
    message, out = call(run, "--json")
    (row,) = json.loads(out)
    assert message is None
    assert row["step"] == 7 and row["seed"] == 5 and row["checksum"] == "abc" and row["tokens"] == len(split())
    assert np.array(row["mlp_rate"]).shape == (2, 32)
    assert row["ppl_clean"] == pytest.approx(evaluation.measure_split(tiny(), split(), EOT, 100)["ppl_clean"], rel=1e-5)


def seeds(run, name="tiny", of=(1, 2, 3), ablation="local", data="abc", **knobs):
    """Run folders of other weights beside the fixture's, the same but for the seed."""
    template = load_checkpoint(run)
    for seed in of:
        out = run.parent / f"{name}_seed{seed}"
        out.mkdir()
        model = tiny(ablation)
        for p in model.parameters():
            p.data.mul_(1 + seed / 50)
        save_checkpoint(out / "best.pt", model.config, model.state_dict(), step=10 * seed, tokenizer=template["tokenizer"],
                        data=data, optimizer={}, train_config={**template["train_config"], "seed": seed,
                                                               "ablation": ablation, "out": str(out), **knobs})
        yield out


def test_over_seeds_is_the_mean_and_the_spread(run, call):
    """Every number against numpy, from the rows of the single runs; ± is not their standard error."""
    paths = list(seeds(run))
    single, (row,) = (json.loads(call(*paths, "--json", *flag)[1]) for flag in ([], ["--over_seeds"]))
    assert row["n"] == 3 and row["seeds"] == [1, 2, 3] and row["rows"] == single
    numbers = {name.removesuffix("_sd") for name in row if name.endswith("_sd")}
    assert numbers == {"step", "loss_clean", "ppl_clean", "bits_per_byte_clean", "loss_ablated", "ppl_ablated",
                       "bits_per_byte_ablated", "l1", "l1_all", "l1_blocks", "attn_ever", "attn_per_story", "mlp_ever",
                       "mlp_per_story"}
    for name in numbers:
        values = [one[name] for one in single]
        assert (row[name], row[f"{name}_sd"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert row["step_sd"] == 10 and not {"ppl_clean_se", "mlp_rate", "seed"} & row.keys()
    message, out = call(*paths, "--over_seeds")
    head, line, note = out.splitlines()
    assert message is None and "standard deviation over the seeds" in note and "seeds" in head.split()
    assert line.startswith(f"{run.parent}/tiny_seed*")
    assert f" {row['ppl_clean']:.3f} ± {row['ppl_clean_sd']:.3f} " in line
    assert f" {row['l1']:.4f} ± {row['l1_sd']:.4f} " in line
    assert abs(row["ppl_clean_sd"] - single[0]["ppl_clean_se"]) > 1e-3


def test_over_seeds_joins_what_differs_in_seed_and_machine_only(run, call):
    groups = [[*seeds(run, of=(1, 2)), *seeds(run, "gpu", of=(4,), device="cuda", dtype="bfloat16", grad_accum=2)],
              list(seeds(run, "fast", of=(1, 2), learning_rate=0.1)), list(seeds(run, "other", of=(1, 2), data="abd")),
              list(seeds(run, "plain", ablation="none", of=(9,))),
              [*seeds(run, "tuned", of=(1,), init_from="out/base_seed1"), *seeds(run, "tuned", of=(2,), init_from="out/base_seed2")],
              list(seeds(run, "further", of=(1,), init_from="out/base_seed12"))]
    message, out = call(*(path for group in groups for path in group[:1]), *(path for group in groups for path in group[1:]),
                        "--over_seeds", "--json", "--data", run.parents[1] / "data")
    assert message is None
    assert [[one["run"] for one in row["rows"]] for row in json.loads(out)] == [list(map(str, group)) for group in groups]
    assert "init_from out/base_seed{seed}" in json.loads(out)[4]["recipe"]


def test_a_run_is_measured_on_the_data_it_was_trained_on(run, call, tmp_path, monkeypatch):
    """Not on another folder of that name, nor on what is there by now; but --data may name other texts."""
    checkpoint = load_checkpoint(run)
    checkpoint["train_config"]["data"] = "data"
    torch.save(checkpoint, run / "best.pt")
    elsewhere = tmp_path / "elsewhere"
    other = shutil.copytree(tmp_path / "data", elsewhere / "data")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"checksum": "def"}))
    monkeypatch.chdir(elsewhere)
    assert evaluation.find_data(evaluation.open_run(run))[0] == str(tmp_path / "data")
    assert evaluation.find_data(evaluation.open_run(run), "data") == ("data", meta | {"checksum": "def"})
    shutil.rmtree(tmp_path / "data")
    message, _ = call(run)
    assert message.startswith(f"error: data has changed since {run} was trained on it (checksum def, not abc): ")
    assert message.endswith("or say --data=data to measure on it all the same")
    assert call(run, "--data=data")[0] is None


def test_one_seed_has_no_spread(run, call):
    message, out = call(run, "--over_seeds", "--json")
    (row,) = json.loads(out)
    assert row["n"] == 1 and row["ppl_clean_sd"] is None and row["ppl_clean"] == row["rows"][0]["ppl_clean"]
    line = call(run, "--over_seeds")[1].splitlines()[1]
    assert line.startswith(f"{run} ") and f" {row['ppl_clean']:.3f} " in line and "±" not in line


def test_over_seeds_does_not_count_a_seed_twice(run, call, monkeypatch):
    first, *_ = seeds(run)
    monkeypatch.setattr(evaluation, "evaluate_run", lambda *_: pytest.fail("too late"))
    message, _ = call(first, run, first / "best.pt", "--over_seeds")
    assert message.startswith(f"error: {first} and {first / 'best.pt'} are the same run")


def test_same_seed_same_sample(run, call):
    first, second, other = (call(run, "--sample", "", "--max_new_tokens", 7, "--seed", seed)[1].splitlines()[2:]
                            for seed in (1, 1, 2))
    assert first == second and first[1:] != other[1:]


def test_a_mistake_is_found_before_anything_is_measured(run, call, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate_run", lambda *_: pytest.fail("too late"))
    (tmp_path / "not.pt").write_text("hello")
    (tmp_path / "a.png").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"tokenizer": {"name": "words", "pieces": ["xy", "yx"]}}))
    nowhere = tmp_path / "nowhere"
    for words, expected in [
        ((nowhere,), "no checkpoint at"),
        ((run, tmp_path / "not.pt"), "not.pt is damaged, or no file of this project"),
        ((run, "--data", nowhere), "no prepared data"),
        ((run, "--data="), "no prepared data"),
        ((run, "--data", other), "another tokenizer"),
        ((run, "--batch_size", "0"), "--batch_size=0"),
        ((run, "--batch_size", "many"), "--batch_size"),
        ((run, "--max_new_tokens", "0"), "--max_new_tokens=0 must be at least 1"),
        ((run, "--top_k", "0", "--sample", "a"), "top_k=0"),
        ((run, "--top_p", "0"), "--top_p=0.0"),
        ((run, "--top_p", "nan"), "--top_p=nan"),
        ((), "runs"),
        ((run, "--frobnicate"), "--frobnicate"),
        ((run, "--json", "--sample", "a"), "drop --sample"),
        ((run, "--temperature", "nan"), "--temperature=nan"),
        ((run, "--temperature", "-1"), "--temperature=-1.0"),
        ((run, "--temperature", "1e-320"), "must be at least 1e-06, or 0: greedy"),
        ((run, "--seed", 2**64), f"--seed={2**64} must be from 0 to {2**63 - 1:,}"),
        ((run, "--seed", "-1"), "--seed=-1 must be from 0"),
        ((run, "--device", "gpu"), "--device=gpu"),
        ((run, "--plot", nowhere / "a.png"), f"cannot write {nowhere / 'a.png'}: No such file or directory"),
        ((run, "--plot", "/proc/a.png"), "cannot write /proc/a.png"),
        ((run, "--plot", tmp_path / "a.png"), "a.png: there is a folder of that name"),
        ((run, "--plot", tmp_path / ("a" * 300 + ".png")), "File name too long"),
        ((run, "--plot", "a.gif"), "--plot=a.gif must end in"),
        ((run, "--plot="), "--plot= must end in"),
    ]:
        message, _ = call(*words)
        assert expected in str(message) and str(message).startswith("error: ") and "\n" not in str(message), words


@pytest.mark.parametrize("knob, value", [
    ("--temperature", "1e-6"), ("--temperature", "1e300"), ("--seed", 2**63 - 1), ("--top_k", 10**9), ("--top_p", 1e-6)])
def test_the_limits_of_sampling_can_be_sampled_at(run, call, knob, value):
    message, out = call(run, "--sample", "ab", "--max_new_tokens", 3, knob, value)
    assert message is None and "ablated stream" in out


@pytest.mark.parametrize("text", ['{"step": 1}', "[1]", '{"step": 1, "val_clean": "x", "val_ablated": 1}', '{"step": 1, "val'])
def test_damaged_curves_are_found_before_anything_is_measured(run, call, monkeypatch, text):
    monkeypatch.setattr(evaluation, "evaluate_run", lambda *_: pytest.fail("too late"))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(text)
    assert f"{run / 'metrics.jsonl'} is damaged" in call(run, "--plot", run / "a.png")[0]


@pytest.mark.parametrize("changes", [
    {"step": None}, {"step": "7"}, {"tokenizer": "gpt2"}, {"data": 5}, {"train_config": []},
    {"train_config": {"data": "data"}}, {"train_config": {"seed": 1}}, {"train_config": {"data": 1, "seed": 1}}])
def test_a_checkpoint_of_another_program_is_one_line(run, call, changes):
    torch.save({**load_checkpoint(run), **changes}, run / "best.pt")
    message, _ = call(run)
    assert message.startswith(f"error: {run} was not written by train.py: it has no ")


# ---- where the data lie


def with_data(run, data):
    """The same run, as if it had been trained with --data=..."""
    checkpoint = load_checkpoint(run)
    checkpoint["train_config"]["data"] = str(data)
    torch.save(checkpoint, run / "best.pt")
    return run


def test_relative_data_are_found_here_and_in_the_runs_project(run, tmp_path):
    with_data(run, "data")
    for folder, path, expected in [
        (tmp_path, "out/tiny", "data"),
        (tmp_path / "out", "tiny", str(tmp_path / "data")),
        (run, ".", str(tmp_path / "data")),
        (run, "best.pt", str(tmp_path / "data")),
        ("/", str(run), str(tmp_path / "data")),
    ]:
        with contextlib.chdir(folder):
            assert evaluation.find_data(evaluation.open_run(path))[0] == expected
    (tmp_path / "out" / "data").symlink_to(tmp_path / "data")  # the nearest one counts
    with contextlib.chdir("/"):
        assert evaluation.find_data(evaluation.open_run(run))[0] == str(tmp_path / "out" / "data")
        with pytest.raises(UserError, match="no prepared data in nowhere"):
            evaluation.find_data(evaluation.open_run(with_data(run, "nowhere")))
        assert evaluation.find_data(evaluation.open_run(run), tmp_path / "data")[0] == str(tmp_path / "data")


# ---- where the output goes


def shell(command, **environment):
    """A line of bash that fails if any of its programs does -> exit code, stdout, stderr."""
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd="/", capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    return done.returncode, done.stdout.decode("ascii", "replace"), done.stderr.decode()


def test_an_output_that_is_not_utf_8_prints_plus_minus_as_text(run, tmp_path):
    """From / too, where the run's relative data do not lie."""
    command = shlex.join([sys.executable, str(ROOT / "eval.py"), str(with_data(run, "data"))])
    code, out, err = shell(command, PYTHONIOENCODING="ascii")
    assert code == 0 and " +- " in out.splitlines()[1] and err == ""
    code, out, err = shell(command, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert code == 0 and " +- " in out.splitlines()[1] and err == ""


@pytest.mark.parametrize("ending", ["| true", "> /dev/full"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_takes_nothing_is_one_line(run, ending, unbuffered):
    command = shlex.join([sys.executable, str(ROOT / "eval.py"), str(run)])
    code, out, err = shell(f"{command} {ending}", PYTHONUNBUFFERED=unbuffered)
    assert code == 1 and out == ""
    assert err.startswith("error: cannot write the output: ") and err.count("\n") == 1
