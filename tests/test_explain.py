"""interp/explain.py: against the oracle, brute force and neurons of known meaning; and a real server on loopback.

    python -m pytest tests/test_explain.py

Where ../shared/oracles/interp exists, correlations, levels, expected values and the table are compared with it. The
language model is played by an HTTP server that speaks the API, behind the real package openai.
"""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "interp")]
import config as knobs
import explain
from explain import Neuron, Record, Table, Unreadable
from interp import activations
from model import GPTNeo, GPTNeoConfig, load_checkpoint, save_checkpoint
from prepare import UserError

ORACLES = sorted(ROOT.parent.glob("shared/oracles/interp/explain_oracle.json"))
V, EOT, T = 259, 258, 8  # 256 bytes, two words, end-of-text; tokens of a window
CPU = torch.device("cpu")
A, B, C_ = (ord(letter) for letter in "abc")


def words(count, seed):
    """Stories of 4 to 29 of the letters a to h, each with its end-of-text."""
    rng, stream = np.random.default_rng(seed), []
    for _ in range(count):
        stream += [*rng.integers(A, A + 8, rng.integers(4, 30)), EOT]
    return np.array(stream, dtype="<u2")


def meaning_model(dtype=torch.float64):
    """Neurons of known meanings: layer 0 neuron 0 fires on "b", 1 on "c"; layer 1 neuron 0 on "b" after "a"; no other.

    Attention of layer 1 sees this token and the one before it, and writes the mean of their letters beside the token's
    own; layer 0 has none.
    """
    model = GPTNeo(GPTNeoConfig(vocab_size=V, block_size=16, n_layer=2, n_head=1, n_embd=20, attention_layers="local",
                                window_size=2, ablation="none"))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        first, second = model.transformer["h"]
        for ln in (first.ln_1, first.ln_2, second.ln_1, second.ln_2, model.transformer["ln_f"]):
            ln.weight.fill_(1)
        for channel in range(8):  # a letter is one channel, end-of-text none of them
            model.transformer["wte"].weight[A + channel, channel] = 1
            second.attn["attention"].v_proj.weight[8 + channel, channel] = 1
        second.attn["attention"].out_proj.weight.copy_(torch.eye(20))
        first.mlp.c_fc.bias.fill_(-40)
        second.mlp.c_fc.bias.fill_(-55)
        first.mlp.c_fc.weight[0, 1] = first.mlp.c_fc.weight[1, 2] = 30
        second.mlp.c_fc.weight[0, 1], second.mlp.c_fc.weight[0, 8] = 30, 10
    return model.to(dtype).eval()


def settings(**changes):
    return {"window": T, "tokens": 10**6, "seed": 0, "neurons": None, "lookup": "corpus"} | changes


def texts_of(train=words(200, 0), val=words(60, 1), **changes):
    return explain.choose_texts(train, val, {"eot": EOT, "vocab_size": V}, settings(**changes), CPU)


def letter(token):
    return chr(token) if token < 256 else "<end>"


def work(texts, answers=None, **changes):
    return explain.Work(settings(**changes), texts, letter, answers, 2, None)


def explained(model, texts=None, **changes):
    found = []
    explain.explain_model(model, work(texts or texts_of(**changes), **changes), "test", found, lambda: None)
    return found


# ---- the scores


@pytest.mark.parametrize("path", ORACLES, ids=lambda path: path.name)
def test_the_oracle(path):
    oracle = json.loads(path.read_text())
    worst = 0.0

    def compare(ours, theirs):
        nonlocal worst
        assert (ours is None) == (theirs is None)
        if ours is not None:
            worst = max(worst, abs(ours - theirs))

    for case in oracle["correlation"].values():
        compare(explain.correlation(case["real"], case["simulated"])[0], case["score"])
    pairs = oracle["pooled"]["sequences"]
    compare(explain.pooled_correlation([real for real, _ in pairs], [simulated for _, simulated in pairs])[0],
            oracle["pooled"]["pooled_score"])
    levels = oracle["discretise"]
    assert explain.discretise(np.array(levels["activations"]), levels["max_activation"]).tolist() == levels["discretised"]
    expected = oracle["expected_value"]
    compare(explain.expected_value(expected["logprobs"].items()), expected["expected_value"])
    lookup = oracle["token_lookup"]
    vocabulary = sorted({token for split in ("train", "test") for record, _ in lookup[split] for token in record})
    train, test = ([Record(np.array([vocabulary.index(token) for token in tokens]), np.array(values))
                    for tokens, values in lookup[split]] for split in ("train", "test"))
    table = explain.lookup_table(train, len(vocabulary), lookup["unseen_token_value"])
    for token, value in lookup["table"].items():
        compare(table.values[vocabulary.index(token)], value)
    simulated = [table.values[record.tokens] for record in test]
    assert [one.tolist() for one in simulated] == lookup["simulated"]
    compare(explain.pooled_correlation([record.values for record in test], simulated)[0], lookup["score"])
    assert worst < 1e-12
    print(f"explain_oracle.json: within {worst:.0e}")


def test_correlations_and_levels_by_brute_force():
    rng = np.random.default_rng(0)
    for case in range(200):
        sizes = rng.integers(1, 6, rng.integers(1, 5))
        real = [rng.integers(-3, 4, size) * rng.choice([1e-9, 1, 1e9]) for size in sizes]
        simulated = [rng.integers(-3, 4, size) / 7 for size in sizes]
        score, reason = explain.pooled_correlation(real, simulated)
        flat = [[float(x) for part in parts for x in part] for parts in (real, simulated)]
        if any(len(set(values)) == 1 for values in flat):
            constant = "its activations are" if len(set(flat[0])) == 1 else "its simulation is"
            assert score is None and reason == f"{constant} constant"
        else:
            assert score == pytest.approx(statistics.correlation(*flat), abs=1e-12) and reason is None
        values, largest = rng.normal(size=9), rng.random() + 0.1
        levels = [min(10, math.floor(10 * max(0, value) / largest)) for value in values]
        assert explain.discretise(values, largest).tolist() == levels


def test_a_constant_that_rounds_is_constant():
    assert explain.correlation([0.1] * 7, [1, 2, 3, 4, 5, 6, 7])[0] is None  # its mean is not exactly 0.1
    assert explain.correlation([1, 2, 3, 4, 5, 6, 7], [0.1] * 7)[0] is None


def test_the_score_of_random_text_is_its_own():
    real = [np.array([0.0, 1, 0])] * 5 + [np.array([0.0, 0, 0])] * 5
    neuron = Neuron(0, 0, 1.0, [], [Record(None, values) for values in real])
    simulated = [np.array([0.0, 2, 0])] * 10
    found = explain.score_simulation(neuron, simulated)
    flat = [list(map(float, np.concatenate(parts))) for parts in (real, simulated)]
    assert found["score"] == pytest.approx(statistics.correlation(*flat)) and found["random_score"] is None
    assert found["reason"] == "in random text its activations are constant"
    assert explain.score_simulation(neuron._replace(peak=0.0), simulated) == {
        "score": None, "random_score": None, "reason": "it never fires"}


# ---- windows and records


def test_windows_lie_within_stories():
    stream = words(50, 3)
    starts, stories = explain.story_windows(stream, EOT, T, CPU)
    number = np.cumsum(stream == EOT) - (stream == EOT)
    assert (np.diff(starts) >= T).all()
    for start, story in zip(starts, stories, strict=True):
        assert set(number[start : start + T]) == {story}
    lengths = np.bincount(number)
    assert np.array_equal(np.bincount(stories, minlength=50), lengths // T)  # as many as fit
    ends = np.flatnonzero(stream == EOT)
    odd = stories % 2 == 1
    assert ((starts[~odd] - (np.concatenate(([-1], ends))[stories[~odd]] + 1)) % T == 0).all()
    assert ((ends[stories[odd]] + 1 - starts[odd]) % T == 0).all()


def test_records_by_brute_force(monkeypatch):
    """The strongest windows of every neuron, one a story, dealt out four ways; random ones in other stories."""
    monkeypatch.setattr(activations, "TOKENS", 40)
    torch.manual_seed(0)
    model = GPTNeo(GPTNeoConfig(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_embd=4, ablation="none")).double()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.5)
    val = words(60, 1)
    texts = texts_of(val=val)
    units = explain.sample_units(model.config, settings())
    neurons = explain.find_records(explain.reader_of(model, units), units, texts, None, "test")
    starts, stories = explain.story_windows(val, EOT, T, CPU)
    at_random = {int(start) for start in texts.random}
    used = set(np.setdiff1d(stories, texts.search.stories(texts.search.starts)))  # stories of the 15 random windows
    assert len(at_random) == 5 and len(used) == 15 and at_random <= set(starts[np.isin(stories, list(used))])
    idx = torch.from_numpy(val[starts[:, None] + np.arange(T)].astype(np.int64))
    with torch.no_grad():
        _, inputs, _ = model.clean_pass(idx)
        values = []
        for block, x in zip(model.transformer["h"], inputs):
            h = block.ln_2(x + block.attn["attention"](block.ln_1(x))[0])
            values.append(torch.nn.functional.gelu(block.mlp.c_fc(h), approximate="tanh"))
    values = torch.cat(values, -1).numpy()  # (windows, T, 32)
    for unit, neuron in enumerate(neurons):
        best = {}
        for window, story in enumerate(stories):
            if story not in used and values[window, :, unit].max() > best.get(story, (-np.inf,))[0]:
                best[story] = values[window, :, unit].max(), -window
        ranked = [-window for _, window in sorted(best.values(), reverse=True)[:20]]
        expected = ranked[0::4] + ranked[2::4] + [int(np.flatnonzero(starts == start)[0]) for start in texts.random]
        records = neuron.train + neuron.scored
        assert (neuron.layer, neuron.neuron) == divmod(unit, 16) and len(records) == 15
        assert neuron.peak == pytest.approx(values[ranked[0], :, unit].max())
        for record, window in zip(records, expected, strict=True):
            assert record.tokens.tolist() == idx[window].tolist()
            assert record.values == pytest.approx(values[window, :, unit])


def test_no_text_is_both_read_and_scored():
    texts = texts_of()
    assert texts.corpus.tokens is not texts.search.tokens
    assert not set(texts.search.stories(texts.random)) & set(texts.search.stories(texts.search.starts))
    assert texts.counts.sum() == len(texts.corpus.starts) * T
    few = texts_of(tokens=200)
    assert len(few.corpus.starts) == len(few.search.starts) == 25 and np.array_equal(few.random, texts.random)


@pytest.mark.parametrize("stories, changes, message", [
    (34, {}, "stories of the validation text have 8 tokens, and 35 are needed"),
    (60, {"window": 40}, "no story of the training text has 40 tokens"),
    (45, {"tokens": 8}, "too few: windows of 20 different stories are needed")])
def test_too_little_text(stories, changes, message):
    with pytest.raises(UserError, match=message):
        texts_of(val=words(stories, 1), **changes)


# ---- the table


def test_a_table_by_brute_force(monkeypatch):
    monkeypatch.setattr(activations, "TOKENS", 24)
    texts, model = texts_of(), meaning_model()
    units = [(0, 0), (1, 0), (1, 7)]
    activate = explain.reader_of(model, units)
    means = explain.CorpusMeans(activate, texts, 3, None, "test")
    seen = {}
    for x, positions, _ in texts.corpus.read(activate):
        for token, value in zip(texts.corpus.tokens[positions].tolist(), x[:, 1].tolist()):
            seen.setdefault(token, []).append(value)
    table = means.table(1)
    mean = statistics.fmean(value for values in seen.values() for value in values)
    assert means.mean[1] == pytest.approx(mean, abs=1e-12)
    for token in range(V):
        expected = statistics.fmean(seen[token]) if token in seen else mean
        assert table.values[token] == pytest.approx(expected, abs=1e-12)
        assert table.counts[token] == len(seen.get(token, []))


def test_neurons_of_known_meaning():
    """On one token: 1. On a bigram: less, and more than nothing. On nothing: no score, with its reason."""
    entries = explained(meaning_model())
    assert [(entry["layer"], entry["neuron"]) for entry in entries] == [(0, neuron) for neuron in range(80)] + [(1, neuron) for neuron in range(80)]
    token, other, bigram = entries.pop(0), entries.pop(0), entries.pop(78)
    assert token["score"] == pytest.approx(1, abs=1e-12) and token["random_score"] == pytest.approx(1, abs=1e-12)
    assert [text for text, _ in token["tokens"]] == ["b"] and token["explanation"].startswith('"b" ')
    assert [text for text, _ in bigram["tokens"]] == ["b"] and 0.3 < bigram["score"] < 0.9
    assert [text for text, _ in other["tokens"]] == ["c"] and other["score"] == pytest.approx(1, abs=1e-12)
    for entry in entries:
        assert entry["score"] is None and entry["random_score"] is None and entry["reason"] == "it never fires"
        assert entry["tokens"] == [] and entry["explanation"] == ""


def test_the_bigram_neuron_is_one():
    stream = words(60, 1)
    texts = texts_of(val=stream)
    for x, positions, _ in texts.search.read(explain.reader_of(meaning_model(), [(1, 0)])):
        inside = (np.arange(len(positions)) % T > 0)
        is_bigram = (stream[positions] == B) & (stream[positions - 1] == A) & inside
        assert np.array_equal(x[:, 0].numpy() > 0, is_bigram) and is_bigram.any()


def test_the_table_of_records():
    """Of five windows only; what they lack gets the neuron's mean over the corpus."""
    texts, model = texts_of(), meaning_model()
    bigram = explained(model, texts, lookup="records")[80]
    units = explain.sample_units(model.config, settings())
    neuron = explain.find_records(explain.reader_of(model, units), units, texts, None, "test")[80]
    mean = explain.CorpusMeans(explain.reader_of(model, units), texts, len(units), None, "test").mean[80]
    seen = {}
    for record in neuron.train:
        for token, value in zip(record.tokens.tolist(), record.values.tolist()):
            seen.setdefault(token, []).append(value)
    simulated = [[statistics.fmean(seen.get(token, [mean])) for token in record.tokens.tolist()] for record in neuron.scored]
    real = [float(x) for record in neuron.scored for x in record.values]
    assert bigram["score"] == pytest.approx(statistics.correlation(real, sum(simulated, [])), abs=1e-12)


@pytest.mark.parametrize("units, tokens", [(57, 200), (160, 10**6)])
def test_entries_do_not_depend_on_batches(units, tokens, monkeypatch):
    expected = explained(meaning_model())
    monkeypatch.setattr(explain, "NEURONS_AT_ONCE", units)
    monkeypatch.setattr(activations, "TOKENS", tokens)
    found = explained(meaning_model())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-12)
        assert [text for text, _ in ours["tokens"]] == [text for text, _ in theirs["tokens"]]


def test_a_sample_of_neurons():
    config = meaning_model().config
    chosen = explain.sample_units(config, settings(neurons=5))
    assert len(set(chosen)) == 10 and sum(layer for layer, _ in chosen) == 5 and chosen == sorted(chosen) == explain.sample_units(config, settings(neurons=5))
    assert chosen != explain.sample_units(config, settings(neurons=5, seed=1))
    assert explain.sample_units(config, settings(neurons=100)) == explain.sample_units(config, settings())
    everything = {(entry["layer"], entry["neuron"]): entry for entry in explained(meaning_model())}
    for entry in explained(meaning_model(), neurons=5):
        assert entry == everything[entry["layer"], entry["neuron"]]


def test_rare_tokens_do_not_stand_for_a_neuron():
    table = Table(np.array([9.0, 3, 2, -1]), np.array([4, 5, 6, 70]))
    assert explain.strongest_tokens(table, str) == [["1", 3.0], ["2", 2.0]]
    table = Table(np.array([9.0, 3, 2, -1]), np.array([1, 0, 2, 2]))
    assert explain.strongest_tokens(table, str) == [["0", 9.0], ["2", 2.0]]


def test_a_summary():
    scores = [{"score": 0.5, "random_score": 0.25}, {"score": 1.0, "random_score": None, "reason": "x"},
              {"score": None, "random_score": None, "reason": "it never fires"}]
    row = explain.summary(scores)
    assert (row["neurons"], row["scored"], row["undefined"], row["random_scored"]) == (3, 2, 1, 1)
    assert row["mean"] == 0.75 and row["se"] == pytest.approx(statistics.stdev([0.5, 1]) / math.sqrt(2))
    assert row["random_mean"] == 0.25 and row["random_se"] is None and row["reasons"] == {"it never fires": 1}
    assert sum(row["histogram"]) == 2 and row["histogram"][30] == row["histogram"][-1] == 1
    empty = explain.summary([])
    assert empty["mean"] is None and empty["se"] is None and sum(empty["histogram"]) == 0


# ---- what a language model is asked, and how its answers are read


def answer(text, cut=False, logprobs=None):
    return {"text": text, "cut": cut, "logprobs": logprobs, "prompt_tokens": 1, "answer_tokens": 1}


@pytest.mark.parametrize("text, levels", [
    ("2\t10\n3\t1", [0, 10, 1, 0]), (" 2 : 10 \n\n3, 1\n", [0, 10, 1, 0]), ("none", [0, 0, 0, 0]), ("None.", [0, 0, 0, 0]),
    ("```\n2\t10\n```", [0, 10, 0, 0]), ("4\t0", [0, 0, 0, 0]), ("", None), ("I cannot do that.", None), ("2\t11", None),
    ("5\t1", None), ("0\t1", None), ("2\t1\n2\t1", None), ("2\t-1", None), ("2\t1.5", None), ("2", None),
    ("2\t1\nnone", None), ("Here you are:\n2\t1", None), ("2\t1" + "9" * 5000, None), ("```", None)])
def test_sparse_answers(text, levels):
    if levels is None:
        with pytest.raises(Unreadable):
            explain.read_simulation(answer(text), 4, "sparse")
    else:
        assert explain.read_simulation(answer(text), 4, "sparse").tolist() == levels
    with pytest.raises(Unreadable):
        explain.read_simulation(answer(text, cut=True), 4, "sparse")


def test_full_answers_without_logprobs_are_what_is_written():
    assert explain.read_simulation(answer("1\t0\n2\t10\n3\t3"), 3, "full").tolist() == [0, 10, 3]
    with pytest.raises(Unreadable):
        explain.read_simulation(answer("1\t0\n3\t3"), 3, "full")


def log(**probabilities):
    return {text.removeprefix("_"): math.log(p) for text, p in probabilities.items()}


@pytest.mark.parametrize("tokens", [
    [["1", {}], ["\t", {}], ["0", log(_0=0.5, _2=0.5)], ["\n", {}], ["2", {}], ["\t", {}], ["10", log(_10=0.6, _9=0.2, the=0.2)]],
    [["1\t", {}], ["0", log(_0=0.5, _2=0.5)], ["\n2", {}], ["\t10", {"\t10": math.log(0.6), "\t9": math.log(0.2)}]],
    [["1", {}], ["\t", {}], ["0\n", {"0\n": math.log(0.5), "2\n": math.log(0.5)}], ["2", {}], ["\t", {}],
     ["1", log(_1=0.6, _9=0.2)], ["0", log(_0=1.0)]]], ids=["one token each", "merged", "digit by digit"])
def test_expected_levels(tokens):
    text = "".join(token for token, _ in tokens)
    levels = explain.read_simulation(answer(text, logprobs=tokens), 2, "full")
    assert levels == pytest.approx([1, (0.6 * 10 + 0.2 * 9) / 0.8], abs=1e-12)


def test_without_a_level_among_the_likely_what_is_written_counts():
    assert explain.expected_value({"the": -1, "11": -1, "²": -1}.items()) is None
    tokens = [["1", {}], ["\t", {}], ["7", {}]]
    assert explain.read_simulation(answer("1\t7", logprobs=tokens), 1, "full").tolist() == [7]


def test_an_explanation_is_one_phrase():
    assert explain.read_explanation(answer("fires on\n  b ")) == "fires on b"
    assert explain.read_explanation(answer("fires on \ud800")) == "fires on ?"  # which no request could hold
    for bad in (answer(""), answer("fires", cut=True), answer("word " * 200)):
        with pytest.raises(Unreadable):
            explain.read_explanation(bad)


def test_questions_hold_tokens_and_levels():
    record = Record(np.array([A, 10, 34, B]), np.array([0.1, -3.0, 0.0, 2.0]))
    system, user = explain.explain_messages(Neuron(0, 0, 2.0, [record, record], []), letter)
    assert user["content"] == 'Excerpt 1\n"a"\t0\n"\\n"\t0\n"\\""\t0\n"b"\t10\n\nExcerpt 2\n"a"\t0\n"\\n"\t0\n"\\""\t0\n"b"\t10'
    for form in ("sparse", "full"):
        system, user = explain.simulate_messages("fires {on} b", record.tokens, letter, form)
        assert "fires {on} b" in system["content"] and user["content"] == '1\t"a"\n2\t"\\n"\n3\t"\\""\n4\t"b"'


# ---- a server that speaks the API


class Server(ThreadingHTTPServer):
    """A language model that knows neurons of one token: it finds the token that fires most, and foretells it.

    before(number, handler), number counting requests from 1, may answer in its place; then it returns True.
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock, self.requests, self.paid, self.times, self.keys = threading.Lock(), 0, [], [], set()
        self.before, self.logprobs, self.usage, self.delay, self.busy, self.most_busy = None, True, True, 0.0, 0, 0

    def handle_error(self, request, client_address):
        pass  # a client that is gone


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, content, status=200, kind="application/json", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with server.lock:
            server.requests += 1
            number = server.requests
            server.times.append(time.monotonic())
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
            server.keys.add(self.headers["Authorization"])
        try:
            if server.before and server.before(number, self):
                return
            time.sleep(server.delay)
            assert self.path == "/v1/chat/completions"
            content = self.completion(json.loads(body))
            with server.lock:
                server.paid.append(hashlib.sha256(body).hexdigest())
            self.reply(content)
        finally:
            with server.lock:
                server.busy -= 1

    def completion(self, request):
        system, user = (message["content"] for message in request["messages"])
        logprobs = None
        if user.startswith("Excerpt"):
            lines = re.findall(r"^(\".*\")\t(\d+)$", user, re.MULTILINE)
            text = f"fires on {max(lines, key=lambda line: int(line[1]))[0]}"
        else:
            token = re.search(r"fires on (\".*\")", system)[1]
            levels = [(place, 10 if word == token else 0) for place, word in re.findall(r"(\d+)\t(.*)", user)]
            if request.get("logprobs"):
                text = "\n".join(f"{place}\t{level}" for place, level in levels)
                logprobs = {"content": [{"token": token, "logprob": -0.1, "top_logprobs": [
                    {"token": token, "logprob": math.log(0.9)}, {"token": "5", "logprob": math.log(0.1)}]}
                    for token in re.findall(r"\d+|\s", text)]}
            else:
                text = "\n".join(f"{place}\t{level}" for place, level in levels if level) or "none"
        usage = {"prompt_tokens": len(user) // 3, "completion_tokens": len(text) // 3} if self.server.usage else None
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text},
                  "logprobs": logprobs if self.server.logprobs else None}
        return {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice],
                "usage": usage}


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path):
    """A run folder and its data as train.py and prepare.py leave them; its neurons are those of meaning_model."""
    data, out = tmp_path / "data", tmp_path / "out" / "tiny"
    data.mkdir()
    out.mkdir(parents=True)
    meta = {"tokenizer": {"name": "words", "pieces": ["ab", "<b>"]}, "vocab_size": V, "eot": EOT, "checksum": "abc", "source": {}}
    for seed, (name, count) in enumerate({"train": 200, "val": 60}.items()):
        split = words(count, seed)
        split.tofile(data / f"{name}.bin")
        meta[name] = {"tokens": len(split), "stories": count, "bytes": len(split),
                      "sha256": hashlib.sha256(split.tobytes()).hexdigest()}
    (data / "meta.json").write_text(json.dumps(meta))
    model = meaning_model(torch.float32)
    save_checkpoint(out / "best.pt", model.config, model.state_dict(), step=7, tokenizer=meta["tokenizer"], data="abc",
                    train_config={"data": str(data), "seed": 5})
    return out


@pytest.fixture
def call(monkeypatch, capsys):
    """explain.py with these words -> its exit message and what it printed. call.stop.requested = True is a Ctrl-C."""
    def call(*given):
        monkeypatch.setattr(sys, "argv", ["explain.py", *map(str, given), "--device=cpu", f"--window={T}"])
        message = None
        call.stop.requested = False
        try:
            knobs.cli(explain.main)
        except SystemExit as stop:
            message = stop.code
        return message, capsys.readouterr().out
    call.stop = SimpleNamespace(requested=False)
    monkeypatch.setattr(explain, "draw_scores", lambda path, results: Path(path).write_bytes(b"picture"))
    with monkeypatch.context() as patch:
        patch.setattr(knobs, "StopRequest", lambda: call.stop)  # pytest keeps its own Ctrl-C
        yield call


def asking(server, *more):
    """The words that put the server's questions."""
    return ("--explainer=openai", f"--base_url={server.url}", "--model=tiny", "--neurons=80", "--timeout=20", *more)


def facts(run, name="explain_openai"):
    """Result and entries, without what differs from run to run."""
    result = json.loads((run / f"{name}.json").read_text())
    for key in ("date", "command", "seconds", "commit", "run"):
        del result[key]
    if result["control"]:
        del result["control"]["seconds"]
    return result, json.loads((run / f"{name}_neurons.json").read_text())


def copies(run, *names):
    return [Path(shutil.copytree(run, run.parent / name)) for name in names]


def test_lookup_from_the_command_line(run, call):
    (second,) = copies(run, "second")
    message, out = call(run, second, "--plot", run.parent / "all.png")
    assert message is None and (run.parent / "all.png").exists() and (run / "explain.png").exists()
    result, neurons = facts(run, "explain")
    assert result["all"]["neurons"] == 160 and result["all"]["scored"] == 3 and result["all"]["undefined"] == 157
    assert result["all"]["reasons"] == {"it never fires": 157} and [row["scored"] for row in result["layers"]] == [2, 1]
    scores = [entry["score"] for entry in neurons["neurons"] if entry["score"] is not None]
    assert scores[:2] == pytest.approx([1, 1], abs=1e-6) and result["all"]["mean"] == pytest.approx(statistics.fmean(scores))
    assert result["layers"][0]["mean"] == pytest.approx(1, abs=1e-6) and neurons["checkpoint"] == result["checkpoint"]
    control = result["control"]
    assert control["all"]["neurons"] == control["all"]["scored"] == 160 and control["geometry"]["n_embd"] == 20
    assert out.count("random weights") == 2 and "157 since it never fires" in out  # once in each of two tables
    assert facts(second, "explain") == (result, neurons)
    before = (run / "explain.json").stat().st_mtime_ns
    message, again = call(run, second)
    assert message is None and again == out and (run / "explain.json").stat().st_mtime_ns == before
    assert call(run, "--seed=1")[0] == f"error: {run}/explain.json was made with seed=0, not 1: --force replaces it"
    assert call(run, "--seed=1", "--no_control", "--force")[0] is None
    assert facts(run, "explain")[0]["control"] is None


def test_a_control_is_seeded_and_of_the_same_geometry(run, call):
    """A self-ablating model's control is that of a baseline of its size."""
    checkpoint = load_checkpoint(run)
    geometry = {name: checkpoint["config"][name] for name in explain.GEOMETRY}
    one, two, other = (explain.random_model(geometry, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    before = torch.get_rng_state()
    explain.random_model(geometry, 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("after", [1, 4, 9])
def test_stopped_and_gone_on_with_is_uninterrupted(run, call, monkeypatch, after):
    monkeypatch.setattr(explain, "NEURONS_AT_ONCE", 60)
    whole, stopped = copies(run, "whole", "stopped")
    assert call(whole)[0] is None
    reads, check = 0, activations.check_stop

    def stop_later(stop):
        nonlocal reads
        reads += 1
        stop.requested = reads > after
        check(stop)

    with monkeypatch.context() as patch:
        patch.setattr(activations, "check_stop", stop_later)
        assert call(stopped)[0] == "stopped: the same command again goes on from here"
    assert not (stopped / "explain.json").exists() and (stopped / "explain.resume.pt").exists() == (after > 2)
    assert call(stopped)[0] is None
    assert facts(stopped, "explain") == facts(whole, "explain") and not (stopped / "explain.resume.pt").exists()


# ---- asking it


def test_a_language_model_explains(run, call, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    message, out = call(run, *asking(server, "--no_control"))
    assert message is None and server.keys == {"Bearer secret-key"}
    result, neurons = facts(run)
    token, other, bigram = (neurons["neurons"][place] for place in (0, 1, 80))
    assert token["score"] == pytest.approx(1, abs=1e-6) and token["explanation"] == 'fires on "b"' and token["tokens"] == []
    assert token["lookup"]["score"] == pytest.approx(1, abs=1e-6) and other["explanation"] == 'fires on "c"'
    assert 0.3 < bigram["score"] < 0.9 and bigram["answers"]["requests"] == 11
    assert result["all"]["scored"] == result["lookup"]["all"]["scored"] == 3 and result["answers"]["requests"] == 33
    assert result["answers"]["unreadable"] == result["answers"]["without_logprobs"] == 0
    assert neurons["neurons"][5]["reason"] == "it never fires" and neurons["neurons"][5]["answers"]["requests"] == 0
    assert len(server.paid) == len(set(server.paid)) == len(list((run / "explain_openai_cache").iterdir())) <= 33
    files = [path for path in run.rglob("*") if path.is_file()]
    assert not any(b"secret-key" in path.read_bytes() for path in files)
    rows = [line for line in out.splitlines() if "tiny, sparse" in line or "table, corpus" in line]
    assert len(rows) == 4 and "33" in rows[0].split()  # by the model and by the table, in both tables
    shutil.rmtree(run / "explain_openai_cache")
    assert call(run, *asking(server, "--no_control"))[0] is None and len(server.paid) <= 33  # the result is there
    assert call(run)[0] is None  # and the table's has another name


def test_the_control_is_asked_about_once_for_runs_of_a_geometry(run, call, server):
    runs = copies(run, "one", "two")
    words_ = (*asking(server), "--neurons=1", "--cache", run.parent / "answers")
    message, out = call(*runs, *words_)
    assert message is None and facts(runs[0])[0]["control"] == facts(runs[1])[0]["control"]
    assert len(server.paid) == len(set(server.paid)) and out.count("random weights") == 4
    assert sorted(path.name for path in runs[0].iterdir()) == [
        "best.pt", "explain_openai.json", "explain_openai.png", "explain_openai_neurons.json"]
    assert facts(runs[0])[0]["control"]["lookup"]["all"]["scored"] == 2


def test_full_simulation_takes_expected_levels(run, call, server):
    """The server is sure of each level by 0.9 and says 5 by 0.1: the order stays, and so does a score of 1."""
    (other,) = copies(run, "other")
    assert call(run, *asking(server, "--no_control", "--simulation=full"))[0] is None
    result, neurons = facts(run)
    assert neurons["neurons"][0]["score"] == pytest.approx(1, abs=1e-6) and result["answers"]["without_logprobs"] == 0
    kept = [json.loads(path.read_text()) for path in (run / "explain_openai_cache").iterdir()]
    full = next(one for one in kept if one["answer"]["logprobs"])
    levels = explain.read_simulation(full["answer"], T, "full")
    assert {round(level, 12) for level in levels} <= {0.5, 9.5} and full["request"]["top_logprobs"] == 15
    server.logprobs = False
    message, out = call(other, *asking(server, "--no_control", "--simulation=full"))
    assert message is None and facts(other)[0]["answers"]["without_logprobs"] == 30
    assert "30 answers had no logprobs" in out


def test_answers_do_not_depend_on_concurrency(run, call, server):
    found = []
    for concurrency, copy in zip((1, 5), copies(run, "one", "five")):
        server.delay, server.most_busy = 0.01, 0
        assert call(copy, *asking(server, f"--concurrency={concurrency}", "--no_control"))[0] is None
        assert server.most_busy <= concurrency
        found.append(facts(copy))
    assert found[0] == found[1] and server.most_busy > 1


def test_two_alike_questions_at_a_time_are_paid_once(server, tmp_path):
    server.delay = 0.05
    args = SimpleNamespace(base_url=server.url, timeout=20, retries=0, max_tokens_total=None)
    options = {"model": "tiny", "temperature": 0, "answer_tokens": 9, "base_url": server.url}
    answers = explain.Answers(explain.Endpoint(args, None), tmp_path, options)
    question, found = explain.simulate_messages('fires on "b"', [A, B], letter, "sparse"), []
    threads = [threading.Thread(target=lambda: found.append(answers.ask(question, 1))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.paid) == 1 and [one["text"] for one in found] == ["2\t10"] * 6


# ---- when it goes wrong


def disconnect(number, handler):
    handler.close_connection = True
    handler.connection.close()


def half(number, handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    disconnect(number, handler)


def says(content, status=200, **headers):
    return lambda number, handler: handler.reply(content, status, **headers)


TROUBLE = {
    "429": says({"error": {"message": "slow down"}}, 429, Retry_After="0.05"), "500": says(b"oops", 500, Retry_After="0"),
    "disconnect": disconnect, "half an answer": half, "a page": says(b"<html>proxy</html>", kind="text/html"),
    "no JSON": says(b"{"), "a list": says([]), "no choices": says({"choices": []}), "null": says({"choices": None}),
    "no text": says({"choices": [{"message": {"content": 5}}]}), "logprobs": says({"choices": [
        {"message": {"content": "5"}, "logprobs": {"content": [{"token": "5"}]}}]}), "usage": says({"choices": [
            {"message": {"content": "5"}}], "usage": {"prompt_tokens": "many"}})}


@pytest.fixture
def quick(monkeypatch):
    """Attempts that follow on each other at once where the server asks for no pause."""
    monkeypatch.setattr(explain.random, "uniform", lambda low, high: 0.01)


def test_every_trouble_passes(run, call, server, quick):
    """One after the other, each now and then: the result is that of a smooth run, and no answer is paid twice."""
    smooth, rough = copies(run, "smooth", "rough")
    assert call(smooth, *asking(server, "--no_control"))[0] is None
    server.paid.clear()
    first, troubles = server.requests, list(TROUBLE.values())

    def before(number, handler):
        place = number - first - 1
        if place % 2 == 0 and place // 2 < len(troubles):
            troubles[place // 2](number, handler)
            return True

    server.before = before
    assert call(rough, *asking(server, "--no_control", "--concurrency=2"))[0] is None
    assert facts(rough) == facts(smooth) and len(server.paid) == len(set(server.paid))


def test_retry_after_is_respected_by_all(run, call, server, quick):
    """Also as a date; and no other request comes in between."""
    def before(number, handler):
        if number == 3:
            handler.reply({"error": {"message": "slow"}}, 429, Retry_After="0.6")
            return True
        server.delay = 0.0

    server.before = before
    assert call(run, *asking(server, "--no_control", "--concurrency=1"))[0] is None
    assert server.times[3] - server.times[2] >= 0.6

    def error(**headers):
        return SimpleNamespace(response=SimpleNamespace(headers=headers))

    assert explain.pause_of(error(**{"retry-after": "7"}), 3) == 7
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < explain.pause_of(error(**{"retry-after": date}), 3) <= 30
    for useless in (error(), error(**{"retry-after": "soon"}), SimpleNamespace()):
        assert explain.pause_of(useless, 3) == 8 * 0.01


@pytest.mark.parametrize("trouble, message", [
    (says({"error": {"message": "Incorrect\nkey"}}, 401), "refuses: 401"),
    (says({"error": {"message": "no such model"}}, 404), "refuses: 404"),
    (says({"error": {"message": "max_tokens"}}, 400), "refuses: 400"),
    (says({"error": {"message": "used up", "code": "insufficient_quota"}}, 429), "refuses: 429"),
    (says({"error": {"message": "slow"}}, 429, Retry_After="86400"), "does not answer (429"),
    (says({"error": {"message": "x" * 5000}}, 503, Retry_After="0"), "does not answer (503"),
    (disconnect, "does not answer ("), (says(b"<html>"), "does not answer (no chat completion")])
def test_a_server_that_stays_wrong_is_one_line(run, call, server, quick, trouble, message):
    server.before = lambda number, handler: trouble(number, handler) or True
    said, out = call(run, *asking(server, "--no_control", "--retries=2", "--neurons=80"))
    assert said.startswith(f"error: {server.url} ") and message in said and "\n" not in said and len(said) < 500
    assert not (run / "explain_openai.json").exists() and not server.paid


def test_nobody_there(run, call):
    said, _ = call(run, "--explainer=openai", "--base_url=http://127.0.0.1:9/v1", "--model=m", "--retries=0", "--no_control")
    assert "does not answer (" in said and "refused" in said


def test_unreadable_answers_are_counted_and_never_scored(run, call, server):
    def before(number, handler):
        if number in (2, 3):
            handler.reply({"choices": [{"message": {"content": "I'd say 7."}}]})
            return True

    server.before = before
    message, out = call(run, *asking(server, "--no_control", "--concurrency=1"))
    result, neurons = facts(run)
    first = neurons["neurons"][0]
    assert message is None and result["answers"]["unreadable"] == 2 and result["all"]["scored"] == 2
    assert first["score"] is None and first["reason"] == "2 of its 10 simulations could not be read"
    assert first["random_score"] is None and first["lookup"]["score"] == pytest.approx(1, abs=1e-6)
    assert "1 since 2 of its 10 simulations could not be read" in out


def test_an_unreadable_explanation_is_not_simulated(run, call, server):
    server.before = lambda number, handler: handler.reply({"choices": [{"message": {"content": None}}]}) or True
    assert call(run, *asking(server, "--no_control"))[0] is None
    result, neurons = facts(run)
    assert result["all"]["mean"] is None and result["answers"]["unreadable"] == server.requests == 3
    assert neurons["neurons"][0]["reason"] == "its explanation could not be read"


@pytest.mark.parametrize("how", ["refused", "stopped", "killed"])
def test_no_answer_is_paid_twice(run, call, server, how):
    """The run ends after 15 answers, in one way or another; the next one asks for the rest only, and finds the same."""
    whole, broken = copies(run, "whole", "broken")
    assert call(whole, *asking(server, "--no_control"))[0] is None
    everything = set(server.paid)
    server.paid.clear()
    first = server.requests
    child = None

    def before(number, handler):
        if number - first <= 15:
            return False
        if how == "refused":
            handler.reply({"error": {"message": "no credit"}}, 401)
        elif how == "stopped":
            call.stop.requested = True
            return False
        else:  # the child waits for ever
            time.sleep(60)
        return True

    server.before = before
    command = (broken, *asking(server, "--no_control", "--concurrency=1"))
    if how == "killed":
        child = os.fork()
        if not child:
            try:
                call(*command)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 60
        while server.requests - first <= 15 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    else:
        said = call(*command)[0]
        assert said.startswith("error: " if how == "refused" else "stopped: the same command again goes on from here")
    paid = 16 if how == "stopped" else 15  # what was on the way is waited for
    assert len(server.paid) == paid == len(list((broken / "explain_openai_cache").glob("*.json")))
    assert not (broken / "explain_openai.json").exists()
    server.before = None
    assert call(*command)[0] is None
    assert len(server.paid) == len(set(server.paid)) and set(server.paid) == everything
    assert facts(broken) == facts(whole)


def test_half_a_file_is_asked_for_again(run, call, server):
    assert call(run, *asking(server, "--no_control"))[0] is None
    paid = len(server.paid)
    whole, damaged = facts(run), next((run / "explain_openai_cache").iterdir())
    damaged.write_text(damaged.read_text()[:50])
    assert call(run, *asking(server, "--no_control", "--force"))[0] is None
    assert len(server.paid) == paid  # the result is there
    (run / "explain_openai.json").unlink()
    assert call(run, *asking(server, "--no_control"))[0] is None and len(server.paid) == paid + 1 and facts(run) == whole


def test_a_dry_run_asks_nothing_and_counts_what_is_left(run, call, server):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    message, out = call(run, *asking(server, "--no_control", "--dry_run", "--price_in=1000", "--price_out=2000"))
    assert message is None and server.requests == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    calls, prompt, answered, cost = (float(word.replace(",", "")) for word in out.splitlines()[2].split()[1:])
    assert calls == 33 and cost == pytest.approx((1000 * prompt + 2000 * answered) / 1e6, abs=0.01)
    server.before = lambda number, handler: number > 20 and (handler.reply({}, 401) or True)
    assert call(run, *asking(server, "--no_control", "--concurrency=1"))[0].startswith("error: ")
    out = call(run, *asking(server, "--no_control", "--dry_run"))[1]
    assert "cost" not in out and float(out.splitlines()[1].split()[1]) == 13
    server.before = None
    assert call(run, *asking(server, "--no_control"))[0] is None
    assert call(run, *asking(server, "--no_control", "--dry_run"))[1].splitlines()[1].split()[:2] == ["all", "0"]


def test_a_budget_is_kept(run, call, server):
    whole, frugal = copies(run, "whole", "frugal")
    assert call(whole, *asking(server, "--no_control"))[0] is None
    server.paid.clear()
    command = (frugal, *asking(server, "--no_control", "--answer_tokens=1000", "--max_tokens_total=2600"))
    said, tries = call(*command)[0], 1
    assert said.startswith("stopped: another answer might exceed --max_tokens_total=2600 (")
    spent = int(re.search(r"\(([\d,]+) tokens are spent", said)[1].replace(",", ""))
    assert 0 < spent <= 2600
    while said and tries < 20:
        said, tries = call(*command)[0], tries + 1
    assert said is None and tries > 1 and len(server.paid) == len(set(server.paid))


def test_who_has_no_key_or_no_package_is_told(run, call, server, monkeypatch):
    """Another server than OpenAI's needs no key. A dry run needs neither."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    words_ = (run, "--explainer=openai", "--model=tiny", "--no_control", "--neurons=1")
    said = call(*words_)[0]
    assert said.startswith("error: https://api.openai.com/v1 needs a key: put it into the environment as OPENAI_API_KEY")
    assert call(*words_, f"--base_url={server.url}")[0] is None and server.keys <= {"Bearer none"}
    monkeypatch.setitem(sys.modules, "openai", None)
    said = call(*words_, "--seed=1", "--force")[0]
    assert said == "error: --explainer=openai needs the package openai: pip install -r requirements-interp.txt"
    assert call(*words_, "--dry_run", "--force", "--seed=1")[0] is None
    assert call(run, "--no_control")[0] is None  # and the table never


def test_the_picture(run, call, tmp_path, monkeypatch):
    """Every mean of the result is in it: models and their control, also one without any score."""
    assert call(run)[0] is None
    result = json.loads((run / "explain.json").read_text())
    nothing = {**result, "run": "nothing", "control": None, "all": explain.summary([]), "layers": []}
    figures = []
    monkeypatch.undo()
    monkeypatch.setattr(explain, "save_figure", lambda path, figure: figures.append(figure))
    explain.draw_scores(tmp_path / "a.png", [result, nothing])
    (scores, layers), (legend,) = figures[0].axes, figures[0].legends
    means = [line.get_xdata()[0] for line in scores.lines]
    assert means == [result["all"]["mean"], result["control"]["all"]["mean"]]
    drawn = [list(line.get_ydata()) for line in layers.lines if line.get_linestyle() in ("-", "--")]
    assert [row["mean"] for row in result["layers"]] in drawn and [row["mean"] for row in result["control"]["layers"]] in drawn
    assert [text.get_text() for text in legend.texts] == [result["run"], "random weights"]


def test_a_server_without_usage_is_estimated(run, call, server):
    server.usage = False
    assert call(run, *asking(server, "--no_control"))[0] is None
    assert facts(run)[0]["answers"]["prompt_tokens"] > 1000
