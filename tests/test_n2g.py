"""interp/n2g.py: oracles, brute force, and models set by hand whose neurons have a known meaning.

    python -m pytest tests/test_n2g.py

Where ../shared/oracles/interp exists, metrics, aggregates, entropies, prune and importance are compared with it.
"""

import hashlib
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "interp")]
import config as knobs
import n2g
from interp import activations
from interp.activations import Stopped
from model import GPTNeo, GPTNeoConfig, save_checkpoint
from prepare import EOT as EOT_TEXT
from prepare import load_tokenizer

ORACLES = sorted(ROOT.parent.glob("shared/oracles/interp/graph_oracle.json"))
oracle = pytest.mark.parametrize("path", ORACLES, ids=lambda path: path.name)
SPEC = {"name": "words", "pieces": ["ab", "<b>"]}
EOT, V, T = 258, 259, 16
A, B, C, D, E = map(ord, "abcde")
CPU = torch.device("cpu")


# ---- oracles


def oracle_graph(entry, self_loops):
    graph = nx.DiGraph()
    for node, activating in entry["nodes"].items():
        graph.add_node(node, activating=bool(activating), importance=1.0)
    graph.add_edges_from(edge for edge in entry["edges"] if self_loops or edge[0] != edge[1])
    return graph


@oracle
@pytest.mark.parametrize("self_loops", [False, True])
def test_metrics_are_the_oracles(path, self_loops):
    graphs = json.loads(path.read_text())["graphs"]
    for name, entry in graphs.items():
        expect = entry["expect"]["with_self_loops" if self_loops else "without_self_loops"]
        graph = oracle_graph(entry["graph"], self_loops)
        found = n2g.metrics(graph)
        assert found == {
            "density": expect["density"], "transitivity": expect["transitivity"],
            "edges_to_activating": expect["edges_to_activating_total"],
            "edges_per_activating_node": expect["edges_per_activating_node"], "out_degree": expect["out_degree"]}, name
        assert (graph.number_of_nodes(), graph.number_of_edges()) == (expect["n"], expect["m"])
    print(f"{len(graphs)} graphs equal, self_loops={self_loops}")


@oracle
def test_a_layers_means_are_the_oracles(path):
    content = json.loads(path.read_text())
    neurons = []
    for entry in content["graphs"].values():
        graph = oracle_graph(entry["graph"], False)
        neurons.append({"graph": nx.node_link_data(graph, edges="edges") if len(graph) else None,
                        "precision": None, "recall": None, "f1": None, **n2g.metrics(graph)})
    facts = n2g.graph_facts(neurons)
    for name, value in content["layer_aggregate_without_self_loops"].items():
        assert facts[name] == value, name
        print(name, facts[name], "equal")
    assert facts["precision"] is None
    assert facts["density_mean_all"] == pytest.approx(facts["density_mean_non_empty"] * 9 / 10)


@oracle
def test_entropies_are_the_oracles(path):
    for text, bits in json.loads(path.read_text())["entropy_bits"].items():
        counts = json.loads(text)
        assert n2g.subsampled(counts, sum(counts)) == (pytest.approx(bits, abs=1e-15), len(counts))
        print(text, bits, "equal")


class Synthetic:
    """The oracle's neuron, as a function of tokens; a word's token is its place in the vocabulary."""

    vocabulary = ["<eot>", "once", "there", "was", "the", "big", "cat", "who", "ran", "dog"]

    def __call__(self, idx):
        out = torch.zeros(*idx.shape, 1, dtype=torch.float64)
        for row, words in enumerate(self.words(idx.tolist())):
            for place, word in enumerate(words):
                near = words[max(0, place - 2) : place]
                out[row, place, 0] = {"cat": 2.0 if "the" in near else 1.2, "dog": 0.8}.get(word, 0.0)
        return out

    def words(self, rows):
        return [[self.vocabulary[token] for token in row] for row in rows]

    def tokens(self, words):
        return tuple(self.vocabulary.index(word) for word in words)


@oracle
def test_prune_and_importance_are_the_oracles(path):
    expect, neuron = json.loads(path.read_text())["synthetic_neuron"], Synthetic()
    at_pivot = n2g.AtPivot(neuron, 0, CPU)
    text = neuron.tokens(expect["text"][: expect["pivot"] + 1])
    assert neuron(torch.tensor([neuron.tokens(expect["text"])]))[0, :, 0].tolist() == expect["activations"]
    for length, value in expect["activation_of_suffix_by_length"].items():
        assert at_pivot([text[-int(length):]], [0]) == value
    for threshold, length in expect["shortest_kept_length"].items():
        one = n2g.Example(0, 2.0, text)
        assert n2g.prune(at_pivot, [one], float(threshold)) == [one]
        assert one.prompt == text[-length:] and one.base == at_pivot([one.prompt], [0])
    for level, important in ((0.5, []), (0.35, ["the"])):  # of the oracle's, without the pivot
        whole = n2g.Example(0, 2.0, text, prompt=text, base=2.0)
        n2g.weigh(at_pivot, [whole], mask=0, level=level)
        assert dict(zip(expect["text"], whole.importance)) == expect["importance_by_masking"]
        assert [expect["text"][place] for place in whole.important] == important
        assert [*important, "cat"] == expect[f"important_at_{str(level).replace('.', '_')}"]
    print("prune and importance equal", whole.importance)


def test_what_no_end_keeps_is_left_out_and_short_texts_are_tried_whole():
    neuron = Synthetic()
    at_pivot = n2g.AtPivot(neuron, 0, CPU)
    five = n2g.Example(0, 2.0, neuron.tokens(["once", "there", "the", "big", "cat"]))
    none = n2g.Example(0, 3.0, neuron.tokens(["once", "there", "was", "big", "cat"]))
    asked = []
    neuron_call = Synthetic.__call__
    at_pivot.activate = lambda idx: asked.append(idx.tolist()) or neuron_call(neuron, idx)
    assert n2g.prune(at_pivot, [five, none], 0.75) == [five]
    assert five.prompt == five.text[-3:] and none.prompt == ()
    assert [len(rows[0]) - 1 for rows in asked] == [1, 2, 3, 4, 5]  # then the text is at its end


# ---- reading prompts


def test_prompts_are_read_once_each_and_in_any_batch_alike(monkeypatch):
    rng = np.random.default_rng(0)
    table = torch.from_numpy(rng.normal(size=(10, 3)))
    rows = []

    def activate(idx):
        rows.extend(map(tuple, idx.tolist()))
        return table[idx].cumsum(1)

    prompts = [tuple(rng.integers(1, 10, rng.integers(1, 4)).tolist()) for _ in range(200)]
    units = rng.integers(0, 3, 200).tolist()
    expected = [float(table[[0, *prompt]].sum(0)[unit]) for prompt, unit in zip(prompts, units)]
    for size in (8192, 7, 1):
        monkeypatch.setattr(n2g, "TOKENS", size)
        rows.clear()
        assert n2g.AtPivot(activate, 0, CPU)(prompts, units) == pytest.approx(expected)
        assert sorted(rows) == sorted({(0, *prompt) for prompt in prompts})
    assert len(n2g.AtPivot(activate, 0, CPU)([], [])) == 0
    with pytest.raises(Stopped):
        n2g.AtPivot(activate, 0, CPU, SimpleNamespace(requested=True))(prompts, units)


# ---- substitutes


def test_ngrams_are_counted_by_brute_force():
    rng = np.random.default_rng(1)
    stream = rng.zipf(1.6, 3000).clip(1, 12).astype("<u2")
    stream[rng.random(3000) < 0.1] = 0  # end-of-text
    source = n2g.Ngrams(stream, 0)
    text = (3, 1, 2, 1, 5, 1)
    whole = [0, *stream.tolist()]
    backed_off = 0
    for place in range(len(text) - 1):
        left, right = text[place - 1] if place else 0, text[place + 1]
        between = Counter(b for a, b, c in zip(whole, whole[1:], whole[2:]) if (a, c) == (left, right))
        after = Counter(b for a, b in zip(whole, whole[1:]) if a == left)
        ranked = [*sorted(between, key=lambda b: (-between[b], b)), *sorted(after, key=lambda b: (-after[b], b))]
        expected = [token for token in dict.fromkeys(ranked) if token not in (text[place], 0)][:5]
        (found,) = source([(text, place)])
        assert found == expected
        backed_off += not set(found) <= set(between)
    assert backed_off
    assert source([((7, 9999, 9999), 1)])[0] and source([((9999, 1, 2), 1)]) == [[]]


def test_a_models_own_substitutes_are_its_likeliest_next_tokens():
    torch.manual_seed(0)
    model = GPTNeo(GPTNeoConfig(vocab_size=20, block_size=8, n_layer=2, n_head=2, n_embd=8, embd_std=1.0))
    queries = [((3, 1, 2, 5), place) for place in range(3)] + [((3, 1, 4), 2)]
    found = n2g.NextTokens(model, 19, CPU)(queries)
    for (text, place), tokens in zip(queries, found):
        logits = model(torch.tensor([[19, *text[:place]]]))[0, -1]
        order = [token for token in logits.argsort(descending=True).tolist() if token not in (text[place], 19)]
        assert tokens == order[:5]
    assert n2g.no_substitutes(queries) == [[]] * 4


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory):
    """A folder with a random DistilBert that knows single letters, two words and two pieces."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("distilbert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "ab", "ba", "##c", "##ab", ","]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(words), dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=64)
    transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes)).save_pretrained(folder)
    return folder


def test_a_fill_mask_gives_single_tokens_of_ours(distilbert):
    tokenizer = load_tokenizer(SPEC)
    source = n2g.FillMask(str(distilbert), tokenizer, CPU)
    queries = [((A, B, C), 1), ((A, B, C), 0), ((ord(","), A, B, D), 1)]
    found = source(queries)
    assert found == [source([query])[0] for query in queries] == n2g.FillMask(str(distilbert), tokenizer, CPU)(queries[::-1])[::-1]
    letters = {*map(ord, "abcdefgh,"), 256}  # 256: "ab"; "ba" is two tokens
    for (text, place), tokens in zip(queries, found):
        assert len(tokens) == 5 and set(tokens) <= letters - {text[place]}
    # by hand: the likeliest words at the mask
    text = source.masked(*queries[0])
    assert text.replace(" ", "") == "a[MASK]c"
    inputs = source.words(text, return_tensors="pt")
    place = inputs["input_ids"][0].tolist().index(source.words.mask_token_id)
    order = source.model(**inputs).logits[0, place].argsort(descending=True)
    words = [word.removeprefix("##") for word in source.words.convert_ids_to_tokens(order.tolist())]
    expected = [tokenizer.encode_ordinary(word)[0] for word in words if len(tokenizer.encode_ordinary(word)) == 1]
    assert found[0] == [token for token in dict.fromkeys(expected) if token != B][:5]


def test_words_take_the_place_of_a_token_with_its_space_and_capital():
    tokenizer = load_tokenizer({"name": "words", "pieces": [" cat", " Cat", "Cat", "ing", " dog"]})
    source = n2g.FillMask.__new__(n2g.FillMask)
    source.tokenizer = tokenizer
    source.words = SimpleNamespace(convert_ids_to_tokens=lambda words: words, all_special_tokens=["[SEP]"])

    def named(words, token):
        (token,) = tokenizer.encode_ordinary(token)
        return [tokenizer.decode([one]) for one in source.as_tokens(words, token)]

    words = ["[SEP]", "cat", "dog", "##ing", "nothing"]
    assert named(words, " dog") == [" cat", "ing"]
    assert named(words, " Cat") == []  # " Dog" and "Ing" are no single tokens
    assert named([*words, "x"], "Cat") == ["X"]
    assert named(words, " cat") == [" dog", "ing"]


# ---- trie, graph, pools


def test_a_trie_predicts_as_all_its_paths_by_brute_force():
    rng = np.random.default_rng(2)
    paths = {tuple(rng.integers(-1, 4, rng.integers(1, 4)).tolist()): float(rng.random()) for _ in range(20)}
    paths = {path: value for path, value in paths.items() if path[0] != n2g.IGNORE}
    trie = n2g.Trie()
    for path, value in paths.items():
        trie.add(path, value)
        trie.add(path, value / 2)  # the larger one stays
    tokens, hits = rng.integers(0, 5, 60).tolist(), 0
    for place in range(len(tokens)):
        best = 0.0
        for path, value in paths.items():
            back = tokens[place :: -1][: len(path)]
            matches = len(back) == len(path) and all(key in (n2g.IGNORE, token) for key, token in zip(path, back))
            best = max(best, value if matches else 0.0)
        assert trie.predict(tokens, place) == best
        hits += best > 0
    assert 5 < hits < 55


def example(words, important, fillers=(), value=1.0, importance=None):
    """An Example whose tokens are words."""
    shares = importance or [0.9] * len(words)
    return n2g.Example(0, value, tuple(words), tuple(words), value, shares, list(important), list(fillers))


def test_a_path_goes_back_to_the_first_important_token():
    assert n2g.path_of((1, 2, 3, 4), [1]) == [4, n2g.IGNORE, 2]
    assert n2g.path_of((1, 2, 3, 4), [0, 2]) == [4, 3, n2g.IGNORE, 1]
    assert n2g.path_of((1, 2, 3, 4), []) == [4]


def test_judging_counts_predicted_and_actual_moments():
    trie = n2g.trie_of([example((1, 2), [0]), example((5,), []), example((6,), [], value=0.4)])
    # fires at 2 after 1, which is in the context, and at 7; not at 5, though told; 6 is below half
    pieces = [([1, 2, 5, 7], [0.6, 0.1, 0.5]), ([2, 6], [0.0, 0.45])]
    assert n2g.judge(trie, 1.0, pieces) == {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2}
    assert n2g.judge(trie, 1.0, [([9], [0.9])]) == {"precision": None, "recall": 0.0, "f1": 0.0}
    assert n2g.judge(trie, 1.0, [([5], [0.1])]) == {"precision": 0.0, "recall": None, "f1": 0.0}
    assert n2g.judge(trie, 1.0, []) == {"precision": None, "recall": None, "f1": None}


def test_a_graph_goes_from_important_tokens_to_the_pivot_by_way_of_their_fillers():
    examples = [example("abcd", [0, 2], [(2, "x")], importance=[0.6, 0.1, 0.7, 1.0]),
                example("bd", [0], importance=[0.5, 0.8]), example("c", [], importance=[0.9])]
    graph = n2g.graph_of(examples, str)
    assert set(graph.edges) == {("a", "c"), ("c", "d"), ("a", "x"), ("x", "d"), ("b", "d")}
    assert {node for node, yes in graph.nodes(data="activating") if yes} == {"d", "c"}
    assert dict(graph.nodes(data="importance")) == {"a": 0.6, "b": 0.5, "c": 0.9, "x": 0.7, "d": 1.0}
    assert Counter(examples[0].pool()) == Counter("dacx")


def test_self_loops_are_there_on_request():
    """The published reading: a pivot without context points to itself; so does a token that follows itself."""
    examples = [example("c", []), example("aab", [0, 1])]
    assert set(n2g.graph_of(examples, str).edges) == {("a", "b")}
    assert set(n2g.graph_of(examples, str, self_loops=True).edges) == {("c", "c"), ("a", "a"), ("a", "b")}
    lone = n2g.graph_of(examples[:1], str, self_loops=True)
    assert n2g.metrics(lone)["out_degree"] == 1 and n2g.metrics(lone)["edges_to_activating"] == 1
    assert n2g.metrics(n2g.graph_of(examples[:1], str))["out_degree"] == 0


@pytest.mark.parametrize("counts", [[3, 1], [2, 2, 1, 1], [5], [1, 1, 1, 1]])
def test_what_is_expected_of_a_smaller_pool_is_the_mean_over_all_of_them(counts):
    pool = [kind for kind, count in enumerate(counts) for _ in range(count)]
    for size in range(1, len(pool) + 1):
        entropies, kinds = [], []
        for drawn in itertools.combinations(pool, size):
            shares = [count / size for count in Counter(drawn).values()]
            entropies.append(-sum(share * math.log2(share) for share in shares))
            kinds.append(len(shares))
        entropy, diversity = n2g.subsampled(counts, size)
        assert entropy == pytest.approx(np.mean(entropies), abs=1e-12)
        assert diversity == pytest.approx(np.mean(kinds), abs=1e-12)


def test_tokens_have_one_of_eight_types():
    found = {token: n2g.token_type(token) for token in (
        ".", "\n", EOT_TEXT, ' "', ",", " The", " a", " to", " under", " and", " because", " she", " That", " was", "'t", "'ll",
        "'em", "ing", "the", "\\xe2", " cat", "Once", " 3", "7", "Tom")}
    kinds = [n2g.PUNCTUATION] * 5 + ["article"] * 2 + ["preposition"] * 2 + ["conjunction"] * 2 + ["pronoun"] * 2
    kinds += ["auxiliary"] * 3 + [n2g.FRAGMENT] * 4 + [n2g.CONTENT] * 5
    assert list(found.values()) == kinds
    assert len(n2g.TYPES) == 8 and set(kinds) == set(n2g.TYPES)


def test_pools_are_compared_at_equal_size():
    rows = [{"entropy": 9, "diversity": 9, "pool_size": 4}, {"entropy": 1, "diversity": 2, "pool_size": 2}]
    first, second = n2g.equal_pools(rows, [{"a": 2, "b": 2}, {"a": 1, "b": 1}])
    assert first == {"entropy": pytest.approx(2 / 3), "diversity": pytest.approx(5 / 3), "pool_size": 2}
    assert second == {"entropy": pytest.approx(1), "diversity": pytest.approx(2), "pool_size": 2}
    assert n2g.equal_pools(rows, [{}, {"a": 1}])[1]["entropy"] is None
    assert n2g.pool_facts({}) == {"entropy": None, "diversity": 0, "pool_size": 0, "types": dict.fromkeys(n2g.TYPES)}


# ---- models set by hand

LETTERS = {token: place for place, token in enumerate([*range(ord("a"), ord("n") + 1), EOT])}  # others share place 15
TOKEN, PLACE, BEFORE, BACK = 0, 16, 32, 48  # where a channel tells token, position, the token before, three before


@torch.no_grad()
def set_by_hand():
    """One block, 64 channels. Its neurons 0 to 5 fire on e; on b after a; on d three after c; on nothing; on f, and a third
    as strongly on g; on b after a or c. The others are dead. Head 0 copies the token before, head 1 that three before."""
    model = GPTNeo(GPTNeoConfig(vocab_size=V, block_size=T, n_layer=1, n_head=2, n_embd=64, ablation="none"))
    for name, weight in model.named_parameters():
        weight.zero_() if "ln" not in name or "bias" in name else weight.fill_(1)
    wte, wpe = model.transformer["wte"].weight, model.transformer["wpe"].weight
    for token in range(V):
        wte[token, TOKEN + LETTERS.get(token, 15)] = 1
    for position in range(T):
        wpe[position, PLACE + position] = 1
    x = torch.zeros(64)
    x[:2] = 1  # token and position: what ln_1 sees, but for the order of its channels
    high, low = torch.layer_norm(x, (64,))[[0, -1]].tolist()
    attention = model.transformer["h"][0].attn["attention"]
    for head, steps in ((0, 1), (1, 3)):
        for position in range(T):
            if position >= steps:
                attention.q_proj.weight[32 * head + position - steps, PLACE + position] = 20
            attention.k_proj.weight[32 * head + position, PLACE + position] = 1
        for letter in range(16):
            attention.v_proj.weight[32 * head + letter, TOKEN + letter] = 1 / (high - low)
            attention.out_proj.weight[BEFORE + 16 * head + letter, 32 * head + letter] = 1
    attention.out_proj.bias[BEFORE:] = -low / (high - low)  # x gets a 1 where that letter was
    x[:4] = 1
    high, low = torch.layer_norm(x, (64,))[[0, -1]].tolist()
    mlp = model.transformer["h"][0].mlp

    def neuron(number, bias, **weights):
        """Its input is 20 times the sum of these weights of what is there, plus a bias."""
        for channel, weight in weights.items():
            kind, letter = channel.split("_")
            at = {"token": TOKEN, "before": BEFORE, "back": BACK}[kind] + LETTERS[ord(letter)]
            mlp.c_fc.weight[number, at] = 20 * weight / (high - low)
            mlp.c_fc.bias[number] -= 20 * weight * low / (high - low)
        mlp.c_fc.bias[number] += 20 * bias

    mlp.c_fc.bias.fill_(-20)
    mlp.c_fc.bias[:6] = 0
    neuron(0, -0.5, token_e=1)
    neuron(1, -1.5, token_b=1, before_a=1)
    neuron(2, -1.5, token_d=1, back_c=1)
    neuron(3, -1)
    neuron(4, -0.5, token_f=1.1, token_g=0.7)
    neuron(5, -1.5, token_b=1, before_a=1, before_c=1)
    return model


def stories(count=700, seed=0):
    """Random letters a to n; the last ones of a story are such that nothing fires on them in the next one."""
    rng = np.random.default_rng(seed)
    texts = [[*rng.integers(ord("a"), ord("n") + 1, rng.integers(3, 30)).tolist(), *b"hij", EOT] for _ in range(count)]
    return np.array(sum(texts, []), dtype="<u2")


def write_run(folder, model, tokens, name="by_hand"):
    data, out = folder / "data", folder / "out" / name
    data.mkdir(exist_ok=True)
    out.mkdir(parents=True)
    meta = {"tokenizer": SPEC, "vocab_size": V, "eot": EOT, "checksum": "abc", "source": {}}
    for split in ("train", "val"):
        tokens.tofile(data / f"{split}.bin")
        meta[split] = {"tokens": len(tokens), "stories": int((tokens == EOT).sum()), "bytes": len(tokens),
                       "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
    (data / "meta.json").write_text(json.dumps(meta))
    save_checkpoint(out / "best.pt", model.config, model.state_dict(), step=7, tokenizer=SPEC, data="abc",
                    train_config={"data": str(data), "seed": 5})
    return out


@pytest.fixture
def call(monkeypatch, capsys):
    """n2g.py with these words -> its exit message, what it printed. call.stop.requested = True is a Ctrl-C."""
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["n2g.py", *map(str, words)])
        call.stop, message = SimpleNamespace(requested=False), None
        try:
            knobs.cli(n2g.main)
        except SystemExit as stop:
            message = stop.code
        return message, capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(knobs, "StopRequest", lambda: call.stop)  # pytest keeps its own Ctrl-C
        patch.setattr(n2g, "save_figure", lambda path, figure: Path(path).write_text("a picture"))  # which takes seconds
        yield call


def found_in(out):
    result = json.loads((out / "n2g.json").read_text())
    neurons = json.loads((out / "n2g_neurons.json").read_text())
    assert neurons["checkpoint"] == result["checkpoint"] and neurons["settings"] == result["settings"]
    return result, neurons["neurons"]


def edges_of(neuron):
    return {(edge["source"], edge["target"]) for edge in neuron["graph"]["edges"]}


def pivots_of(neuron):
    return {node["id"] for node in neuron["graph"]["nodes"] if node["activating"]}


def test_neurons_of_known_meaning_get_the_right_graphs(tmp_path, call):
    """On one token, on a bigram, on a token three back, on nothing, on two tokens, on either of two bigrams."""
    out = write_run(tmp_path, set_by_hand(), stories())
    message, printed = call(out, "--device=cpu", "--draw=0.2,0.3")
    assert message is None and "by_hand" in printed and "graphs:" in printed
    result, neurons = found_in(out)
    unigram, bigram, back, nothing, two, either = neurons[:6]
    assert [(one["layer"], one["neuron"]) for one in neurons] == [(0, number) for number in range(256)]
    for one in (unigram, bigram, back):
        assert one["peak"] == pytest.approx(10, rel=0.1)
        assert (one["precision"], one["recall"], one["f1"]) == (1.0, 1.0, 1.0)
    assert unigram["graph"]["nodes"] == [{"importance": pytest.approx(1, abs=0.01), "activating": True, "id": "e"}]
    assert edges_of(unigram) == set() and unigram["density"] == unigram["out_degree"] == 0
    for one, edge in ((bigram, ("a", "b")), (back, ("c", "d"))):
        assert edges_of(one) == {edge} and pivots_of(one) == {edge[1]}
        assert all(node["importance"] > 0.9 for node in one["graph"]["nodes"])
        assert (one["density"], one["transitivity"], one["edges_to_activating"], one["out_degree"]) == (0.5, 0, 1, 0.5)
    for one in (nothing, *neurons[6:]):
        assert one["graph"] is one["f1"] is one["out_degree"] is None and one["peak"] <= 0
    assert pivots_of(two) == {"f"} and two["f1"] == 1.0
    assert edges_of(either) == {("a", "b"), ("c", "b")} and either["f1"] == 1.0
    assert (either["edges_to_activating"], either["edges_per_activating_node"], either["density"]) == (2, 2, 1 / 3)
    (row,) = result["layers"]
    assert (row["neurons"], row["non_empty"], row["pruned"]) == (256, 5, 1.0)
    assert set(row["pool"]) == set("abcdef") and [row["pool"][letter] for letter in "bedf"] == [20, 10, 10, 10]
    shares = np.array(list(row["pool"].values())) / row["pool_size"]
    assert row["entropy"] == pytest.approx(-shares @ np.log2(shares)) and row["diversity"] == 6
    assert row["types"][n2g.FRAGMENT] == 1 and row["out_degree_pooled"] == 4 / 9
    assert result["all"] == {name: row[name] for name in result["all"]}
    assert (out / "n2g.png").exists() and (out / "n2g_graphs.png").exists()


def job_of(model, tokens, **changes):
    settings = {"layer": [0], "snippets": 20, "threshold": 0.5, "importance": 0.5, "self_loops": False} | changes
    inputs = n2g.Inputs(tokens, load_tokenizer(SPEC), EOT, "ngram", None)
    return SimpleNamespace(run=SimpleNamespace(model=model, path="x"), settings=settings, inputs=inputs)


def graphs(model, tokens, **changes):
    """The entries of the neurons of block 0, without files."""
    job = job_of(model, tokens, **changes)
    text, sites = n2g.text_of(job, CPU), [n2g.Site(model, 0, "mlp_act")]
    (moments,) = n2g.moments_of(sites, text, *n2g.strongest(sites, text, 20))
    return n2g.graphs_of_layer(job, sites[0], text, moments, n2g.source_of(job, CPU, None))["neurons"]


def test_what_a_pivot_needs_is_pruned_to_the_length_that_reaches_it(monkeypatch):
    model, tokens, seen = set_by_hand().double(), stories(), []
    graph_of = n2g.graph_of
    monkeypatch.setattr(n2g, "graph_of", lambda examples, *more: seen.append(examples) or graph_of(examples, *more))
    graphs(model, tokens)
    assert {one.prompt for one in seen[0]} == {(E,)} and {one.prompt for one in seen[1]} == {(A, B)}
    for one in seen[2]:
        assert len(one.prompt) == 4 and (one.prompt[0], one.prompt[3]) == (C, D) and one.important == [0]
        assert one.fillers == [] and one.text[-4:] == one.prompt
    for one in seen[5]:  # whichever of the two was there, the other one does as well, if it is among the five tried
        assert one.prompt[1] == B and {one.prompt[0], *(token for _, token in one.fillers)} <= {A, C}
    assert {one.fillers[0] for one in seen[5] if one.fillers} == {(0, A), (0, C)}
    assert seen[3] == [] and len(seen[0]) == len(seen[2]) == 10
    # the text of the moment: in its story, and no more than the window's half
    assert all(len(one.text) <= T // 2 and EOT not in one.text[:-1] for examples in seen for one in examples)


def test_graphs_do_not_depend_on_the_batch_size(monkeypatch):
    model, tokens = tiny().double(), stories(60)
    whole = graphs(model, tokens)
    monkeypatch.setattr(n2g, "TOKENS", 50)
    monkeypatch.setattr(activations, "TOKENS", 50)
    for one, other in zip(whole, graphs(model, tokens)):
        assert json.dumps(rounded(one)) == json.dumps(rounded(other))
    assert sum(one["graph"] is not None for one in whole) > 20


def rounded(entry):
    nodes = [node | {"importance": round(node["importance"], 9)} for node in (entry["graph"] or {"nodes": []})["nodes"]]
    return entry | {"peak": round(entry["peak"], 9), "graph": entry["graph"] and entry["graph"] | {"nodes": nodes}}


def tiny(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_embd=8, ablation="local")
    model = GPTNeo(GPTNeoConfig(**{**sizes, **changes}))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.3)
    return model


# ---- the command line


def essence(out):
    result, neurons = found_in(out)
    return {name: result[name] for name in ("settings", "checkpoint", "all", "layers")}, neurons


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path, tiny(), stories(60), "tiny")


def test_a_stopped_run_goes_on_to_the_same_result(run, tmp_path, call, monkeypatch):
    assert call(run, "--device=cpu")[0] is None
    whole = essence(run)
    other = write_run(tmp_path, tiny(), stories(60), "other")
    check, calls = n2g.check_stop, []

    def stop_later(stop):
        calls.append(stop)
        stop.requested = len(calls) == 25
        check(stop)

    monkeypatch.setattr(n2g, "check_stop", stop_later)
    stops = 0
    while stops < 20:
        message, printed = call(other, "--device=cpu")
        if message is None:
            break
        assert message == "stopped: the same command again goes on from here" and printed == ""
        assert not (other / "n2g.json").exists()
        stops += 1
    assert stops == 1 and not (other / "n2g.resume.pt").exists()
    done = essence(other)
    assert done[0] == whole[0] and done[1] == whole[1]


def test_what_is_done_is_not_done_again_when_it_goes_on(run, call, monkeypatch):
    real, layers = n2g.graphs_of_layer, []

    def killed(job, site, *words):
        layers.append(site.layer)
        if len(layers) == 2:
            raise KeyboardInterrupt  # as a kill: nothing is tidied up
        return real(job, site, *words)

    monkeypatch.setattr(n2g, "graphs_of_layer", killed)
    assert call(run, "--device=cpu")[0] == "stopped"
    monkeypatch.setattr(n2g, "strongest", None)
    with monkeypatch.context() as patch:
        patch.setattr(n2g, "draw_layers", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call(run, "--device=cpu")[0] == "stopped"  # all blocks are done, the result is not there
    assert call(run, "--device=cpu")[0] is None and layers == [0, 1, 1]
    assert found_in(run)[0]["seconds"] > 0 and not (run / "n2g.resume.pt").exists()


def test_several_runs_are_tabled_side_by_side(run, tmp_path, call):
    other = write_run(tmp_path, tiny(n_head=1), stories(60), "other")
    message, printed = call(run, other, "--device=cpu", f"--plot={tmp_path / 'all.png'}")
    assert message is None and (tmp_path / "all.png").stat().st_size
    graphs, pools, types = (table.splitlines() for table in printed.split("\n\n"))
    order = [("tiny", "all"), ("other", "all"), ("tiny", "0"), ("other", "0"), ("tiny", "1"), ("other", "1")]
    for lines in (graphs, pools):
        rows = [line.split() for line in lines[1:7]]
        assert [(Path(row[0]).name, row[1]) for row in rows] == order
    assert len(types) == 4 and types[0].split("  ")[-1].strip() == n2g.CONTENT
    rows = n2g.table_rows([json.loads((folder / "n2g.json").read_text()) for folder in (run, other)])
    for pair in (rows[:2], rows[2:4], rows[4:]):
        assert pair[0]["pool_size"] == pair[1]["pool_size"]
    smaller = min(rows[2:4], key=lambda row: sum(row["pool"].values()))
    assert smaller["diversity"] == pytest.approx(len(smaller["pool"]))
    assert call(run, other, "--device=cpu")[1] == printed  # nothing is measured again


@pytest.mark.parametrize("words", [("--substitutes=lm",), ("--substitutes=none",), ("--self_loops",), ("--mask_token=z",),
                                   ("--layer=1",), ("--tokens=300",), ("--snippets=6",), ("--threshold=0.9", "--importance=0.2")])
def test_every_knob_has_an_effect_and_its_place_in_the_settings(run, call, words):
    assert call(run, "--device=cpu")[0] is None
    before = essence(run)
    message, _ = call(run, "--device=cpu", *words)
    assert "was made with" in message and "--force replaces it" in message
    assert call(run, "--device=cpu", "--force", *words)[0] is None
    assert essence(run)[1] != before[1]


def test_neurons_are_sorted_however_blocks_are_named(run, call):
    assert call(run, "--device=cpu", "--layer=1,0")[0] is None
    places = [(one["layer"], one["neuron"]) for one in found_in(run)[1]]
    assert places == sorted(places) and call(run, "--device=cpu")[0] is None  # the same blocks


def test_substitutes_come_from_distilbert(run, call, distilbert):
    words = (run, "--device=cpu", "--substitutes=distilbert", f"--fill_mask={distilbert}")
    message, _ = call(*words[:-1], "--fill_mask=nowhere/at/all")
    assert message.startswith("error: --fill_mask=nowhere/at/all cannot be loaded") and "\n" not in message
    assert call(*words)[0] is None
    result, neurons = found_in(run)
    assert result["settings"]["substitutes"] == f"distilbert: {distilbert}"
    nodes = {node["id"] for one in neurons if one["graph"] for node in one["graph"]["nodes"]}
    assert "ab" in nodes  # no story has that token


def test_graphs_are_drawn_from_a_finished_result(run, call, monkeypatch):
    assert call(run, "--device=cpu")[0] is None
    drawn = []
    monkeypatch.setattr(n2g, "draw_graphs", lambda path, neurons, title: drawn.append([path.name, *neurons]))
    assert call(run, "--device=cpu", "--draw=1.3,0.31")[0] is None
    ((name, *neurons),) = drawn
    assert name == "n2g_graphs.png" and [(one["layer"], one["neuron"]) for one in neurons] == [(1, 3), (0, 31)]


def lines_of(figure):
    return [{line.get_linestyle(): line.get_ydata().tolist() for line in axes.lines} for axes in figure.axes]


def test_the_picture_has_every_metric_by_block(run, call, monkeypatch):
    assert call(run, "--device=cpu")[0] is None
    result, figures = json.loads((run / "n2g.json").read_text()), []
    with monkeypatch.context() as patch:  # undone before what call has put there
        patch.setattr(n2g, "save_figure", lambda path, figure: figures.append(figure))
        n2g.draw_layers("a.png", [result, result])
    panels = lines_of(figures[0])
    for lines, name in zip(panels, n2g.PICTURED):
        assert lines["-"] == [row[f"{name}_mean_non_empty"] for row in result["layers"]]
        assert lines["--"] == [row[f"{name}_mean_all"] for row in result["layers"]]
    for lines, name in zip(panels[4:], n2g.ALONE):
        assert lines["-"] == [row[name] for row in result["layers"]]
    assert panels[7]["-"] == [row["non_empty"] / row["neurons"] for row in result["layers"]] and len(panels) == 8


def test_a_drawn_graph_has_its_tokens_and_edges(monkeypatch, tmp_path):
    graph = n2g.graph_of([example(["$a", "\n", " c"], [0, 1]), example(["b"], [])], str)
    one = {"layer": 1, "neuron": 2, "peak": 3.0, "f1": None, "graph": nx.node_link_data(graph, edges="edges")}
    assert n2g.columns_of(one) == {0: [" c", "b"], 1: ["\n"], 2: ["$a"]}
    assert n2g.columns_of(one | {"graph": None}) == {}
    n2g.draw_graphs(tmp_path / "a.png", [one, one | {"graph": None}], "a title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    figures = []
    monkeypatch.setattr(n2g, "save_figure", lambda path, figure: figures.append(figure))
    n2g.draw_graphs("a.png", [one, one | {"graph": None}], "a title")
    words = [text.get_text() for text in figures[0].axes[0].texts]
    assert sorted(words) == sorted(["", "", r"\$a", "↵", "·c", "b"])  # two arrows, four nodes


def test_many_neurons_are_read_a_few_blocks_at_a_time(monkeypatch):
    model, tokens = tiny(), stories(60)
    text, sites = n2g.text_of(job_of(model, tokens), CPU), [n2g.Site(model, layer, "mlp_act") for layer in (0, 1)]
    values, positions = n2g.strongest(sites, text, 20)
    together = list(n2g.moments_of(sites, text, values, positions))
    assert values.shape == positions.shape == (2, 32, 20) and len(together[1].held_out) == 32
    monkeypatch.setattr(n2g, "SCANNED", 1)
    assert [len(group) for group in n2g.groups_of(sites)] == [1, 1]
    assert all(map(torch.equal, n2g.strongest(sites, text, 20), (values, positions)))
    for one, other in zip(together, n2g.moments_of(sites, text, values, positions)):
        assert torch.equal(one.values, other.values) and one.held_out == other.held_out
    for moments, site in zip(together, sites):  # of the same neurons as the values
        alone = text.snippets(site.read, moments.positions[:, 1::2], 8, 7)
        assert moments.held_out == alone
        assert all(snippet.values[snippet.peak] == value for unit, row in zip(alone, moments.values[:, 1::2].tolist())
                   for snippet, value in zip(unit, row))
