"""interp/unlearn.py: a model in which one unit writes one word, and brute force."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import T, make_data, make_run, tiny_model

import eval
from interp import hf, unlearn
from interp.activations import read_sites
from model import GPTNeo, GPTNeoConfig

WORDS = "the dog dogs a cat my bird we run far".split()
EOT, C = 256 + len(WORDS), 16
ID = {word: 256 + number for number, word in enumerate(WORDS)}
DOG = C + 5  # neuron 5 of layer 0, after its channels
RANKINGS = ["fisher", "contrast", "direct", "activation", "gate"]


@pytest.fixture
def data(tmp_path):
    """Every second story has "the dog", two of three have "far", all have "a cat", "my bird"."""
    rng, splits = np.random.default_rng(0), ([], [])
    for tokens, number in itertools.product(splits, range(120)):
        pieces = ["a cat", "my bird", "we run"] * 2 + ["the dog"] * 2 * (number % 2)
        pieces += ["far"] * (number % 3)
        words = " ".join(rng.permutation(pieces)).split()
        tokens += [*map(ID.get, words), EOT]
    make_data(tmp_path / "data", *splits, pieces=[f" {word}" for word in WORDS])
    return tmp_path / "data"


def hand_set(ablation="local"):
    """Neurons 5, 6, 7 write dog after the, cat after a, bird after my. The gate keeps them there.
    The embedding of each word is a channel of its own; all other weights are 0."""
    model = GPTNeo(GPTNeoConfig(
        vocab_size=EOT + 1, block_size=T, n_layer=1, n_head=2, n_embd=C, ablation=ablation,
        k_attn=1, k_mlp=1))
    block = model.transformer["h"][0]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for norm in (block.ln_1, block.ln_2, model.transformer["ln_f"]):
            norm.weight.fill_(2)
        model.lm_head.weight[256:] = torch.eye(C)[: len(WORDS) + 1]
        for neuron, cue, word in ((5, "the", "dog"), (6, "a", "cat"), (7, "my", "bird")):
            block.mlp.c_fc.weight[neuron, ID[cue] - 256] = 5
            block.mlp.c_fc.bias[neuron] = -20  # silent elsewhere
            block.mlp.c_proj.weight[ID[word] - 256, neuron] = 1
            if ablation == "local":
                block.mlp_gate.weight[neuron, ID[cue] - 256] = 1
        if ablation == "local":
            block.mlp_gate.bias[9], block.attn_gate.bias[3] = 0.5, 1  # elsewhere
    return model.eval()


@pytest.fixture
def run(data):
    path = make_run(data.parent / "out" / "words", data, hand_set())
    return eval.with_data(eval.open_run(str(path)))


def random_model(**changes):
    return tiny_model(vocab_size=EOT + 1, **changes).double()


def naive_loss(model, batches, ids=(), constant=0.0):
    """Window by window and place by place, with a constant subtracted from the logits of ids."""
    nats = []
    for x, y, where in [window for batch in batches for window in zip(*batch)]:
        logits = model(x[None])[0].detach()
        logits[:, [*ids]] -= constant
        nats += [-logits[t].log_softmax(-1)[y[t]].item() for t in range(len(x)) if where[t]]
    return np.mean(nats)


def columns(model):
    """(matrix, column) of every unit, in order."""
    for block in model.transformer["h"]:
        for layer in (block.attn["attention"].out_proj, block.mlp.c_proj):
            for column in range(layer.in_features):
                yield layer.weight.data, column


@pytest.mark.parametrize("ablation", ["local", "none"])
def test_every_ranking_finds_the_unit_that_writes_the_word(run, ablation):
    run = run._replace(model=hand_set(ablation))
    found = unlearn.measure_concept(run, "dog dogs", "cat bird")
    names = RANKINGS[: 5 if ablation == "local" else 4]
    assert [*found["rankings"]] == [*names, "chance1", "chance2", "chance3", "logits"]
    for name in names:
        entry = found["rankings"][name]
        rise = entry["curve"][1][1]
        assert entry["removed"] == [DOG] and rise > 0.5 and entry["retain"] == 0
        assert entry["curve"] == [[0] * 4, [1, rise, 0, 0]], name  # exactly this word
        assert entry["n"] == pytest.approx(0.5 / rise)
    assert found["tokens"] in (119, 120) and found["loss"]["concept"] < 0.2


@pytest.mark.parametrize("hold", [True, False])
def test_stories_with_and_without_a_word(run, hold):
    text = np.fromfile(run.folder / "val.bin", "<u2").tolist()
    parts = " ".join(map(str, text)).replace(f"{EOT}", f"{EOT}|").split("|")[:-1]
    stories = [[*map(int, part.split())] for part in parts]
    stream = sum((story for story in stories if (ID["dog"] in story) == hold), [EOT])
    starts = range(0, len(stream) - T, T)
    windows = [stream[i : i + T + 1] for i in starts]
    windows = [window for window in windows if not hold or ID["dog"] in window[1:]]
    batches = unlearn.read_batches(run, "val", [ID["dog"]], hold, 10**6)
    x, y, where = (torch.cat(part) for part in zip(*batches))
    assert torch.cat((x, y[:, -1:]), 1).tolist() == windows and torch.equal(x[:, 1:], y[:, :-1])
    assert where.equal((y == ID["dog"]) == hold)
    few = unlearn.read_batches(run, "val", [ID["dog"]], hold, 10 * T)
    assert 5 <= sum(len(x) for x, _, _ in few) <= 10


@pytest.mark.parametrize("changes", [{}, {"attn_unit": "head", "k_attn": 1}], ids=str)
def test_means_of_units_are_those_of_one_unit_at_a_time(run, changes):
    """To first order: a small part of each outgoing column is removed, or at one position."""
    model, eps = random_model(**changes), 1e-5
    batches = unlearn.read_batches(run, "val", [ID["dog"]], True, 8 * T)
    found = unlearn.unit_means(model, batches)
    before, effects = naive_loss(model, batches), []
    for matrix, column in columns(model):
        matrix[:, column] *= 1 - eps
        effects.append((naive_loss(model, batches) - before) / eps)
        matrix[:, column] /= 1 - eps
    assert found["effect"].tolist() == pytest.approx(effects, rel=1e-3, abs=1e-5)

    (x, y, where), = batches
    unit, site = 8 + 3, unlearn.unit_sites(model)[1]  # neuron 3 of layer 0, at one position
    acts, squares = read_sites([site], x)[..., 3], 0  # (B, T)
    for row, t in np.ndindex(*x.shape):
        one, n = [[part[row : row + 1] for part in (x, y, where)]], int(where[row].sum())
        damp = torch.ones(1, T, 32).double()
        damp[0, t, 3] -= eps
        with site.hook(damp.mul):
            change = naive_loss(model, one) * n
        squares += ((change - naive_loss(model, one) * n) / eps) ** 2
    here = acts[where].numpy()
    expected = squares / len(here), here.mean(), (here**2).mean()
    assert [found[name][unit].item() for name in ("square", "x", "xx")] == pytest.approx(
        expected, rel=1e-3)

    streams, rates = model.ablated(x), []
    for layer in range(3):
        for mask, size in ((streams.attn_mask, 8), (streams.mlp_mask, 32)):
            of_layer = mask[:, :, layer][where]  # (n, units)
            rates += [of_layer[:, unit * of_layer.size(1) // size].mean().item()
                      for unit in range(size)]
    assert found["kept"].tolist() == pytest.approx(rates) and 0 < max(rates[:8]) <= 1


def test_rankings_are_those_of_their_formulas(run, monkeypatch):
    model, rng = random_model(), np.random.default_rng(0)
    names = "effect", "square", "x", "xx", "kept"
    means = [{name: torch.tensor(rng.random(120)) + (name == "xx") for name in names}
             for _ in range(4)]
    calls = iter(means)
    monkeypatch.setattr(unlearn, "unit_means", lambda *_: next(calls))
    ids = [ID["dog"], ID["dogs"]]
    found = unlearn.rank(run._replace(model=model), ids, [[ID["cat"]], [ID["bird"]]])
    concept, retain, cat, bird = ({k: v.numpy() for k, v in m.items()} for m in means)
    wte = model.lm_head.weight.detach().numpy()
    written = [(wte[ids].mean(0) - wte.mean(0)) @ matrix[:, column].numpy()
               for matrix, column in columns(model)]
    spread = retain["square"] ** 0.5 + (retain["square"] ** 0.5).mean() / 10
    scores = {
        "fisher": concept["effect"] / spread,
        "contrast": (concept["effect"] - np.maximum(cat["effect"], bird["effect"])) / spread,
        "direct": written * concept["x"],
        "activation": abs(concept["x"] - retain["x"]) / (retain["xx"] - retain["x"] ** 2) ** 0.5,
        "gate": (concept["kept"] + 0.001) / (retain["kept"] + 0.001)}
    for name, score in scores.items():
        assert found[name].tolist() == np.argsort(-score).tolist(), name
    assert sorted(found["chance1"].tolist()) == [*range(120)] != found["chance1"].tolist()


def test_curve_and_crossing(run, monkeypatch):
    """Each unit alone, then numbers by hand: 0.5 lies a quarter of the way from 0.4 to 0.8."""
    model = random_model()
    *_, groups = unlearn.held_out(run, "dog dogs", "cat bird")
    groups = [batches[:1] for batches in groups]
    start, order = unlearn.losses(model, groups), [30, 3]
    found = unlearn.forget(((n, unlearn.without(model, order[:n])) for n in (1, 2)), groups, start)
    for row in found["curve"]:
        concept, retain, cat, bird = (naive_loss(model, batches) for batches in groups)
        assert row[1:] == pytest.approx(np.array([concept, retain, (cat + bird) / 2]) - start)
        for matrix, column in [[*columns(model)][unit] for unit in order[: int(row[0]) + 1]]:
            matrix[:, column] = 0

    monkeypatch.setattr(unlearn, "losses", lambda model, groups: np.array(model))
    models = [(2, [1.4, 2, 3]), (6, [1.8, 2, 3.4]), (7, None)]
    found = unlearn.forget(models, None, np.array([1, 2, 3]))
    assert [found[name] for name in ("n", *unlearn.COSTS)] == pytest.approx([3, 0, 0.1])
    assert len(found["curve"]) == 3 and unlearn.forget(models[:1], None, np.ones(3))["n"] is None


def test_control_lowers_the_logits_of_the_words(run):
    model = random_model()
    ids, _, groups = unlearn.held_out(run, "dog dogs", "cat bird")
    lowered = unlearn.lowered(model, ids, 0.7)
    for batches in groups[:2]:
        expected = naive_loss(model, batches[:1], ids, 0.7)
        assert unlearn.mean_loss(lowered, batches[:1]) == pytest.approx(expected)
    models = ((n, unlearn.lowered(run.model, ids, n)) for n in unlearn.CONSTANTS)
    found = unlearn.forget(models, groups, unlearn.losses(run.model, groups))
    hits = groups[0]
    rise = naive_loss(run.model, hits, ids, found["n"]) - naive_loss(run.model, hits)
    assert rise == pytest.approx(0.5, abs=0.02)
    assert found["retain"] < 0 and found["siblings"] < 0  # in every model, see docs/unlearning.md


def test_relearning_is_compared_with_the_same_training(run, monkeypatch):
    monkeypatch.setattr(unlearn, "LR", 0.003)
    lessons = unlearn.read_batches(run, "train", [ID["dog"]], True, 24 * T)[0]
    lessons = [[part[i::3] for part in lessons] for i in range(3)]
    concept = unlearn.read_batches(run, "val", [ID["dog"]], True, 8 * T)
    models = [run.model.double(), unlearn.without(run.model, [DOG])]
    found = unlearn.relearn(models, lessons, concept)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.003) for model in models]
    gaps = []
    for update in range(found + 1):
        intact, smaller = (naive_loss(model, concept) for model in models)
        gaps.append(smaller - intact)
        x, y, _ = lessons[update % 3]
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()
    half = [gap <= gaps[0] / 2 for gap in gaps]
    assert half == [False] * found + [True] and found > 2


def test_a_stopped_call_continues_and_its_model_is_a_run(run, typed, stop_at):
    path, folder = eval.Path(run.path), run.folder.parent / "no_dog"
    words = path, "--concept", "dog dogs", "cat bird", "--concept", "far", "bird"
    calls = stop_at(unlearn, "measure_concept", 2)
    assert typed(unlearn.main, *words)[0] == "stopped" and not (path / "unlearn.json").exists()
    message, out = typed(unlearn.main, *words, "--save", "dog", folder)
    assert message is None and len(calls) == 3  # the first concept is measured once
    continued = json.loads((path / "unlearn.json").read_text())
    lines = {line.split()[1]: line for line in out.splitlines()[1:-2]}
    assert lines.keys() == {*RANKINGS, "chance", "logits"}
    dog, far = (entry["rankings"]["fisher"] for entry in continued["concepts"])
    mean = continued["mean"]["fisher"]
    assert (mean["n"], mean["units"], mean["units_n"], far["n"]) == (2, dog["n"], 1, None)
    assert continued["mean"]["chance"]["n"] == 6 and "0.1 (1 of 2)" in lines["fisher"]

    saved = eval.open_run(str(folder)).model.state_dict()
    expected = unlearn.without(run.model, [DOG]).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in expected.items())
    assert typed(eval.main, folder)[0] is None
    assert typed(hf.main, "export", folder, run.folder.parent / "hf")[0] is None
    assert typed(unlearn.main, *words, "--force")[0] is None
    undisturbed = json.loads((path / "unlearn.json").read_text())
    assert continued | {"command": "", "date": ""} == undisturbed | {"command": "", "date": ""}


@pytest.mark.parametrize("words, siblings, expected", [
    ("zebra", "cat", '" zebra" is not one token'), ("far", "dog", "at least 130 are needed"),
    ("a", "cat", '0 val tokens without "a"'), ("dog", "dog", "no word twice")])
def test_words_that_do_not_fit(run, typed, monkeypatch, words, siblings, expected):
    monkeypatch.setattr(unlearn, "CONCEPT_TOKENS", 130)
    message, _ = typed(unlearn.main, run.path, "--concept", words, siblings)
    assert expected in message and "\n" not in message
