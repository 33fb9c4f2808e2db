"""interp/acdc.py: circuits against the library's (../shared/oracles) and against one full forward pass per edge."""

import json
import math
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "interp")]
import acdc
import config
from model import GPTNeo, GPTNeoConfig, save_checkpoint
from prepare import load_tokenizer, word_lists

ORACLES = sorted(ROOT.parent.glob("shared/oracles/interp/acdc_*"))
NAMES = ["Tom", "Sue", "Ben", "Lily", "Max", "Anna"]
WORDS = {"name": "words", "pieces": [" " + word for word in [*NAMES, "park", "ball", "and", "gave", "to", "the", "a"]]}
LENGTHS = [9, 7, 9, 8]
FIRST_NAMES = [name for kind in ("girls", "more_girls", "boys", "more_boys") for name in word_lists()[kind]]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes):
    """A model whose biases, LayerNorms and scores all matter."""
    torch.manual_seed(0)
    knobs = dict(vocab_size=23, block_size=12, n_layer=2, n_head=3, n_embd=12, ablation="none")
    model = GPTNeo(GPTNeoConfig(**{**knobs, **changes}))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.4)
    return model.double()


def pairs(lengths=LENGTHS, vocab_size=23):
    """Clean and corrupt prompts, left-padded with token 0, and their lengths."""
    generator, T = torch.Generator().manual_seed(1), max(lengths)
    rows = torch.randint(1, vocab_size, (2, len(lengths), T), generator=generator)
    for row, length in enumerate(lengths):
        rows[:, row, : T - length] = 0
    return *rows, torch.tensor(lengths)


def circuit_of(model, prompts, dtype=torch.float64):
    config = model.config
    return acdc.Circuit(acdc.PatchedModel(model.clean_state_dict(), config.n_head, config.windows, *prompts, dtype))


def kept_of(edges, state):
    return [edge for edge, (kept, _) in zip(edges, state["decided"]) if kept]


class OneByOne:
    """The patched model by its definition, one prompt at a time, unpadded: every destination's input is the sum of all its
    sources, each of this pass or, over a removed edge, of the corrupt one; every edge costs a full pass."""

    def __init__(self, model, prompts):
        self.model, self.graph = model, acdc.Graph(model.config.n_layer, model.config.n_head)
        clean, corrupt, lengths = prompts
        self.rows = [(c[-n:], k[-n:]) for c, k, n in zip(clean, corrupt, lengths.tolist())]
        self.log_p = [model(c[None])[0, -1].log_softmax(-1) for c, _ in self.rows]
        self.spoilt = [self.outputs(k, set(), None)[0] for _, k in self.rows]

    def outputs(self, idx, removed, spoilt):
        """Outputs of all sources, (T, C) each, and the input of Resid End."""
        graph, transformer, C = self.graph, self.model.transformer, self.model.config.n_embd
        D, T = C // graph.n_head, len(idx)
        out, biases = {0: transformer["wte"](idx) + transformer["wpe"](torch.arange(T))}, torch.zeros(C).double()

        def read(dest):
            return biases + sum(spoilt[s] if (s, dest) in removed else out[s] for s in graph.sources(dest[0]))

        for number, block in enumerate(transformer["h"]):
            attn = block.attn["attention"]
            first = 1 + number * (graph.n_head + 1)
            heads = {}
            for head in range(graph.n_head):
                columns = slice(head * D, (head + 1) * D)
                q, k, v = (F.linear(block.ln_1(read((first + head, part))), proj.weight[columns])
                           for part, proj in (("Q", attn.q_proj), ("K", attn.k_proj), ("V", attn.v_proj)))
                at = torch.arange(T)
                seen = (at <= at[:, None]) & (at > at[:, None] - attn.window)
                weights = (q @ k.T).masked_fill(~seen, -math.inf).softmax(-1)
                heads[first + head] = weights @ v @ attn.out_proj.weight[:, columns].T
            out |= heads
            biases = biases + attn.out_proj.bias
            out[first + graph.n_head] = block.mlp(block.ln_2(read((first + graph.n_head, ""))))
        return out, read((graph.end, ""))

    @torch.no_grad()
    def kl(self, removed):
        total = 0
        for (idx, _), log_p, spoilt in zip(self.rows, self.log_p, self.spoilt):
            last = self.outputs(idx, set(removed), spoilt)[1][-1]
            log_q = self.model.lm_head(self.model.transformer["ln_f"](last)).log_softmax(-1)
            total += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        return total / len(self.rows)

    def sweep(self, edges, tau):
        removed, prev, kept = [], 0.0, []
        for edge in edges:
            kl = self.kl([*removed, edge])
            if kl - prev < tau:
                removed, prev = [*removed, edge], kl
            else:
                kept.append(edge)
        return kept, prev


# ---- the graph


def test_the_papers_model_has_23981_edges():
    graph = acdc.Graph(8, 16)
    edges = acdc.sweep_order(graph)
    assert len(edges) == len(set(edges)) == 23_981 and graph.end == 137
    assert graph.edge_name(edges[0]) == "MLP 7->Resid End" and graph.edge_name(edges[-1]) == "Resid Start->A0.15.V"
    assert sum(dest == (137, "") for _, dest in edges) == 137
    assert sum(part == "" for _, (node, part) in edges if node != 137) == 612
    names = set(map(graph.edge_name, edges))
    assert "A3.5->MLP 3" in names and "A3.5->A3.6.Q" not in names and "MLP 3->A3.0.V" not in names


@pytest.mark.parametrize("rng", [None, 7])
def test_a_sweep_goes_through_the_stages_from_the_end(rng):
    graph = acdc.Graph(3, 2)
    edges = acdc.sweep_order(graph, "ascending", rng and random.Random(rng))
    stages = [graph.stage[dest.node] for _, dest in edges]
    assert stages == sorted(stages, reverse=True) and set(edges) == set(acdc.sweep_order(graph, "descending"))
    assert (edges != acdc.sweep_order(graph, "ascending")) == (rng is not None)


def test_connected_edges_lie_on_a_path_from_start_to_end():
    graph = acdc.Graph(2, 2)
    named = {graph.edge_name(edge): edge for edge in acdc.sweep_order(graph)}
    path = ["Resid Start->A0.1.K", "A0.1->MLP 1", "MLP 1->Resid End", "Resid Start->A1.0.Q", "A1.0->Resid End"]
    loose = ["Resid Start->A0.0.V", "MLP 0->Resid End", "A0.0->A1.1.Q"]
    assert set(graph.connected([named[name] for name in path + loose])) == {named[name] for name in path}


@pytest.mark.parametrize("edge, kind", [("Resid Start->A0.1.K", "Resid Start->K"), ("A0.1->MLP 1", "head->MLP"),
                                        ("MLP 0->Resid End", "MLP->Resid End"), ("A0.1->A1.0.V", "head->V")])
def test_kinds_of_edges(edge, kind):
    graph = acdc.Graph(2, 2)
    assert graph.kind({graph.edge_name(e): e for e in acdc.sweep_order(graph)}[edge]) == kind


# ---- the circuits


@pytest.mark.parametrize("folder", ORACLES, ids=lambda folder: folder.name)
def test_circuits_are_those_of_the_library_that_the_paper_used(folder):
    c, prompts = json.loads((folder / "config.json").read_text()), np.load(folder / "prompts.npz")
    clean, corrupt = (torch.from_numpy(prompts[key]) for key in ("clean", "corrupt"))
    weights, lengths = torch.load(folder / "model.pt", weights_only=True), torch.full((len(clean),), clean.size(1))
    circuit = acdc.Circuit(acdc.PatchedModel(weights, c["n_head"], [c["n_ctx"]] * c["n_layer"], clean, corrupt, lengths))
    edges = {circuit.graph.edge_name(edge): edge for edge in acdc.sweep_order(circuit.graph)}
    runs = [run for run in json.loads((folder / "expected.json").read_text()) if run["min_margin"] >= 1e-5]
    assert len(runs) >= 12
    for run in runs:
        order = [edges[name] for name in run["edge_order"]]
        if run["order"].startswith("canonical"):
            assert order == acdc.sweep_order(circuit.graph, "descending" if run["order"].endswith("desc") else "ascending")
        state = acdc.discover(circuit, order, run["tau"])
        assert [circuit.graph.edge_name(edge) for edge in kept_of(order, state)] == run["kept_edges"]
        kl, seen = 0.0, []
        for kept, rise in state["decided"]:
            seen.append(kl + rise)
            kl += 0 if kept else rise
        assert seen == pytest.approx(run["kl"], abs=1e-5)
        furthest = max(abs(a - b) for a, b in zip(seen, run["kl"]))
        print(f"{folder.name} {run['order']:14} tau {run['tau']:<5}: {run['kept']:2} of {run['total']} edges kept, "
              f"all of them the library's; KL after each step within {furthest:.0e}, {state['evaluations']} evaluations")
        assert state["kl"] == pytest.approx(run["final_kl"], abs=1e-5)
        assert state["margin"] == pytest.approx(run["min_margin"], abs=1e-5)


@pytest.mark.parametrize("tau, changes, order", [
    (0.003, {}, "descending"), (0.03, {}, "ascending"), (0.03, {}, 1),
    (0.1, {"attention_layers": "global,local", "window_size": 3}, 2)])
def test_circuits_are_those_of_a_full_pass_per_edge(tau, changes, order):
    """Prompts of several lengths, which the fast sweep pads and the slow one does not."""
    model, prompts = tiny(**changes), pairs()
    slow, circuit = OneByOne(model, prompts), circuit_of(model, prompts)
    shuffled = {"rng": random.Random(order)} if isinstance(order, int) else {"order": order}
    edges = acdc.sweep_order(circuit.graph, **shuffled)
    state = acdc.discover(circuit, edges, tau)
    kept, kl = slow.sweep(edges, tau)
    assert kept_of(edges, state) == kept and 0 < len(kept) < len(edges)
    assert state["kl"] == pytest.approx(kl, abs=1e-12)
    circuit.set_removed([edge for edge in edges if edge not in kept])
    assert circuit.kl() == pytest.approx(kl, abs=1e-12)


def test_a_circuit_of_any_edges_is_the_patched_model():
    """Also circuits that no sweep would reach: sources removed here and there, destinations with all or none of theirs."""
    model, prompts = tiny(attention_layers="local,global", window_size=4), pairs()
    slow, circuit = OneByOne(model, prompts), circuit_of(model, prompts)
    for seed, share in enumerate((0.02, 0.1, 0.3, 0.6, 0.9, 0.99)):
        rng = random.Random(seed)
        removed = [edge for edge in acdc.sweep_order(circuit.graph) if rng.random() < share]
        circuit.set_removed(removed)
        assert circuit.kl() == pytest.approx(slow.kl(removed), abs=1e-12)


def test_all_edges_are_the_clean_model_and_none_the_corrupt_one():
    model, (clean, corrupt, lengths) = tiny(), pairs()
    circuit = circuit_of(model, (clean, corrupt, lengths))
    edges = acdc.sweep_order(circuit.graph)
    for removed, idx in (([], clean), (edges, corrupt)):
        circuit.set_removed(removed)
        expected = torch.stack([model(row[-n:][None])[0, -1] for row, n in zip(idx, lengths)])
        torch.testing.assert_close(circuit.logits(), expected, rtol=0, atol=1e-12)


def test_the_smallest_and_the_largest_threshold():
    model, prompts = tiny(), pairs()
    circuit = circuit_of(model, prompts)
    edges = acdc.sweep_order(circuit.graph)
    state = acdc.discover(circuit, edges, math.inf)
    assert not kept_of(edges, state)
    circuit.set_removed(edges)
    assert state["kl"] == pytest.approx(circuit.kl())
    # an edge that does not matter: a head that writes nothing; all others do
    model.transformer["h"][0].attn["attention"].out_proj.weight.data[:, :4] = 0
    circuit = circuit_of(model, prompts)
    state = acdc.discover(circuit, edges, 1e-13)
    gone = {circuit.graph.edge_name(edge) for edge, (kept, _) in zip(edges, state["decided"]) if not kept}
    idle = {name for name in map(circuit.graph.edge_name, edges) if "A0.0" in name}
    assert idle <= gone and all(abs(rise) < 1e-6 or rise < 0 for kept, rise in state["decided"] if not kept)
    state = acdc.discover(circuit, edges, 0.0)  # strictly: what changes nothing stays, only what lowers KL goes
    assert all(rise < 0 for kept, rise in state["decided"] if not kept)


def test_fp32_keeps_the_digits_of_a_small_kl():
    """Removing next to nothing from a model with large logits: the metric must not drown in its own rounding."""
    model, prompts = tiny(vocab_size=2000), pairs(vocab_size=2000)
    model.lm_head.weight.data.mul_(5)
    exact, rounded = circuit_of(model, prompts), circuit_of(model, prompts, torch.float32)
    removed = [acdc.Edge(0, exact.graph.dests(1)[0])]
    for circuit in (exact, rounded):
        circuit.set_removed(removed)
    assert rounded.kl() == pytest.approx(exact.kl(), abs=2e-6, rel=1e-4)
    rounded.set_removed([])
    assert abs(rounded.kl()) < 1e-6


def test_resume_equals_uninterrupted_to_the_last_bit():
    model, prompts = tiny(), pairs()
    edges = acdc.sweep_order(circuit_of(model, prompts).graph)
    saved = []
    whole = acdc.discover(circuit_of(model, prompts, torch.float32), edges, 0.03, save=saved.append)
    assert len(saved) == 5  # a stage each: Resid End, MLP 1, heads 1, MLP 0, heads 0
    for state in saved[:-1]:
        again = acdc.discover(circuit_of(model, prompts, torch.float32), edges, 0.03, json.loads(json.dumps(state)))
        assert {**again, "seconds": 0} == {**whole, "seconds": 0}


def test_a_diverged_model_is_refused():
    model = tiny()
    model.transformer["ln_f"].weight.data.fill_(1)
    model.transformer["h"][0].mlp.c_proj.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="diverged"):
        circuit_of(model, pairs())


# ---- both streams


def guesses(logits, tokens):
    """Shares of exact and of right answers, prompt by prompt."""
    exact = [int(row.argmax()) == answer for row, answer in zip(logits, tokens.answers.tolist())]
    right = [(row[answer] > row[wrong]).item() for row, answer, wrong in zip(logits, tokens.answers, tokens.wrong)]
    return sum(exact) / len(exact), sum(right) / len(right)


@pytest.mark.parametrize("changes", [{"ablation": "local"}, {"ablation": "global", "attn_unit": "head", "k_attn": 1}])
def test_answers_of_both_streams_are_those_of_each_prompt_alone(changes):
    """Prompts of several lengths and out of order: padding must not reach the ablated stream."""
    model, (clean, corrupt, lengths) = tiny(k_mlp=3, **changes), pairs([9, 7, 9, 8] * 5)
    generator = torch.Generator().manual_seed(2)
    answers, wrong = torch.randint(23, (2, 20), generator=generator)
    alone = [model.ablated(row[None, -length:]) for row, length in zip(clean, lengths)]
    ablated = torch.cat([streams.logits_ablated[:, -1] for streams in alone])
    answers[:6], wrong[6:9] = ablated.argmax(-1)[:6], ablated.argmax(-1)[6:9]  # some are right, some wrong
    tokens = acdc.Tokens(clean, corrupt, lengths, answers, wrong)
    torch.testing.assert_close(acdc.ablated_logits(model, tokens), ablated, rtol=0, atol=1e-12)
    circuit, heldout = (circuit_of(model, (clean, corrupt, lengths)) for _ in range(2))
    facts = acdc.describe_model(model, circuit, heldout, tokens)
    clean_logits = torch.cat([streams.logits_clean[:, -1] for streams in alone])
    assert (facts["ioi_exact"], facts["ioi_right"]) == guesses(clean_logits, tokens)
    assert (facts["ablated_exact"], facts["ablated_right"]) == guesses(ablated, tokens)
    assert facts["ablated_exact"] >= 0.3 and 0 < facts["ablated_right"] < 1
    assert facts["kl_corrupt_heldout"] == facts["kl_corrupt"] > 0  # here they are the same prompts


# ---- the frontier


ZIGZAG = [(0, 4.0), (40, 0.01), (10, 1.0), (20, 0.1), (15, 1.5), (20, 0.2), (30, 0.1)]  # three are beaten


def test_a_frontier_leaves_out_what_another_circuit_beats():
    assert acdc.frontier(ZIGZAG) == [(0, 4.0), (10, 1.0), (20, 0.1), (40, 0.01)]
    assert acdc.frontier([(0, 0.5), (9, 0.7), (12, 0.5)]) == [(0, 0.5)]  # circuits worse than none at all
    rng = random.Random(0)
    points = [(rng.randrange(20), rng.random()) for _ in range(60)]
    unbeaten = [(edges, kl) for edges, kl in points
                if not any(e <= edges and k <= kl and (e, k) != (edges, kl) for e, k in points)]
    assert acdc.frontier(points) == sorted(unbeaten)


@pytest.mark.parametrize("kl, edges", [
    (1.0, 10), (0.1, 20), (0.01, 40),  # at the circuits themselves, the last end included
    (2.0, 5), (10**-0.5, 15), (10**-1.5, 30), (10**-1.25, 25),  # between them, by hand
    (4.0, 0), (9.0, 0), (0.0099, None)])  # no edge is needed; more than any circuit has
def test_edges_for_a_kl_lie_on_the_line_between_neighbours(kl, edges):
    found = acdc.edges_for_kl(ZIGZAG, kl)
    assert found is None if edges is None else found == pytest.approx(edges, abs=1e-12)


def test_a_frontier_that_begins_with_some_edges_says_nothing_of_fewer():
    assert acdc.edges_for_kl(ZIGZAG[1:], 1.2) is None and acdc.edges_for_kl(ZIGZAG[1:], 1.0) == 10


def found_circuits(*rows, heldout=2, **facts):
    """A result, as far as the frontier reads it: rows of (order, edges, kl, kl_heldout)."""
    names = ("order", "edges", "kl", "kl_heldout")
    return {"settings": {"heldout": heldout}, "kl_corrupt": 4.0, "kl_corrupt_heldout": 16.0,
            "ioi_exact": 0.5, **facts,
            "circuits": [dict(zip(names, row)) for row in rows]}


def test_edges_at_equal_kl_are_of_the_fixed_order_on_the_prompts_held_out():
    rows = [("descending", 10, 0.25, 0.5), (0, 1, 1e-5, 1e-5), ("descending", 30, 0.0, -1e-9), (1, 2, 1e-5, 1e-5)]
    assert acdc.measured_points(found_circuits(*rows)) == [(0, 16.0), (10, 0.5), (30, 1e-6)]
    assert acdc.measured_points(found_circuits(*rows, heldout=0)) == [(0, 4.0), (10, 0.25), (30, 1e-6)]
    found = acdc.edges_at_equal_kl(found_circuits(*rows))
    assert found["edges_kl_1"] == pytest.approx(8)  # 16 to 0.5 is five halvings, 16 to 1 four of them
    assert 10 < found["edges_kl_0.3"] < found["edges_kl_0.1"] < 30
    assert acdc.edges_at_equal_kl(found_circuits(*rows[:2])) == {}  # of one tau, whatever the other orders
    assert acdc.edges_at_equal_kl(found_circuits(*rows, ioi_exact=0.49)) == {}  # it has no circuit for the task
    low = [("descending", 5, 2.0, 2.0), ("descending", 9, 0.2, 0.2)]
    assert acdc.edges_at_equal_kl(found_circuits(*low)).keys() == {"edges_kl_0.3", "edges_kl_1"}


# ---- prompts


def test_our_prompts_ask_for_the_friend_who_did_not_give():
    tokenizer = load_tokenizer({"name": "words", "pieces": [" " + word for word in FIRST_NAMES + ["park", "zoo", "ball"]]})
    prompts = acdc.make_prompts(tokenizer, 60, 0)
    assert len({prompt["clean"] for prompt in prompts}) == 60
    first = 0
    for prompt in prompts:
        clean, corrupt = prompt["clean"].split(), prompt["corrupt"].split()
        names = [word.strip(".,") for word in clean if word.strip(".,") in FIRST_NAMES]
        others = [word.strip(".,") for word in corrupt if word.strip(".,") in FIRST_NAMES]
        assert len(names) == len(others) == 3 and len(clean) == len(corrupt)
        assert [a for a, b in zip(clean, corrupt) if a != b] and not set(names) & set(others)
        assert prompt["wrong"] == " " + names[2] and prompt["answer"][1:] in names[:2]
        assert prompt["answer"] != prompt["wrong"]
        first += prompt["answer"][1:] == names[0]
        assert clean[-1] == "to" and "{" not in prompt["clean"] + prompt["corrupt"]
    assert 25 <= first <= 35  # both name orders
    assert acdc.make_prompts(tokenizer, 60, 0) == prompts != acdc.make_prompts(tokenizer, 60, 1)


def test_padding_and_errors_of_prompts():
    tokenizer = load_tokenizer(WORDS)
    prompts = [{"clean": " Tom and Sue gave to", "corrupt": " Ben and Max gave to", "answer": " Tom", "wrong": " Sue"},
               {"clean": " Sue gave to", "corrupt": " Max gave to", "answer": " Tom", "wrong": " Sue"}]
    clean, corrupt, lengths, answers, wrong = acdc.tokenize(prompts, tokenizer, 12)
    assert lengths.tolist() == [5, 3] and clean[1].tolist() == [0, 0, *tokenizer.encode_ordinary(" Sue gave to")]
    assert answers.tolist() == tokenizer.encode_ordinary(" Tom") * 2 and corrupt.shape == (2, 5)
    for changes, message in (({"corrupt": " Ben and gave to"}, "equally long"), ({"answer": " Tommy"}, "single tokens"),
                             ({"wrong": ""}, "0 tokens"), ({"clean": "", "corrupt": ""}, "must differ"),
                             ({"corrupt": prompts[0]["clean"]}, "must differ"), ({"wrong": " Tom"}, "must differ")):
        with pytest.raises(ValueError, match=message):
            acdc.tokenize([{**prompts[0], **changes}], tokenizer, 12)
    with pytest.raises(ValueError, match="the model takes 4"):
        acdc.tokenize(prompts, tokenizer, 4)
    with pytest.raises(ValueError, match="fewer than 500 different"):
        acdc.make_prompts(load_tokenizer({"name": "words", "pieces": [" " + w for w in [*NAMES[:5], "park", "ball"]]}), 500, 0)
    with pytest.raises(ValueError, match="only 0 of our names"):
        acdc.make_prompts(load_tokenizer({"name": "words", "pieces": [" park"]}), 4, 0)


# ---- the command line


def save_run(folder, tokenizer=WORDS, seed=1, **changes):
    """A run folder as train.py leaves it, with no data at hand: circuits need none."""
    model = tiny(vocab_size=load_tokenizer(tokenizer).n_vocab, block_size=120, n_layer=1, n_head=2, n_embd=8, **changes).float()
    folder.mkdir()
    save_checkpoint(folder / "best.pt", model.config, model.state_dict(), step=7, tokenizer=tokenizer,
                    data="abc", train_config={"data": "nowhere", "seed": seed})
    return folder


@pytest.fixture
def run(tmp_path):
    save_run(tmp_path / "run2", seed=2)
    return save_run(tmp_path / "run1")


@pytest.fixture
def call(monkeypatch, capsys):
    """interp/acdc.py with these words -> its exit message, what it printed and its notes."""
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["acdc.py", *map(str, words), "--device=cpu"])
        message, handler = None, signal.getsignal(signal.SIGTERM)
        try:
            config.cli(acdc.main)
        except SystemExit as stop:
            message = stop.code
        finally:
            signal.signal(signal.SIGTERM, handler)
        return message, "".join(capsys.readouterr())
    return call


def result_of(run):
    return json.loads((run / "acdc.json").read_text())


def timeless(result):
    return [{**row, "seconds": 0} for row in result["circuits"]]


@pytest.fixture
def stop_after(monkeypatch):
    """Make a sweep end after so many batches, by a call of how."""
    def stop_after(batches, how):
        attempt, calls = acdc.Circuit.attempt, []

        def interrupted(self, edges):
            calls.append(edges)
            if len(calls) == batches:
                how()
            return attempt(self, edges)
        monkeypatch.setattr(acdc.Circuit, "attempt", interrupted)
    return stop_after


def ctrl_c():
    raise KeyboardInterrupt


def sigterm():
    signal.raise_signal(signal.SIGTERM)


def test_the_command_as_a_user_types_it(call, run):
    other = run.parent / "run2"
    message, out = call(run, other, "--count=4", "--tau=0.01,0.2", "--orders=2")
    assert message is None and str(run) in out and "random orders" in out
    result = result_of(run)
    assert result["total"] == 13 and result["settings"]["count"] == 4 and len(result["circuits"]) == 6
    first = result["circuits"][0]
    assert result["warnings"] and "warning" in out  # an untrained model
    assert first["edges"] == len(first["circuit"]) == sum(first["kinds"].values())
    assert len(first["circuit"]) + len(first["removed"]) == 13 and first["kl"] >= 0 and first["kl_heldout"] >= 0
    assert (run / "acdc.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(run.glob("*.tmp")) + list(run.glob("*resume*"))

    before = (run / "acdc.json").read_text()
    (run.parent / "table1.csv").write_text("what interp/table1.py leaves")
    (run.parent / "notes").mkdir()
    message, out = call(*sorted(run.parent.glob("*")), "--count=4", "--tau=0.01,0.2", "--orders=2")
    assert message is None and "already" in out
    assert (run / "acdc.json").read_text() == before
    message, _ = call(other, run, "--count=4", "--tau=0.5")
    assert "tau=[0.01, 0.2], not [0.5]: --force" in message and (run / "acdc.json").read_text() == before
    message, _ = call(run, "--count=4", "--tau=0.5", "--force")
    assert message is None and result_of(run)["settings"]["tau"] == [0.5]


def test_a_result_says_what_can_be_said_of_a_circuit(call, run):
    """What RESULTS.md, interp/table1.py and a reader a year later look for."""
    assert call(run, "--count=4", "--orders=1")[0] is None
    result = result_of(run)
    assert {"total", "ioi_exact", "ioi_right", "ablated_exact", "ablated_right", "kl_corrupt", "kl_corrupt_heldout",
            "prompts", "circuits", "warnings"} <= result.keys()
    assert not {"edges", "connected"} & result.keys()  # facts of a circuit stand with it
    first, second = result["circuits"]
    facts = {"tau", "order", "edges", "connected", "heads", "kl", "circuit_exact", "circuit_right", "margin",
             "evaluations", "batches", "seconds", "kinds", "kl_random", "kl_random_sd", "kl_heldout",
             "kl_random_heldout", "kl_random_heldout_sd"}
    assert second.keys() == facts and first.keys() == facts | {"circuit", "removed"}
    assert (first["order"], second["order"]) == ("descending", 0)
    assert result["prompts"][0].keys() == {"clean", "corrupt", "answer", "wrong"} and len(result["prompts"]) == 8


@pytest.mark.parametrize("how", [ctrl_c, sigterm])
@pytest.mark.parametrize("batches", [1, 9])  # in the first stage; in the second circuit
def test_ctrl_c_and_the_same_command_again(call, run, stop_after, how, batches):
    words = ("--count=4", "--tau=0.01,0.05")
    assert call(run, *words)[0] is None
    whole = result_of(run)
    (run / "acdc.json").unlink()
    stop_after(batches, how)
    message, _ = call(run, *words)
    assert message == "stopped: the same command goes on from the last stage that was done"
    assert (run / "acdc.resume.pt").exists() == (batches > 1) and not (run / "acdc.json").exists()
    if batches > 1:  # an interrupted sweep counts too
        message, _ = call(run, "--count=4", "--tau=0.5")
        assert "acdc.resume.pt was made with tau=[0.01, 0.05], not [0.5]: --force" in message
    message, out = call(run, *words)
    assert message is None and ("going on" in out) == (batches > 1)
    assert timeless(result_of(run)) == timeless(whole) and not list(run.glob("*resume*"))


@pytest.mark.parametrize("name", ["acdc.json", "acdc.resume.pt"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"settings": {}}', b"PK\3\4"])
def test_force_replaces_a_damaged_file(call, run, name, content):
    (run / name).write_bytes(content)
    assert f"{name} is damaged, or of an earlier version: delete it, or add --force" in call(run, "--count=4")[0]
    message, out = call(run, "--count=4", "--force")
    assert message is None and "going on" not in out
    assert result_of(run)["settings"]["tau"] == [0.03] and not list(run.glob("*resume*"))


def picture_words(monkeypatch):
    """What the pictures that are drawn from now on say, a list that fills."""
    words, save = [], acdc.save_figure

    def look(path, figure):
        for axes in figure.axes:
            words.extend([axes.get_title(loc="left"), axes.get_xlabel(), *(line.get_label() for line in axes.lines)])
        save(path, figure)
    monkeypatch.setattr(acdc, "save_figure", look)
    return words


def test_several_taus_make_a_frontier(call, run, tmp_path, monkeypatch):
    """Its table and its picture, also when all has been found before; no gates, no ablated stream."""
    words = picture_words(monkeypatch)
    monkeypatch.setattr(acdc, "KNOWS", 0)  # these models know nothing
    command = (run, run.parent / "run2", "--count=4", "--tau=0.001,0.01,0.2", f"--plot={tmp_path / 'all.pdf'}")
    message, out = call(*command)
    assert message is None and "by the ablated stream" not in out and result_of(run)["ablated_exact"] is None
    note, _, head, first, second = out[out.index("interpolated") :].splitlines()[:5]
    assert "on held-out prompts" in note and "edges for KL <= 0.1" in head
    expected = acdc.edges_at_equal_kl(result_of(run))
    assert first.split()[0] == str(run) and [f"{edges:.1f}" for edges in expected.values()] == first.split()[1:]
    assert words[0].startswith("run1\n") and words[-1] == str(run.parent / "run2") and str(run) in words
    assert "KL(model || circuit) in nats, on held-out prompts" in words
    assert (tmp_path / "all.pdf").read_bytes().startswith(b"%PDF")
    (tmp_path / "all.pdf").unlink()
    message, again = call(*command)
    assert message is None and "already" in again and (tmp_path / "all.pdf").exists()
    assert again[again.index("interpolated") :].splitlines()[2:5] == [head, first, second]
    assert "interpolated" not in call(run, "--count=4", "--force")[1]


def test_a_gated_run_answers_on_both_streams(call, tmp_path, monkeypatch):
    words = picture_words(monkeypatch)
    run = save_run(tmp_path / "gated", ablation="local", k_attn=1, k_mlp=1)
    message, out = call(run, "--count=4")
    assert message is None and "by the ablated stream" in out
    result = result_of(run)
    assert 0 <= result["ablated_exact"] <= result["ablated_right"] <= 1
    (run / "best.pt").rename(run / "last.pt")
    assert call(run / "last.pt", "--count=4")[0] is None
    assert [title.splitlines()[0] for title in words if "edges at tau" in title] == ["gated"] * 2


def test_a_result_from_before_the_frontier_is_refused(call, run):
    """It lacks what the tables of today print."""
    assert call(run, "--count=4")[0] is None
    whole = result_of(run)
    for name in ("ablated_exact", "kl_corrupt_heldout"):
        (run / "acdc.json").write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        assert "acdc.json is damaged, or of an earlier version: delete it, or add --force" in call(run, "--count=4")[0]


def test_prompts_of_ones_own(call, run, tmp_path):
    path = tmp_path / "one.json"
    one = {"clean": " Tom and Sue gave to", "corrupt": " Ben and Max gave to", "answer": " Tom", "wrong": " Sue"}
    path.write_text(json.dumps([one]))
    message, out = call(run, f"--prompts={path}")  # one prompt, none to hold out
    assert message is None and "held out" not in out.splitlines()[1] and "0 held out" in out


def test_runs_that_cannot_be_compared_or_saved(call, run, tmp_path, monkeypatch):
    assert "no checkpoint" in call(tmp_path / "nothing")[0]
    # a run with another tokenizer has other prompts: refused before anything is computed
    other = save_run(tmp_path / "other", {"name": "words", "pieces": WORDS["pieces"] + [" Jack"]})
    message, _ = call(run, other, "--force")
    assert "prompts=" in message and not (other / "acdc.json").exists() and not (run / "acdc.json").exists()
    (run / "acdc.json.tmp").mkdir()  # stands for a read-only folder, which for root there is none of
    assert f"cannot write {run / 'acdc.json'}" in call(run)[0]
