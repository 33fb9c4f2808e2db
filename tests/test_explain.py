"""interp/explain.py: against the oracle, brute force, neurons of known meaning and a real server on
loopback, behind the real package openai.

    python -m pytest tests/test_explain.py
"""

import gc
import json
import math
import os
import re
import shutil
import signal
import statistics
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import EOT, ORACLES, T, V, letters, make_data, make_run

from interp import activations, explain
from interp.activations import Snippet
from model import GPTNeo, GPTNeoConfig

A, B = ord("a"), ord("b")


def meaning_model(dtype=torch.float64):
    """Layer 0 neuron 0 fires on "b", 1 on "c"; layer 1 neuron 0 on "b" after "a"; no other fires.

    Attention of layer 1 sees this token and the one before it, and writes the mean of their letters
    beside the token's own; layer 0 has none.
    """
    model = GPTNeo(GPTNeoConfig(vocab_size=V, block_size=16, n_layer=2, n_head=1, n_embd=20,
                                attention_layers="local", window_size=2, ablation="none"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_("ln_" in name and "weight" in name)
        first, second = model.transformer["h"]
        for channel in range(8):  # a letter is one channel, end-of-text none of them
            model.transformer["wte"].weight[A + channel, channel] = 1
            second.attn["attention"].v_proj.weight[8 + channel, channel] = 1
        second.attn["attention"].out_proj.weight.copy_(torch.eye(20))
        first.mlp.c_fc.bias.fill_(-40)
        second.mlp.c_fc.bias.fill_(-55)
        first.mlp.c_fc.weight[0, 1] = first.mlp.c_fc.weight[1, 2] = 30
        second.mlp.c_fc.weight[0, 1], second.mlp.c_fc.weight[0, 8] = 30, 10
    return model.to(dtype).eval()


def close(found):
    return pytest.approx(found, abs=1e-12)


def test_the_oracle():
    path = ORACLES / "explain_oracle.json"
    if not path.exists():
        pytest.skip("shared/oracles is not here")
    oracle = json.loads(path.read_text())
    for case in oracle["correlation"].values():
        score, _ = explain.correlation([case["real"]], [case["simulated"]])
        assert score == (None if case["score"] is None else close(case["score"]))
    pooled = oracle["pooled"]
    assert explain.correlation(*zip(*pooled["sequences"]))[0] == close(pooled["pooled_score"])
    levels = oracle["discretise"]
    ours = explain.discretise(np.array(levels["activations"]), levels["max_activation"])
    assert ours.tolist() == levels["discretised"]
    expected = oracle["expected_value"]
    ours = explain.expected_value(expected["logprobs"].items())
    assert ours == close(expected["expected_value"])
    lookup = oracle["token_lookup"]
    words = [*lookup["table"], "my", "dog"]  # the last two are not in the table
    train, test = [], []
    for split, batches in ((lookup["train"], train), (lookup["test"], test)):
        for tokens, values in split:
            numbers = np.array([words.index(token) for token in tokens])
            batches.append((numbers, torch.tensor(values)[:, None]))
    table, counts = explain.lookup_table(train, len(words), 1)
    assert table[:-2, 0] == close([*lookup["table"].values()]) and counts[-2:].tolist() == [0, 0]
    table[-2:] = lookup["unseen_token_value"]  # ours is the mean
    simulated = [table[tokens, 0] for tokens, _ in test]
    assert [one.tolist() for one in simulated] == lookup["simulated"]
    score, _ = explain.correlation([values[:, 0] for _, values in test], simulated)
    assert score == close(lookup["score"])


def test_records_by_brute_force(monkeypatch):
    """The strongest windows of a neuron, one a story; random windows lie in other stories."""
    monkeypatch.setattr(activations, "TOKENS", 40)
    model, train, val = meaning_model(), letters(4000), letters(3000, 1)
    settings = {"window": T, "tokens": 10**6, "seed": 0}
    _, search, at_random = explain.choose_texts(train, val, EOT, settings, torch.device("cpu"))
    activate = explain.reader_of(model, [(0, 3), (1, 0)])
    *_, found = explain.find_records(activate, [(0, 3), (1, 0)], search, at_random, "test")
    starts, stories = explain.story_windows(val, EOT, T)
    number = np.cumsum(val == EOT) - (val == EOT)
    for start, story in zip(starts, stories):
        assert set(number[start : start + T]) == {story}
    whole = np.bincount(number)[: number[-1]] // T
    assert (np.bincount(stories, minlength=number[-1]) == whole).all()  # as many as fit
    others = set(np.setdiff1d(stories, search.stories(search.starts)))
    assert len(others) == 15 and set(search.stories(np.array(at_random))) <= others
    values = activate(torch.from_numpy(val[starts[:, None] + np.arange(T)].astype(int)))[..., 1]
    best = {}
    for window, story in enumerate(stories):
        peak = values[window].max().item()
        if story not in others and peak > best.get(story, (-np.inf,))[0]:
            best[story] = peak, -window
    ranked = [-window for _, window in sorted(best.values(), reverse=True)[:20]]
    expected = ranked[0::4] + ranked[2::4] + [list(starts).index(start) for start in at_random]
    assert found[:2] == (1, 0) and found.peak == values.max()
    for record, window in zip(found.train + found.scored, expected, strict=True):
        assert list(record.tokens) == val[starts[window] : starts[window] + T].tolist()
        assert list(record.values) == close(values[window])


# ---- answers of a language model


@pytest.mark.parametrize("text, levels, unclear", [
    ("2\t10\n3\t1", [0, 10, 1, 0], 0), ("2 -> 10\r\n3: 5.0", [0, 10, 5, 0], 0),
    ('| 2 | "a" | 10 |', [0, 10, 0, 0], 0), ("```text\n2\t10\n```", [0, 10, 0, 0], 0),
    ("4\t0", [0, 0, 0, 0], 0), ("**None.**", [0, 0, 0, 0], 0),
    ("<think>1\t7, or 3\t3?\n1\t7\n</think>\n\n2\t1", [0, 1, 0, 0], 0),
    ("2\t1\n2\t3\n3\t4\n9\t1", [0, 1, 4, 0], 2), ("2\t1\n3\t99\n", [0, 1, 0, 0], 1),
    ("2\t-1", None, 1), ("I cannot do that.", None, 0), ("2\t1" + "9" * 5000, None, 1),
    ("2\t1\n3\tx\n7", None, 2)])
def test_sparse_answers(text, levels, unclear):
    assert explain.read_simulation(text, None, 4, "sparse") == (levels, unclear)


def api(token, tops):
    """A token with its {alternative: probability} as a server writes it."""
    likely = [{"token": text, "logprob": math.log(p)} for text, p in tops.items()]
    return {"token": token, "logprob": math.log(tops.get(token, 1)), "top_logprobs": likely}


LIKELY, LESS = {"0": 0.5, "2": 0.5}, {"10": 0.6, "9": 0.2, "the": 0.2}


@pytest.mark.parametrize("tokens", [
    [("1", {}), ("\t", {}), ("0", LIKELY), ("\n", {}), ("2", {}), ("\t", {}), ("10", LESS)],
    [("1\t", {}), ("0", LIKELY), ("\n2", {}), ("\t10", {"\t10": 0.6, "\t9": 0.2})],
    [("1", {}), ("\t", {}), ("0\n", {"0\n": 0.5, "2\n": 0.5}), ("2\t", {}),
     ("1", {"1": 0.6, "9": 0.2}), ("0", {"0": 1})]], ids=["single", "merged", "digits"])
def test_full_answers_take_expected_levels(tokens):
    text = "".join(token for token, _ in tokens)
    levels, _ = explain.read_simulation(text, [api(*one) for one in tokens], 2, "full")
    assert levels == close([1, (0.6 * 10 + 0.2 * 9) / 0.8])
    assert explain.read_simulation("1\t0\n3\t3", None, 3, "full") == ([0, 0, 3], 1)
    assert explain.read_simulation("1\t0", None, 3, "full")[0] is None


@pytest.mark.parametrize("top", [None, [], [{"token": "3", "logprob": math.nan}], [{"token": 3}],
                                 [{"token": "3", "logprob": None}]])
def test_without_usable_logprobs_what_is_written_counts(top):
    for logprobs in (top, [{"token": "1\t7", "top_logprobs": top}], [{"token": None}]):
        assert explain.read_simulation("1\t7", logprobs, 1, "full") == ([7], 0)


@pytest.mark.parametrize("text, phrase", [
    ("<think>\nhm\n\n</think>\n\nfires on\n  b ", "fires on b"),
    ("**Explanation:** fires on b", "fires on b"), ("```\nfires on b\n```", "fires on b"),
    ("fires on b\n\nThis is why.", "fires on b"),
    ("fires on \ud800", "fires on ?"), ("", None), ("word " * 200, None)])
def test_explanations(text, phrase):
    assert explain.read_explanation(text, None) == (phrase, 0)


def test_questions_hold_tokens_and_levels():
    record = Snippet([A, 10, 34, B], [0.1, -3.0, 0.0, 2.0], 0)
    _, user = explain.explain_question(explain.Neuron(0, 0, 2.0, [record] * 2, []), chr)
    lines = '"a"\t0\n"\\n"\t0\n"\\""\t0\n"b"\t10'
    assert user == f"Excerpt 1\n{lines}\n\nExcerpt 2\n{lines}"
    system, user = explain.simulate_question("fires {on} b", record.tokens, chr, "full")
    assert "fires {on} b" in system and user == '1\t"a"\n2\t"\\n"\n3\t"\\""\n4\t"b"'


# ---- a server that speaks the API


class Handler(BaseHTTPRequestHandler):
    """A language model that knows neurons of one token: it finds the token that fires most.

    server.before(number, self), number counting requests from 1, may answer in its place; then it
    returns True.
    """

    def log_message(self, *_):
        pass

    def reply(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.requests += 1
        server.keys.add(self.headers["Authorization"])
        if not (server.before and server.before(server.requests, self)):
            self.reply(self.completion(json.loads(body)))
            server.paid.append(body)

    def completion(self, request):
        system, user = (message["content"] for message in request["messages"])
        if user.startswith("Excerpt"):
            lines = re.findall(r"^(\".*\")\t(\d+)$", user, re.MULTILINE)
            text = f"fires on {max(lines, key=lambda line: int(line[1]))[0]}"
        else:
            wanted = re.search(r"fires on (\".*\")", system)[1]
            places = re.findall(rf"(\d+)\t{wanted}$", user, re.MULTILINE)
            text = "\n".join(f"{place}\t10" for place in places) or "none"
        choice = {"message": {"content": text}, "finish_reason": "stop", "logprobs": None}
        return {"choices": [choice], "usage": {"prompt_tokens": 90, "completion_tokens": 9}}


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    server.requests, server.paid, server.keys, server.before = 0, [], set(), None
    server.daemon_threads, server.handle_error = True, lambda *_: None  # a client that is gone
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path):
    """A run folder and its data; its neurons are those of meaning_model()."""
    make_data(tmp_path / "data", 4000, 3000)
    return make_run(tmp_path / "out" / "one", tmp_path / "data", meaning_model(torch.float32))


@pytest.fixture
def call(typed):
    """explain.py with these words -> its error message and what it printed."""
    return lambda *words: typed(explain.main, *words, "--device=cpu", f"--window={T}")


def asking(server, *more):
    return (f"--base_url={server.url}", "--model=tiny", "--timeout=20", "--no_control", *more)


def facts(run, name="explain_openai"):
    """Result and entries, without what differs from run to run."""
    result = json.loads((run / f"{name}.json").read_text())
    for key in ("date", "command", "commit", "run"):
        del result[key]
    return result, json.loads((run / f"{name}_neurons.json").read_text())["neurons"]


def test_lookup_from_the_command_line(run, call, tmp_path, monkeypatch, stop_at):
    """Two runs and their control; what was interrupted continues, and equals what was not. A neuron
    of one token has score 1, one of two tokens less, a silent one none."""
    second = shutil.copytree(run, run.parent / "two")
    message, out = call(run, second, "--plot", tmp_path / "all.png")
    assert message is None and (tmp_path / "all.png").stat().st_size > 10_000
    result, neurons = facts(run, "explain")
    scores = [entry["score"] for entry in neurons if entry["score"] is not None]
    assert result["all"]["neurons"] == 160 and result["all"]["scored"] == len(scores) == 3
    assert result["all"]["mean"] == statistics.fmean(scores)
    assert result["all"]["se"] == close(statistics.stdev(scores) / math.sqrt(3))
    assert result["all"]["reasons"] == {"it never fires": 157}
    assert sum(result["all"]["histogram"]) == 3 and result["all"]["histogram"][-1] == 2
    assert neurons[0]["score"] == neurons[1]["score"] == pytest.approx(1, abs=1e-6)
    assert neurons[0]["explanation"].startswith('"b" ') and 0.3 < neurons[80]["score"] < 0.95
    assert (neurons[5]["score"], neurons[5]["explanation"]) == (None, "")
    assert result["control"]["all"]["scored"] == 160 and out.count("random weights") == 1
    assert facts(second, "explain") == (result, neurons) and call(run, second) == (None, out)
    monkeypatch.setattr(explain, "NEURONS_AT_ONCE", 60)
    (second / "explain.json").unlink()
    stop_at(explain, "find_records", 4)
    assert call(second)[0] == "stopped" and (second / "explain.resume.pt").exists()
    assert call(second)[0] is None and facts(second, "explain") == (result, neurons)


def test_a_language_model_explains(run, call, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " secret-key\r\n")
    call(run, *asking(server, "--simulation=full"))
    assert facts(run)[0]["answers"]["without_logprobs"] == 33
    message, out = call(run, *asking(server, "--force"))
    assert message is None and server.keys == {"Bearer secret-key"}
    result, neurons = facts(run)
    token, bigram = neurons[0], neurons[80]
    assert token["score"] == token["lookup"]["score"] == pytest.approx(1, abs=1e-6)
    assert token["explanation"] == 'fires on "b"'
    assert 0.3 < bigram["score"] < 0.95 and bigram["answers"]["requests"] == 11
    assert result["all"]["scored"] == result["lookup"]["all"]["scored"] == 3
    assert result["answers"]["requests"] == 33 and result["answers"]["unreadable"] == 0
    assert result["answers"]["prompt_tokens"] == 33 * 90
    assert neurons[5]["answers"] == {}
    assert not any(b"secret" in path.read_bytes() for path in run.iterdir())
    rows = [line for line in out.splitlines() if "one" in line]
    assert "tiny" in rows[0] and "table" in rows[1]


# ---- when it goes wrong


def half(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.connection.shutdown(2)


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(600):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def says(content, status=200, **headers):
    return lambda handler: handler.reply(content, status, **headers)


@pytest.mark.parametrize("trouble, message", [
    (says({"error": {"message": "Incorrect\nkey secret-key" + "x" * 5000}}, 401), "401"),
    (half, "Error"), (drip, "TimeoutError"), (says(b"<html>"), "JSONDecodeError"),
    (says({"choices": [{"message": {"content": 5}}]}), "AttributeError")])
def test_a_server_that_stays_wrong_is_one_line(run, call, server, monkeypatch, trouble, message):
    """And nothing of it is kept; a server that sends a byte now and then does not last."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    monkeypatch.setattr(explain, "RETRIES", 0)
    server.before = lambda number, handler: trouble(handler) or True
    said, _ = call(run, *asking(server, "--timeout=1"))
    assert said.startswith("error: no ") and f" from {server.url} " in said and message in said
    assert "\n" not in said and len(said) < 400 and "secret" not in said
    assert not (run / "explain_openai_answers.jsonl").exists()


def test_addresses_are_printed_without_secrets(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    found = explain.without_secrets("at https://me:pass@host:8/v1?key=secret\nBearer secret-key")
    assert found == "at https://host:8/v1 Bearer KEY"


@pytest.mark.parametrize("name, value", [
    ("OPENAI_API_KEY", "s\u00e9cret-word"), ("OPENAI_API_KEY", "two secret-words"),
    ("ALL_PROXY", "socks5://me:secret-word@127.0.0.1:1"), ("SSL_CERT_FILE", "/nowhere")])
def test_the_environment_is_one_line_without_secrets(run, call, server, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    said, _ = call(run, *asking(server))
    assert said.startswith("error: ") and "\n" not in said and "cret-word" not in said


def test_wrong_addresses(run, call, server, monkeypatch, recwarn):
    """Without http:// nothing is tried. Where nobody listens the first failure ends all questions,
    and none is left half connected: Python would print that it was never awaited."""
    monkeypatch.setattr(explain, "RETRIES", 0)
    assert "begins with http://" in call(run, "--model=x", "--base_url=localhost:8000/v1")[0]
    server.server_close()
    assert "APIConnectionError" in call(run, *asking(server, "--concurrency=2"))[0]
    gc.collect()
    assert not [one for one in recwarn if "never awaited" in str(one.message)]


def test_unreadable_answers_are_counted_and_never_scored(run, call, server):
    content = says({"choices": [{"message": {"content": "I'd say 7."}}]})
    server.before = lambda number, handler: number in (4, 7) and (content(handler) or True)
    assert call(run, *asking(server, "--concurrency=1"))[0] is None
    result, neurons = facts(run)
    assert result["answers"]["unreadable"] == result["answers"]["unclear_lines"] == 2
    assert neurons[0]["reason"] == "2 answers about it could not be read"
    assert neurons[0]["score"] is None and neurons[0]["lookup"]["score"] is not None


def test_no_answer_is_paid_twice(run, call, server):
    """Killed after 15 answers. The same command asks for the rest through a few troubles, and its
    result is that of a smooth run. A dry run asks nothing, and counts what is left."""
    smooth = shutil.copytree(run, run.parent / "smooth")
    assert "33 calls with about " in call(smooth, *asking(server, "--dry_run"))[1]
    assert server.requests == 0 and {*map(str, smooth.iterdir())} == {f"{smooth}/best.pt"}
    assert call(smooth, *asking(server))[0] is None
    everything, first = set(server.paid), server.requests
    server.paid.clear()
    server.before = lambda number, handler: number - first > 15 and time.sleep(60)
    command = (run, *asking(server, "--concurrency=1"))
    child = os.fork()
    if child == 0:
        call(*command)
        os._exit(1)
    while server.requests - first <= 15:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(run / "explain_openai_answers.jsonl", "a") as file:
        file.write('\n{"half a line')
    assert len(server.paid) == 15 and not (run / "explain_openai.json").exists()
    assert "18 calls with about " in call(*command, "--dry_run")[1]
    troubles = [says({"error": {"message": "slow down"}}, 429, Retry_After="0.05"), half,
                says(b"oops", 500, Retry_After="0.05")]
    server.before = lambda number, handler: troubles and (troubles.pop()(handler) or True)
    assert call(*command)[0] is None and facts(run) == facts(smooth) and not troubles
    assert len(server.paid) == len(set(server.paid)) and set(server.paid) == everything
