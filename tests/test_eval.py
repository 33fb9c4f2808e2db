"""eval.py: every number against a slower, plainer computation; the command line as a user types it."""

import csv
import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import config
import eval as evaluation
from model import GPTNeo, GPTNeoConfig, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
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
def call(monkeypatch, capsys):
    """eval.py with these words, without the seconds that a new Python takes -> its exit message, what it printed."""
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
        message = None
        try:
            config.cli(evaluation.main)
        except SystemExit as stop:
            message = stop.code
        return message, capsys.readouterr().out
    return call


# ---- the measurements


@pytest.mark.parametrize("ablation", ["local", "global", "none"])
def test_losses_are_those_of_a_token_by_token_count(ablation):
    """Every token once, each from its own window's tokens before it, the first after an end-of-text."""
    model, tokens = tiny(ablation).double(), split()
    result = evaluation.measure(model, tokens, EOT, len(tokens) - 9, batch_size=3)
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
    one, many = (evaluation.measure(model, tokens, EOT, 100, batch_size=size) for size in (1, 17))
    assert one.keys() == many.keys()
    for name in one:
        np.testing.assert_allclose(one[name], many[name], rtol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"attn_unit": "head", "k_attn": 1}])
def test_unit_use_is_that_of_a_count_by_hand(changes):
    model, tokens = tiny(**changes), split()
    result = evaluation.measure(model, tokens, EOT, 100, batch_size=4)
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
    assert row["ppl_clean"] == pytest.approx(evaluation.measure(tiny(), split(), EOT, 100)["ppl_clean"], rel=1e-5)


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
              list(seeds(run, "plain", ablation="none", of=(9,)))]
    message, out = call(*(path for group in groups for path in group[:1]), *(path for group in groups for path in group[1:]),
                        "--over_seeds", "--json")
    assert message is None
    assert [[one["run"] for one in row["rows"]] for row in json.loads(out)] == [list(map(str, group)) for group in groups]


def test_one_seed_has_no_spread(run, call):
    message, out = call(run, "--over_seeds", "--json")
    (row,) = json.loads(out)
    assert row["n"] == 1 and row["ppl_clean_sd"] is None and row["ppl_clean"] == row["rows"][0]["ppl_clean"]
    line = call(run, "--over_seeds")[1].splitlines()[1]
    assert line.startswith(f"{run} ") and f" {row['ppl_clean']:.3f} " in line and "±" not in line


def test_over_seeds_does_not_count_a_seed_twice(run, call, monkeypatch):
    first, *_ = seeds(run)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("too late"))
    message, _ = call(first, run, first / "best.pt", "--over_seeds")
    assert message.startswith(f"error: {first} and {first / 'best.pt'} are the same run")


def found(run, experiment, settings=0, **numbers):
    """The result of an experiment of interp/, as far as Table 1 reads it."""
    evaluation.write_json(run / f"{experiment}.json", {
        "run": str(run), "checkpoint": evaluation.fingerprint(load_checkpoint(run)), "settings": {"knob": settings}, "circuits": [],
        "command": f"interp/{experiment}.py somewhere", "warnings": [], **numbers})


def test_table_1_joins_the_experiments_over_seeds(run, call):
    paths = [*seeds(run, of=(1, 2)), *seeds(run, "plain", ablation="none", of=(1,))]
    for path, edges, l0 in zip(paths, (10, 13, 50), (4.0, None, 7.5)):
        found(path, "acdc", edges=edges, connected=edges - 2, ioi_exact=0.5)
        if l0:
            found(path, "sae", l0=l0, ce_score=0.6 if l0 == 4 else None, warnings=["do not believe it"] if l0 == 7.5 else [])
    message, out = call(*paths, "--table1")
    assert message is None
    head, local, plain = out.splitlines()[:3]
    assert "11.5 ± 2.1" in local and "4.00 (1 of 2)" in local and "0.60 (1 of 2)" in local and "0.71" in local
    assert "50.0" in plain and "7.50" in plain and "79" in plain and "50%" in plain
    markdown = (run.parent / "table1.md").read_text(encoding="utf-8").splitlines()
    for note in ("acdc: knob 0; of a list, the first", f"warning: {paths[2]}: do not believe it"):  # settings and doubts go with it
        assert note in out.splitlines() and note in markdown
    assert len(markdown) == 4 + 2 * 3 and [cell.strip() for cell in markdown[0].split("|")][4:6] == ["edges", "paper edges"]
    assert "| 11.5 ± 2.1 | 54 |" in markdown[2]
    with open(run.parent / "table1.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["edges"], first["edges_sd"][:6], first["paper edges"], first["seeds"]) == ("11.5", "2.1213", "54", "2")
    assert second["ce_score"] == "" and second["paper CE score"] == "0.63"
    assert (run.parent / "table1.png").read_bytes().startswith(b"\x89PNG")
    (row, _), again = json.loads(call(*paths, "--table1", "--json")[1]), call(*run.parent.glob("*"), "--table1")
    assert row["edges"] == 11.5 and row["rows"][1]["edges"] == 13
    assert again[0] is None and "tiny" in again[1]  # out/* finds the table of the last call too


def test_table_1_has_the_papers_row_for_the_papers_models_only(run, call):
    rows = {"dim": {}, "head": {"attn_unit": "head", "k_attn": 1, "k_mlp": 1}, "sigmoid": {"gate": "sigmoid"}, "odd": {"k_mlp": 3}}
    paths = []
    for name, changes in rows.items():
        (path,) = seeds(run, name, of=(1,), **changes)
        checkpoint = load_checkpoint(path)
        checkpoint["config"] |= changes
        if name == "head":
            checkpoint["model"] = tiny(**changes).state_dict()
        torch.save(checkpoint, path / "best.pt")
        paths.append(path)
    message, out = call(*paths, "--table1")
    assert message is None
    dim, head, sigmoid, odd = out.splitlines()[1:5]
    assert "6.55" in dim and "local k=1, heads" in head and "local k=2, sigmoid" in sigmoid and "local k=2,3" in odd
    assert dim.split()[-1] == "0.71" and [line.split()[-1] for line in (head, sigmoid, odd)] == ["-"] * 3


def test_table_1_refuses_what_does_not_belong_together(run, call, tmp_path, monkeypatch):
    first, second = seeds(run, of=(1, 2))
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("too late"))
    found(first, "acdc", edges=1, connected=1, ioi_exact=1)
    found(second, "acdc", settings=3, edges=1, connected=1, ioi_exact=1)
    assert "knob=0, not 3" in call(first, second, "--table1")[0]
    checkpoint = load_checkpoint(first)
    checkpoint["model"]["lm_head.weight"] += 1
    torch.save(checkpoint, first / "best.pt")
    assert "with --force; it came from python interp/acdc.py somewhere" in call(first, "--table1")[0]
    for text in ("", "[]", "{}", '{"checkpoint": 1, "settings": {}}'):
        (second / "acdc.json").write_text(text)
        assert "acdc.json is damaged: delete it" in call(second, "--table1")[0]
    other = shutil.copytree(tmp_path / "data", tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"checksum": "def"}))
    checkpoint["train_config"]["data"] = str(other)
    torch.save(checkpoint, first / "best.pt")
    assert "other texts" in call(run, first, "--table1")[0]


def test_results_lie_beside_their_checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    assert evaluation.result_path(tmp_path / "run", "sae.json") == tmp_path / "run" / "sae.json"
    assert evaluation.result_path(tmp_path / "run" / "last.pt", "sae.json") == tmp_path / "run" / "last.sae.json"


def test_results_need_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert evaluation.environment(torch.device("cpu"))["commit"] == "unknown"


def test_a_fingerprint_is_of_the_clean_weights(run):
    checkpoint = load_checkpoint(run)
    before = evaluation.fingerprint(checkpoint)
    checkpoint["model"]["transformer.h.0.mlp_gate.weight"] += 1
    assert evaluation.fingerprint(checkpoint) == before and len(before) == 16
    checkpoint["model"]["transformer.ln_f.bias"] += 1e-6
    assert evaluation.fingerprint(checkpoint) != before


def test_same_seed_same_sample(run, call):
    first, second, other = (call(run, "--sample", "", "--max_new_tokens", 7, "--seed", seed)[1].splitlines()[2:]
                            for seed in (1, 1, 2))
    assert first == second and first[1:] != other[1:]


def test_mistakes_get_one_line(run, call, tmp_path):
    (tmp_path / "not.pt").write_text("hello")
    other = tmp_path / "other"
    other.mkdir()
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"tokenizer": {"name": "gpt2"}}))
    for words, expected in [
        ((tmp_path / "nowhere",), "no checkpoint at"), ((tmp_path / "not.pt",), "is not a checkpoint"),
        ((run, "--data", tmp_path / "nowhere"), "no prepared data"), ((run, "--data", other), "another tokenizer"),
        ((run, "--batch_size", "0"), "--batch_size=0"), ((run, "--batch_size", "many"), "--batch_size"),
        ((run, "--top_k", "0", "--sample", "a"), "top_k=0"), ((), "runs"), ((run, "--frobnicate"), "--frobnicate"),
        ((run, "--json", "--sample", "a"), "drop --sample"), ((run, "--temperature", "nan"), "--temperature=nan"),
        ((run, "--device", "gpu"), "--device=gpu"), ((run, "--plot", tmp_path / "nowhere" / "a.png"), "--plot"),
    ]:
        message, _ = call(*words)
        assert expected in str(message) and str(message).startswith("error: ") and "\n" not in str(message), words
