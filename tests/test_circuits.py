"""Circuits against the paper's library (../shared/oracles) and one full forward pass per edge."""

import json
import math
import random
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ORACLES, ROOT, contents, make_data, make_run, tiny_model

from interp import circuits
from interp.graph import Circuit, Edge, Graph, PatchedModel
from prepare import UserError, load_tokenizer, read_asset, word_lists

WORDS = "Tom Sue Ben Lily Max Anna park zoo ball kite and gave to the a"
LENGTHS = [9, 7, 9, 8]
OWN = [{"clean": " Tom and Sue gave to", "corrupt": " Ben and Max gave to",
        "answer": " Tom", "wrong": " Sue"},
       {"clean": " Sue gave to", "corrupt": " Max gave to", "answer": " Tom", "wrong": " Sue"}]


def vocabulary(words):
    """meta["tokenizer"] of these words."""
    return {"name": "words", "pieces": [f" {word}" for word in words.split()]}


def tiny(ablation="none", **changes):
    size = dict(vocab_size=23, block_size=12, n_layer=2, n_head=3, n_embd=12)
    return tiny_model(ablation, **{**size, **changes}).double()


def pairs(lengths=LENGTHS, vocab_size=23):
    """Clean and corrupt prompts, left-padded with token 0, and their lengths."""
    generator, T = torch.Generator().manual_seed(1), max(lengths)
    rows = torch.randint(1, vocab_size, (2, len(lengths), T), generator=generator)
    for row, length in enumerate(lengths):
        rows[:, row, : T - length] = 0
    return *rows, torch.tensor(lengths)


def circuit_of(model, prompts, dtype=torch.float64):
    weights, config = model.clean_state_dict(), model.config
    return Circuit(PatchedModel(weights, config.n_head, config.windows, *prompts, dtype))


class OneByOne:
    """The patched model by its definition, unpadded, a full pass for each edge: every input is the
    sum of all its sources, each of this pass or, over a removed edge, of the corrupt one."""

    def __init__(self, model, prompts):
        self.model, self.graph = model, Graph(model.config.n_layer, model.config.n_head)
        clean, corrupt, lengths = prompts
        self.rows = [(c[-n:], k[-n:]) for c, k, n in zip(clean, corrupt, lengths.tolist())]
        self.log_p = [model(c[None])[0, -1].log_softmax(-1) for c, _ in self.rows]
        self.corrupt = [self.outputs(k, set(), None)[0] for _, k in self.rows]

    def outputs(self, idx, removed, corrupt):
        """Outputs of all sources, (T, C) each, and the input of Resid End."""
        graph, transformer = self.graph, self.model.transformer
        D, at = self.model.config.n_embd // graph.n_head, torch.arange(len(idx))
        out, biases = {0: transformer["wte"](idx) + transformer["wpe"](at)}, 0

        def read(dest):
            sources = graph.sources(dest[0])
            return biases + sum((corrupt if (s, dest) in removed else out)[s] for s in sources)

        for number, block in enumerate(transformer["h"]):
            attn = block.attn["attention"]
            first = 1 + number * (graph.n_head + 1)
            seen = (at <= at[:, None]) & (at > at[:, None] - attn.window)
            heads = {}
            for head in range(graph.n_head):
                part = slice(head * D, (head + 1) * D)
                x = {name: block.ln_1(read((first + head, name))) for name in "QKV"}
                q, k = x["Q"] @ attn.q_proj.weight[part].T, x["K"] @ attn.k_proj.weight[part].T
                weights = (q @ k.T).masked_fill(~seen, -math.inf).softmax(-1)
                v = x["V"] @ attn.v_proj.weight[part].T
                heads[first + head] = weights @ v @ attn.out_proj.weight[:, part].T
            out |= heads
            biases = biases + attn.out_proj.bias
            out[first + graph.n_head] = block.mlp(block.ln_2(read((first + graph.n_head, ""))))
        return out, read((graph.end, ""))

    @torch.no_grad()
    def kl(self, removed):
        kls = []
        for (idx, _), log_p, corrupt in zip(self.rows, self.log_p, self.corrupt):
            last = self.outputs(idx, set(removed), corrupt)[1][-1]
            log_q = self.model.lm_head(self.model.transformer["ln_f"](last)).log_softmax(-1)
            kls.append(F.kl_div(log_q, log_p, reduction="sum", log_target=True).item())
        return sum(kls) / len(kls)

    def sweep(self, edges, tau):
        removed, kl = [], 0.0
        for edge in edges:
            without = self.kl([*removed, edge])
            if without - kl < tau:
                removed, kl = [*removed, edge], without
        return removed, kl


def test_the_papers_model_has_23981_edges():
    graph = Graph(8, 16)
    edges, shuffled = circuits.sweep_order(graph), circuits.sweep_order(graph, random.Random(7))
    names = [graph.edge_name(edge) for edge in edges]
    assert (names[0], names[-1]) == ("MLP 7->Resid End", "Resid Start->A0.15.V")
    assert len(names) == len(set(names)) == 23_981
    assert {"A3.5->MLP 3", "A3.5->A3.6.Q", "MLP 3->A3.0.V"} & {*names} == {"A3.5->MLP 3"}
    stages = [graph.stage[edge.dest.node] for edge in shuffled]
    assert edges != shuffled and {*edges} == {*shuffled} and stages == sorted(stages, reverse=True)


def test_connected_edges_lie_on_a_path_from_start_to_end():
    graph = Graph(2, 2)
    path = {"Resid Start->A0.1.K", "A0.1->MLP 1", "MLP 1->Resid End", "Resid Start->A1.0.Q",
            "A1.0->Resid End"}
    kept = path | {"Resid Start->A0.0.V", "MLP 0->Resid End", "A0.0->A1.1.Q"}
    edges = [edge for edge in circuits.sweep_order(graph) if graph.edge_name(edge) in kept]
    assert {graph.edge_name(edge) for edge in graph.connected(edges)} == path


@pytest.mark.parametrize("folder", sorted(ORACLES.glob("acdc_*")), ids=lambda path: path.name)
def test_circuits_are_those_of_the_library_that_the_paper_used(folder):
    c = json.loads((folder / "config.json").read_text())
    prompts = np.load(folder / "prompts.npz")
    clean, corrupt = torch.tensor(prompts["clean"]), torch.tensor(prompts["corrupt"])
    lengths = torch.full((len(clean),), clean.size(1))
    weights, windows = torch.load(folder / "model.pt"), [c["n_ctx"]] * c["n_layer"]
    model = PatchedModel(weights, c["n_head"], windows, clean, corrupt, lengths)
    circuit, edges = Circuit(model), circuits.sweep_order(model.graph)
    named = {model.graph.edge_name(edge): edge for edge in edges}
    runs = json.loads((folder / "expected.json").read_text())
    runs = [run for run in runs if run["min_margin"] >= 1e-5]
    assert len(runs) >= 12
    for run in runs:
        order = [named[name] for name in run["edge_order"]]
        assert run["order"] != "canonical_desc" or order == edges
        state, kl, seen, kept = circuits.discover(circuit, order, run["tau"]), 0.0, [], []
        for name, (put_back, rise) in zip(run["edge_order"], state["decided"]):
            seen.append(kl + rise)
            kl += 0 if put_back else rise
            kept += [name] * put_back
        assert kept == run["kept_edges"]
        assert [*seen, kl] == pytest.approx([*run["kl"], run["final_kl"]], abs=1e-5)
        assert state["margin"] == pytest.approx(run["min_margin"], abs=1e-5)


@pytest.mark.parametrize("tau, changes, seed", [
    (0.003, {}, None), (0.03, {}, 1), (0.1, {"attention_layers": "global,local"}, 2)])
def test_circuits_are_those_of_a_full_pass_per_edge(tau, changes, seed):
    """Prompts of several lengths, which the fast sweep pads and the slow one does not."""
    model, prompts = tiny(window_size=3, **changes), pairs()
    slow, circuit = OneByOne(model, prompts), circuit_of(model, prompts)
    edges = circuits.sweep_order(circuit.graph, rng=seed and random.Random(seed))
    state = circuits.discover(circuit, edges, tau)
    removed, kl = slow.sweep(edges, tau)
    found = [edge for edge, (kept, _) in zip(edges, state["decided"]) if not kept]
    assert found == removed and 0 < len(removed) < len(edges)
    assert [state["kl"], circuit.kl_without(removed)] == pytest.approx([kl, kl], abs=1e-12)


def test_a_circuit_of_any_edges_is_the_patched_model():
    """Also circuits that no sweep would reach: inputs with all or none of their sources."""
    model, prompts = tiny(attention_layers="local,global", window_size=4), pairs()
    slow, circuit = OneByOne(model, prompts), circuit_of(model, prompts)
    for seed, share in enumerate((0, 0.02, 0.1, 0.3, 0.6, 0.9, 0.99, 1)):
        rng = random.Random(seed)
        removed = [edge for edge in circuits.sweep_order(circuit.graph) if rng.random() < share]
        assert circuit.kl_without(removed) == pytest.approx(slow.kl(removed), abs=1e-12)


def test_fp32_keeps_the_digits_of_a_small_kl():
    """Large logits must not drown the metric in their rounding."""
    model, prompts = tiny(vocab_size=2000), pairs(vocab_size=2000)
    model.lm_head.weight.data.mul_(5)
    exact, rounded = circuit_of(model, prompts), circuit_of(model, prompts, torch.float32)
    removed = [Edge(0, exact.graph.dests(1)[0])]
    expected = pytest.approx(exact.kl_without(removed), abs=2e-6, rel=1e-4)
    assert rounded.kl_without(removed) == expected and abs(rounded.kl_without([])) < 1e-6


def test_answers_are_those_of_each_prompt_alone():
    """Prompts of several lengths: padding must not reach them."""
    model, (clean, corrupt, lengths) = tiny(k_mlp=3), pairs(LENGTHS * 5)
    logits = torch.cat([model(row[None, -n:])[:, -1] for row, n in zip(clean, lengths)])
    answers, wrong = torch.randint(23, (2, 20), generator=torch.Generator().manual_seed(2))
    answers[:6] = logits[:6].argmax(-1)
    wrong[6:9] = logits[6:9].argmax(-1)
    right = [row[answer] > row[other] for row, answer, other in zip(logits, answers, wrong)]
    tokens = circuits.Tokens(clean, corrupt, lengths, answers, wrong)
    found = circuits.accuracy(circuit_of(model, tokens[:3]), tokens)
    exact = (logits.argmax(-1) == answers).double().mean().item()
    assert found == [exact, sum(right) / 20] and 0.3 <= exact < found[1] < 1


@pytest.mark.parametrize("kl, edges", [
    (1.0, 10), (0.1, 20), (0.01, 40),  # at the circuits themselves, the last end included
    (2.0, 5), (10**-0.5, 15), (10**-1.5, 30), (10**-1.25, 25),  # between them, by hand
    (4.0, 0), (9.0, 0), (0.0099, None)])  # no edge is needed; more than any circuit has
def test_edges_for_a_kl_lie_on_the_line_between_unbeaten_neighbours(kl, edges):
    points = [(0, 4.0), (40, 0.01), (10, 1.0), (20, 0.1), (15, 1.5), (20, 0.2), (30, 0.1)]
    assert circuits.edges_for_kl(points, kl) == (edges and pytest.approx(edges, abs=1e-12))


def test_edges_at_equal_kl_are_of_the_fixed_order_on_the_prompts_held_out():
    rows = [("descending", 10, 0.25, 0.5), (0, 1, 1e-5, 1e-5), ("descending", 30, 0.0, -1e-9)]
    rows = [dict(zip(("order", "edges", "kl", "kl_heldout"), row)) for row in rows]
    facts = {"kl_corrupt": 4.0, "kl_corrupt_heldout": 16.0, "verdict": ""}
    found = circuits.edges_at_kl(facts, rows)
    assert found["1"] == pytest.approx(8)  # 16 to 0.5 is five halvings, 16 to 1 four of them
    assert 10 < found["0.3"] < found["0.1"] < 30
    nothing = {"0.1": None, "0.3": None, "1": None}
    assert circuits.edges_at_kl(facts, rows[:2]) == nothing  # of one tau
    assert circuits.edges_at_kl(facts | {"verdict": "does not know"}, rows) == nothing


NAMES = [word for kind, words in word_lists().items() if kind not in ("places", "objects")
         for word in words]
KNOWN = load_tokenizer(vocabulary(" ".join(NAMES) + " park zoo ball kite bell He She"))


def prompts_of(task, seed=0):
    tasks = read_asset("tasks.txt")
    openings = tasks["openings1"] + tasks["openings2"]
    return circuits.make_prompts(KNOWN, task, openings, 60, seed)


def test_names_asks_for_the_friend_who_did_not_give():
    prompts, first = prompts_of("names"), 0
    for prompt in prompts:
        texts = [re.findall(r"\w+", text) for text in prompt]
        names = [word for word in texts[0] if word in NAMES]
        others = [word for word in texts[1] if word in NAMES]
        assert len(names) == len(others) == 3 and not {*names} & {*others}
        assert prompt.clean.endswith(" to") and {*texts[2], *texts[3]} == {*names[:2]}
        assert prompt.wrong == f" {names[2]}"
        first += texts[2] == names[:1]
    assert 25 <= first <= 35  # both name orders
    assert prompts == prompts_of("names") != prompts_of("names", seed=1)


@pytest.mark.parametrize("task", circuits.TASKS)
def test_a_corrupt_prompt_differs_in_what_its_task_asks_for_and_in_nothing_else(task):
    lists, prompts = word_lists(), prompts_of(task)
    girls = lists["girls"] + lists["more_girls"]
    assert len({prompt.clean for prompt in prompts}) == 60
    for prompt in prompts:
        clean, corrupt = prompt.clean.split(" "), prompt.corrupt.split(" ")
        changes = {(re.sub(r"\W", "", a), re.sub(r"\W", "", b))
                   for a, b in zip(clean, corrupt, strict=True) if a != b}
        if task == "pronouns":  # one friend, everywhere
            (ours, theirs), = changes
            answers = (" She", " He") if ours in girls else (" He", " She")
            assert (ours in girls) != (theirs in girls) and ours not in prompt.corrupt
            assert (prompt.answer, prompt.wrong) == answers
        if task == "objects":
            assert {(prompt.answer[1:], prompt.wrong[1:])} == changes
            assert changes.pop()[0] in lists["objects"]
        if task == "names":
            assert {word for pair in changes for word in pair} <= {*NAMES}


def test_prompts_are_padded_and_must_fit_each_other_and_the_model():
    tokenizer = load_tokenizer(vocabulary(WORDS))
    prompts = [circuits.Prompt(**row) for row in OWN]
    tokens = circuits.tokenize(prompts, tokenizer, 12)
    assert tokens.lengths.tolist() == [5, 3] and tokens.corrupt.shape == (2, 5)
    assert tokens.clean[1].tolist() == [0, 0, *tokenizer.encode_ordinary(" Sue gave to")]
    assert tokens.answers.tolist() == tokenizer.encode_ordinary(" Tom") * 2
    for T, changes in ((12, {"corrupt": " Ben and gave to"}), (12, {"answer": " Tommy"}),
                       (12, {"wrong": ""}), (4, {})):
        with pytest.raises(UserError, match=f"must be equally long, of {T} tokens at most"):
            circuits.tokenize([prompts[0]._replace(**changes)], tokenizer, T)


@pytest.fixture
def run(tmp_path):
    """A run whose tokenizer has the words of all prompts. Its data are gone: circuits need none."""
    words = re.findall(r"\w+", (ROOT / "assets" / "tasks.txt").read_text())
    words = sorted({*words, *"Tom Ben Max Sue Lily Anna park zoo ball kite He She".split()})
    make_data(tmp_path / "data", pieces=[f" {word}" for word in words])
    model = tiny_model(vocab_size=257 + len(words), n_layer=1, block_size=64)
    run = make_run(tmp_path / "run", tmp_path / "data", model)
    shutil.rmtree(tmp_path / "data")
    return run


def found_in(run):
    return json.loads((run / "acdc.json").read_text())


def test_the_command_continues_to_the_same_result(typed, run, stop_at):
    words = (run, "--device=cpu", "--count=4", "--tau=0.0003,0.2", "--orders=2")
    message, out = typed(circuits.main, *words)
    facts = found_in(run)
    rows = facts["circuits"]
    assert message is None and "random_orders" in out and "does not know" in out  # untrained
    assert facts["total"] == 13 and len(rows) == 6 and facts["settings"]["heldout"] == 4
    assert {"edges_at_kl", "kl_corrupt", "kl_corrupt_heldout", "right"} <= facts.keys()
    assert [row["order"] for row in rows] == ["descending", 0, 1] * 2
    assert rows[0]["edges"] == len(rows[0]["circuit"]) == 13 - len(rows[0]["removed"])
    assert {"kl", "kl_heldout", "heads", "connected", "circuit_exact"} <= rows[3].keys()
    assert rows[0]["kl_random_sd"] > 0 and rows[0]["kl_random_heldout_sd"] > 0
    assert (run / "acdc.png").read_bytes()[:4] == b"\x89PNG"
    before = contents(run)
    assert typed(circuits.main, *words) == (None, out) and contents(run) == before
    message, _ = typed(circuits.main, *words[:3], "--tau=0.5")
    assert "tau=[0.0003, 0.2], not [0.5]: --force" in message
    (run / "acdc.json").unlink()
    saves = stop_at(circuits.Result, "save", 12)
    assert typed(circuits.main, *words)[0] == "stopped" and not (run / "acdc.json").exists()
    assert len(saves[-1][1]["circuits"]) == len(saves[-2][1]["circuits"]) == 3  # fourth sweep
    assert typed(circuits.main, *words)[0] is None
    assert found_in(run)["circuits"] == rows and not (run / "acdc.resume.pt").exists()
