"""interp/browse.py: its numbers by brute force on models set by hand, its page in headless Chromium.

    python -m pytest tests/test_browse.py

The page is opened from disk by Playwright in the system's chromium. Every test that opens it fails on any message in the
console, any exception and any request beyond the page itself.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "interp")]
import browse
from interp import activations
from interp.activations import UNITS, Site, read_sites
from interp.results import fingerprint
from model import GPTNeo, GPTNeoConfig, save_checkpoint

HOSTILE = ["</script><img src=x onerror=alert(1)>", '"quotes\'', "\u2028", " \U0001f431", "<!--<script>", " &lt;b&gt;", "\n\n", " dog", " cat", "Dog"]
V = 257 + len(HOSTILE)
EOT, DOG, CAT = V - 1, 256 + 7, 256 + 8
SIZES = dict(vocab_size=V, block_size=16, n_layer=2, n_head=2, n_embd=8)
NUMBERS = {"int8": np.int8, "uint8": np.uint8, "uint32": np.uint32, "float32": np.float32}


def made(**changes):
    """A model of random weights."""
    torch.manual_seed(0)
    model = GPTNeo(GPTNeoConfig(**{**SIZES, **changes}))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.3)
    return model.eval()


def by_hand():
    """Neuron 3 of layer 0 fires on dog alone and writes cat; all others of its layer stay silent."""
    model = made()
    wte, block = model.transformer["wte"].weight.data, model.transformer["h"][0]
    model.transformer["wpe"].weight.data.zero_()
    model.transformer["ln_f"].weight.data.fill_(1.0)
    wte[CAT] *= 5
    for p in (block.attn["attention"].out_proj.weight, block.attn["attention"].out_proj.bias, block.mlp.c_fc.weight):
        p.data.zero_()
    block.ln_2.weight.data.fill_(1.0)
    block.ln_2.bias.data.zero_()
    seen = torch.nn.functional.layer_norm(wte, (8,))  # what the neurons of layer 0 see of every token
    likeness = seen @ seen[DOG]
    block.mlp.c_fc.bias.data.fill_(-1.0)
    block.mlp.c_fc.weight.data[3] = seen[DOG]
    block.mlp.c_fc.bias.data[3] = -likeness.sort().values[-2:].mean()
    block.mlp.c_proj.weight.data[:, 3] = wte[CAT]
    return model


def text_of(count, seed):
    """Stories of letters and of all that is hostile, each with its end-of-text."""
    rng = np.random.default_rng(seed)
    tokens = np.where(rng.random(count) < 0.5, rng.integers(256, V - 1, count), rng.integers(97, 123, count))
    tokens[rng.random(count) < 0.08] = EOT
    return tokens.astype("<u2")


def make_data(folder):
    folder.mkdir()
    meta = {"tokenizer": {"name": "words", "pieces": HOSTILE}, "vocab_size": V, "eot": EOT, "checksum": "abc", "source": {}}
    for seed, name in enumerate(("train", "val")):
        split = text_of(400, seed)
        split.tofile(folder / f"{name}.bin")
        meta[name] = {"tokens": 400, "stories": int((split == EOT).sum()), "bytes": 400,
                      "sha256": hashlib.sha256(split.tobytes()).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))


def make_run(folder, model, data):
    folder.mkdir(parents=True)
    save_checkpoint(folder / "best.pt", model.config, model.state_dict(), step=7, data="abc",
                    tokenizer={"name": "words", "pieces": HOSTILE},
                    train_config={"data": str(data), "seed": 5, "ablation": model.config.ablation,
                                  "attn_unit": model.config.attn_unit})
    return folder


def write(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["browse.py", "--device=cpu", *map(str, words)])
        browse.main()


def data_of(path):
    """What a page's script reads, arrays unpacked, those of units in rows (units, ...)."""
    data = json.loads(re.search('id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])
    unpack = lambda packed: np.frombuffer(base64.b64decode(packed["data"]), NUMBERS[packed["type"]])
    data["story_tokens"] = unpack(data["story_tokens"])
    for run in data["runs"]:
        count = run["layers"] * (run["neurons"] + run["attention"])
        arrays = {name: unpack(packed) for name, packed in run["arrays"].items()}
        by_token = ("text_tokens", "story_units", "story_values")
        run["arrays"] = {name: array if name in by_token else array.reshape(count, -1) for name, array in arrays.items()}
    return data


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Pages of a gated model set by hand, of a baseline, of one whose units are heads, and of the first two together."""
    folder = tmp_path_factory.mktemp("browse")
    make_data(folder / "data")
    models = {"gated": by_hand(), "plain": made(ablation="none"), "heads": made(attn_unit="head", k_attn=1, ablation="global")}
    for name, model in models.items():
        make_run(folder / "out" / name, model, folder / "data")
    write(*(folder / "out" / name for name in models))
    write(folder / "out" / "plain", folder / "out" / "gated", "--page", folder / "both.html")
    return folder, models


# ---- the numbers


def val():
    return text_of(400, 1).astype(np.int64)


def windows():
    """The windows that are read, and which of their tokens count: 12 of 16."""
    starts = np.arange(0, 400 - 16 + 1, 12)
    return torch.from_numpy(val()[starts[:, None] + np.arange(16)]), starts


def units_in(model, idx):
    """Activations of all units, (B, T, L, U), one unit after the other."""
    layers = []
    for layer in range(model.config.n_layer):
        neurons, channels = (read_sites([Site(model, layer, site)], idx) for site in UNITS)
        if model.config.attn_unit == "head":
            channels = torch.stack([part.square().sum(-1).sqrt() for part in channels.chunk(2, -1)], -1)
        layers.append(torch.cat((neurons, channels), -1))
    return torch.stack(layers, 2)


@pytest.mark.parametrize("name", ["gated", "plain", "heads"])
def test_rates_and_snippets_are_those_of_brute_force(runs, name):
    folder, models = runs
    model, (run,) = models[name], data_of(folder / "out" / name / "browse.html")["runs"]
    arrays, (idx, starts) = run["arrays"], windows()
    a = units_in(model, idx)  # (B, T, L, U)
    counted = a[:, 4:].flatten(0, 1)  # (n, L, U)
    attention = counted[..., 32:].abs()
    on = torch.cat((counted[..., :32] > 0, attention > attention.pow(2).mean(-1, keepdim=True).sqrt()), -1)
    assert np.allclose(arrays["fires"][:, 0], on.double().mean(0).flatten(), atol=1e-7)
    masks = None
    if name != "plain":
        with torch.no_grad():
            out = model.ablated(idx)
        masks = torch.cat((out.mlp_mask, out.attn_mask), -1)  # (B, T, L, U)
        assert np.allclose(arrays["kept"][:, 0], masks[:, 4:].mean((0, 1)).flatten(), atol=1e-6)
        masks = masks.flatten(2).bool().numpy()  # (B, T, N)
    assert ("kept" in arrays) == ("marks" in arrays) == (name != "plain")

    strength = torch.cat((a[..., :32], a[..., 32:].abs()), -1).flatten(2).numpy()
    story = np.searchsorted(np.flatnonzero(val() == EOT), starts[:, None] + np.arange(16))  # (B, T)
    values = a.flatten(2).numpy()
    for unit in range(values.shape[-1]):
        best = {}  # story: its strongest moment
        for b, t in np.ndindex(len(idx), 16):
            if t >= 4 and strength[b, t, unit] > best.get(story[b, t], (0,))[0]:
                best[story[b, t]] = (strength[b, t, unit], b, t)
        expected = sorted(best.values(), key=lambda moment: -moment[0])[:8]
        assert (arrays["length"][unit] > 0).sum() == len(expected)
        for place, (peak, b, t) in enumerate(expected):
            first, size = int(arrays["begin"][unit, place]) - 16 * b, int(arrays["length"][unit, place])
            assert first + arrays["peak"][unit, place] == t
            around = [i for i in range(16) if story[b, i] == story[b, t] and t - 15 <= i <= t + 8]
            assert (first, size) == (around[0], len(around))
            shown = arrays["values"][unit].reshape(-1, browse.WIDTH)[place] / 127 * expected[0][0]
            assert np.allclose(shown[:size], values[b, around, unit].clip(-expected[0][0], expected[0][0]), atol=expected[0][0] / 250)
            if masks is not None:
                assert [arrays["marks"][unit, place] >> i & 1 for i in range(size)] == masks[b, around, unit].tolist()


def test_what_units_write_is_the_lens_of_their_weights(runs):
    folder, models = runs
    data = data_of(folder / "out" / "gated" / "browse.html")
    arrays, model = data["runs"][0]["arrays"], models["gated"]
    writes = []
    for block in model.transformer["h"]:
        writes += [block.mlp.c_proj.weight.T, block.attn["attention"].out_proj.weight.T]
    writes = torch.cat(writes).detach().double()
    writes = writes - writes.mean(1, keepdim=True)
    logits = writes * model.transformer["ln_f"].weight.detach().double() @ model.lm_head.weight.detach().double().T
    logits = (logits - logits.mean(1, keepdim=True)).numpy()
    promoted = np.sort(logits)[:, ::-1][:, :8]
    assert np.allclose(arrays["lens_values"], np.concatenate((promoted, np.sort(logits)[:, :8]), 1), atol=1e-4)
    assert data["texts"][arrays["lens_tokens"][3, 0]] == " cat"
    unit = torch.nn.functional.normalize(writes, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    assert np.allclose(arrays["cosines"][cosine.abs().sum(1) > 2.5], cosine.topk(6).values[cosine.abs().sum(1) > 2.5], atol=1e-5)
    assert (arrays["near"] != np.arange(len(unit))[:, None]).all()


def test_the_neuron_made_for_one_token_peaks_on_it_alone(runs):
    folder, _ = runs
    data = data_of(folder / "out" / "gated" / "browse.html")
    arrays = data["runs"][0]["arrays"]
    length = arrays["length"][3] > 0
    peaks = arrays["text_tokens"][arrays["begin"][3] + arrays["peak"][3]][length]
    assert length.all() and {data["texts"][token] for token in peaks} == {" dog"}
    counted = windows()[0][:, 4:]
    assert arrays["fires"][3, 0] == pytest.approx((counted == DOG).double().mean().item())
    assert not arrays["fires"][:32][np.arange(32) != 3].any() and not arrays["length"][4].any()


def test_stories_show_the_kept_units_or_else_those_that_write_most(runs):
    folder, models = runs
    for name, model in models.items():
        data = data_of(folder / "out" / name / "browse.html")
        run = data["runs"][0]
        k = 4 if name != "heads" else 3
        units = run["arrays"]["story_units"].reshape(-1, 2, k)
        values = run["arrays"]["story_values"].reshape(-1, 2, k)
        raw = {text: token for token in range(V) for text in
               [(bytes([token]) if token < 256 else HOSTILE[token - 256].encode() if token < EOT else b"").decode(errors="backslashreplace")]}
        at = 0
        for length in data["story_lengths"]:
            story = [raw[data["texts"][token]] for token in data["story_tokens"][at : at + length]]
            idx = torch.tensor([[EOT, *story]])
            a = units_in(model, idx)[0, 1:]  # (T, L, U)
            shown = torch.from_numpy(units[at : at + length].astype(np.int64))
            assert np.allclose(a.gather(-1, shown), values[at : at + length], atol=1e-6)
            if name == "plain":
                sizes = torch.stack([torch.cat((b.mlp.c_proj.weight.norm(dim=0), b.attn["attention"].out_proj.weight.norm(dim=0)))
                                     for b in model.transformer["h"]])
                written = a.abs() * sizes
                best = torch.cat((written[..., :32].topk(2).values, written[..., 32:].topk(2).values), -1)
                assert torch.allclose(written.gather(-1, shown), best.sort(-1, descending=True).values)
            else:
                out = model.ablated(idx)
                mask = torch.cat((out.mlp_mask, out.attn_mask), -1)[0, 1:]
                assert torch.equal(torch.zeros_like(mask).scatter_(-1, shown, 1.0), mask)
            at += length
        assert at == len(units) and len(data["story_lengths"]) == 8


def test_a_head_writes_what_its_outputs_are_on_average():
    torch.manual_seed(0)
    z, heads = torch.randn(50, 3, 4), browse.HeadOutputs()
    heads.add(z[:20])
    heads.add(z[20:])
    for h in range(3):
        norm = z[:, h].norm(dim=-1, keepdim=True)
        assert torch.allclose(heads.mean()[h], torch.linalg.lstsq(norm, z[:, h]).solution[0], atol=1e-6)


def test_stories_are_whole_where_they_fit():
    tokens = np.array([1, 2, 9, 9, 3, 9, 4, 5, 6, 7, 8, 9, 1])
    found, lengths = browse.pick_stories(tokens, 9, 4, 10)
    assert found.tolist() == [[9, 1, 2, 9], [9, 3, 9, 9], [9, 1, 9, 9]] and lengths.tolist() == [2, 1, 1]
    found, lengths = browse.pick_stories(np.arange(1, 9), 9, 4, 10)  # none fits
    assert found.tolist() == [[9, 1, 2, 3]] and lengths.tolist() == [3]


@pytest.mark.parametrize("name", ["gated", "heads"])
def test_the_page_does_not_depend_on_how_much_is_read_at_a_time(runs, name, monkeypatch, tmp_path):
    folder, _ = runs
    once = data_of(folder / "out" / name / "browse.html")
    monkeypatch.setattr(activations, "TOKENS", 48)
    monkeypatch.setattr(browse, "AT_ONCE", 1)
    write(folder / "out" / name, "--page", tmp_path / "page.html")
    again = data_of(tmp_path / "page.html")
    assert once["texts"] == again["texts"]
    for array, other in zip(once["runs"][0]["arrays"].values(), again["runs"][0]["arrays"].values()):
        assert np.allclose(array.astype(float), other.astype(float), atol=1e-5 if array.dtype == np.float32 else 1)


def test_the_same_command_writes_the_same_page_and_no_other_file_is_replaced(runs, tmp_path):
    folder, _ = runs
    page = folder / "out" / "plain" / "browse.html"
    before = page.read_bytes()
    write(folder / "out" / "plain")
    assert page.read_bytes() == before
    (tmp_path / "mine.html").write_text("my notes")
    with pytest.raises(browse.UserError, match="mine.html is there and no page of this program"):
        write(folder / "out" / "plain", "--page", tmp_path / "mine.html")
    assert os.listdir(tmp_path) == ["mine.html"]


# ---- the page


@pytest.fixture(scope="module")
def chromium():
    """A browser. Skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt brings playwright")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no chromium here, so the page was not tested: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield browser
        browser.close()


@contextmanager
def opened(browser, path, place="", **options):
    """The page at this place. Nothing may be said in its console, raised or fetched."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(8000)
    page, noise = context.new_page(), []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("dialog", lambda dialog: (noise.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: noise.append(request.url) if not request.url.startswith(path.as_uri()) else None)
    page.goto(path.as_uri() + place)
    try:
        yield page
        assert noise == []
    finally:
        context.close()


def until(page, condition):
    """Wait for a condition in JavaScript. The page's own policy forbids to wait for it inside of the page."""
    from playwright.sync_api import Error

    for _ in range(600):
        try:
            if page.evaluate(condition):
                return
        except Error:  # what it looks at is not there yet
            pass
        page.wait_for_timeout(50)
    pytest.fail(f"never came true: {condition}")


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_hostile_text_stays_text(runs, chromium):
    folder, _ = runs
    path = folder / "out" / "gated" / "browse.html"
    assert HOSTILE[0] not in path.read_text() and "\u2028" not in path.read_text() and "<!--" not in path.read_text()
    with opened(chromium, path, "#S0T0") as page:
        shown = ""
        for story in range(8):
            page.evaluate(f"location.hash = 'S{story}T0'")
            until(page, f"document.getElementById('story-choice').value === '{story}'")
            shown += page.text_content("#story-text")
        assert all(piece.replace("\n", "↵\n") in shown for piece in HOSTILE)
        page.fill("#query", "</script>")
        assert "</script><img" in page.text_content(".results")
        assert page.locator("img").count() == 0 and page.locator("script").count() == 2


def test_the_page_runs_no_script_but_its_own(runs, chromium):
    folder, _ = runs
    context = chromium.new_context()
    page = context.new_page()
    page.goto((folder / "out" / "gated" / "browse.html").as_uri())
    page.evaluate("""() => {
        document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.broken = 1'>");
        const script = document.createElement("script");
        script.textContent = "window.broken = 2";
        document.body.append(script);
    }""")
    page.wait_for_timeout(100)
    assert page.evaluate("window.broken") is None
    context.close()


def test_a_unit_by_its_address(runs, chromium):
    folder, _ = runs
    data = data_of(folder / "out" / "gated" / "browse.html")
    arrays = data["runs"][0]["arrays"]
    with opened(chromium, folder / "out" / "gated" / "browse.html", "#L0N3") as page:
        assert page.title().endswith("out/gated")
        assert page.text_content(".unit h3") == "L0N3"
        assert page.locator(".snippet").count() == 8
        assert {text.strip() for text in page.locator(".snippet .peak").all_text_contents()} == {"dog"}
        assert page.locator(".writes .chip").first.text_content() == "·cat"
        kept = sum(bin(mark).count("1") for mark in arrays["marks"][3].tolist())
        assert page.locator(".snippet .kept").count() == kept
        assert page.text_content("dl div:has-text('kept') dd") == page.evaluate(f"percent({arrays['kept'][3, 0]})")
        page.evaluate("location.hash = 'L1A5'")
        until(page, "document.querySelector('.unit h3').textContent === 'L1A5'")
        assert page.locator(".near a").count() == 6
        page.locator(".near a").first.click()
        near = int(arrays["near"][40 + 32 + 5, 0])
        name = page.evaluate(f"models[0].name({near})")
        until(page, f"document.querySelector('.unit h3').textContent === '{name}'")
        assert page.evaluate("document.activeElement.tagName") == "H3"
        page.evaluate("location.hash = 'L0N2'")
        until(page, "document.querySelector('.unit h3').textContent === 'L0N2'")
        page.get_by_label("The next unit").focus()
        for name in ("L0N3", "L0N4"):
            page.keyboard.press("Enter")
            until(page, f"document.querySelector('.unit h3').textContent === '{name}'")
        until(page, "document.querySelector('.unit').textContent.includes('It never fires on this text.')")
        page.evaluate("location.hash = 'L9N0'")
        until(page, "document.querySelector('.unit').textContent === 'This model has no L9N0.'")


def test_units_are_picked_in_the_map_by_mouse_and_by_keys(runs, chromium):
    folder, _ = runs
    with opened(chromium, folder / "out" / "gated" / "browse.html", "#L0N0") as page:
        canvas = page.locator("canvas")
        x, y = page.evaluate("columns[0].map.corner(models[0].number('L1A2')).map((at) => at + 3)")
        canvas.hover(position={"x": x, "y": y})
        assert page.text_content("#tip").startswith("L1A2: kept ")
        canvas.click(position={"x": x, "y": y})
        until(page, "location.hash === '#L1A2' && document.querySelector('.unit h3').textContent === 'L1A2'")
        page.locator("#theme").focus()
        while page.evaluate("document.activeElement.tagName") != "CANVAS":
            page.keyboard.press("Tab")
        for key, there in (("ArrowRight", "L1A3"), ("Home", "L0N0"), ("ArrowRight", "L0N1"), ("ArrowDown", "L1N1"),
                           ("ArrowUp", "L0N1"), ("End", "L1A7")):
            page.keyboard.press(key)
            assert page.text_content("#tip").startswith(f"{there}: ")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('.unit h3').textContent === 'L1A7'")
        assert page.evaluate("document.activeElement.tagName") == "CANVAS"
        page.go_back()
        until(page, "document.querySelector('.unit h3').textContent === 'L1A2'")


def test_every_unit_of_large_models_has_its_own_place_in_the_map(runs, chromium):
    folder, _ = runs
    with opened(chromium, folder / "out" / "gated" / "browse.html") as page:
        found = page.evaluate("""() => [[8, 512, 128, 1200], [12, 3072, 768, 1200], [8, 512, 16, 340], [12, 3072, 12, 340]].map(
          ([layers, neurons, attention, width]) => {
            const units = neurons + attention, model = { layers, neurons, attention, units, count: layers * units, isNeuron: (u) => u % units < neurons };
            const map = Object.assign(Object.create(UnitMap.prototype), { model, canvas: { clientWidth: width } });
            map.layOut();
            let wrong = 0;
            for (let unit = 0; unit < model.count; unit++) {
              const [x, y] = map.corner(unit), half = map.cell / 2;
              if (map.unitAt(x + half, y + half) !== unit || x + map.cell > width + 0.01 || y + map.cell > map.height) wrong += 1;
            }
            return [wrong, map.cell];
          })""")
        assert [wrong for wrong, _ in found] == [0] * 4 and all(cell >= 3 for _, cell in found)


def test_search_by_token(runs, chromium):
    folder, _ = runs
    with opened(chromium, folder / "out" / "gated" / "browse.html", "#L1N0") as page:
        page.keyboard.press("/")
        page.keyboard.type("dog")
        results = page.locator(".results")
        assert "·dog" in results.text_content() and "Dog" in results.text_content()
        first = results.locator("li").first
        assert first.text_content() == "L0N38 of 8 snippets"
        page.keyboard.press("Enter")
        until(page, "document.querySelector('.unit h3').textContent === 'L0N3'")
        page.fill("#query", "cat")
        assert "L0N3" in results.locator("ul").last.text_content()
        page.fill("#query", "l1a4")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('.unit h3').textContent === 'L1A4'")
        page.fill("#query", "nosuchtoken")
        assert "No token begins like that" in results.text_content()
        page.fill("#query", "")
        assert results.text_content() == ""


def test_a_story_token_by_token(runs, chromium):
    folder, _ = runs
    path = folder / "out" / "gated" / "browse.html"
    run = data_of(path)["runs"][0]
    units = run["arrays"]["story_units"].reshape(-1, 2, 4)

    lengths = data_of(path)["story_lengths"]
    story = lengths.index(max(lengths))
    start = sum(lengths[:story])

    def expected(token):
        names = set()
        token += start
        for layer in range(2):
            names |= {f"L{layer}N{unit}" if unit < 32 else f"L{layer}A{unit - 32}" for unit in units[token, layer].tolist()}
        return names

    with opened(chromium, path, f"#S{story}T1") as page:
        def shown():
            return set(page.locator(".layers .name").all_text_contents())
        assert shown() == expected(1) and len(shown()) == 8
        page.locator("#T3").hover()
        assert shown() == expected(3)
        page.locator("#T2").click()
        until(page, f"location.hash === '#S{story}T2'")
        page.locator("#T4").hover()  # held: does not move
        assert shown() == expected(2)
        page.locator("#story-text").focus()
        page.keyboard.press("Escape")
        page.keyboard.press("ArrowRight")
        assert shown() == expected(3)
        page.keyboard.press("End")  # a longer story is cut where the window ends
        assert "the last token shown" in page.text_content("#now")
        page.keyboard.press("Home")
        assert shown() == expected(0) and page.get_attribute("#story-text", "aria-activedescendant") == "T0"
        page.locator(".entry").first.hover()
        name = page.locator(".entry .name").first.text_content()
        assert page.locator("#story-text .also").count() == sum(name in expected(token) for token in range(lengths[story]))
        page.locator(".entry").first.click()
        until(page, f"document.querySelector('.unit h3').textContent === '{name}'")
        page.locator("#to-story").click()
        page.locator("#story-after").click()
        until(page, f"document.getElementById('story-choice').value === '{(story + 1) % 8}'")


def luminance(colour):
    parts = [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    linear = [(part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4) for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


COLOURS = """() => {
  const of = (node, name) => getComputedStyle(node)[name];
  const probe = document.createElement("i");
  document.body.append(probe);
  const named = (name) => { probe.style.color = `var(--${name})`; return of(probe, "color"); };
  return Object.fromEntries(["paper", "card", "ink", "faint", "link", "hot", "cold", "gate", "pick"].map((name) => [name, named(name)]));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(runs, chromium, scheme):
    folder, _ = runs
    with opened(chromium, folder / "out" / "gated" / "browse.html", "#L0N3", color_scheme=scheme) as page:
        page.locator(".snippet").first.wait_for()
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (luminance(before) > 0.5) == (scheme == "light")
        for _ in range(2):
            bright = {name: luminance(colour) + 0.05 for name, colour in page.evaluate(COLOURS).items()}
            for front, back in (("ink", "paper"), ("ink", "card"), ("faint", "paper"), ("faint", "card"), ("link", "paper"), ("link", "card"),
                                ("ink", "hot"), ("ink", "cold"), ("pick", "paper")):
                ratio = max(bright[front], bright[back]) / min(bright[front], bright[back])
                assert ratio >= 4.5, (front, back, ratio)
            page.locator("#theme").click()
            now = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert now == before
        page.locator("#theme").click()  # the map is drawn anew, in the legend's colours of this theme
        pixel = page.evaluate("""() => {
            const map = columns[0].map, [x, y] = map.corner(4);
            return `rgb(${[...map.canvas.getContext("2d").getImageData(x + 3, y + 3, 1, 1).data].slice(0, 3).join(", ")})`; }""")
        legend = page.evaluate("[...document.querySelectorAll('.legend i')].map((node) => getComputedStyle(node).backgroundColor)")
        assert pixel in legend


@pytest.mark.parametrize("which", ["out/gated/browse.html", "both.html"])
def test_a_phone_needs_no_scrolling_sideways(runs, chromium, which):
    folder, _ = runs
    with opened(chromium, folder / which, "#L0N3", viewport={"width": 375, "height": 700}, has_touch=True) as page:
        lengths = data_of(folder / which)["story_lengths"]
        story = lengths.index(max(lengths))
        for place in ("#L0N3", "#L1A0", f"#S{story}T2"):
            page.evaluate(f"location.hash = '{place}'")
            page.wait_for_timeout(50)
            assert overflow(page) <= 0
        page.locator("#T1").tap()
        until(page, f"location.hash === '#S{story}T1'")
        page.evaluate("location.hash = 'L0N3'")
        page.fill("#query", "dog")
        page.locator("details summary").last.click()
        assert overflow(page) <= 0


def test_two_runs_side_by_side(runs, chromium):
    folder, _ = runs
    with opened(chromium, folder / "both.html", "#L0N3") as page:
        assert [Path(text).name for text in page.locator(".column h2").all_text_contents()] == ["plain", "gated"]
        left, right = (box.bounding_box() for box in page.locator(".column .unit").all())
        assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
        x, y = page.evaluate("columns[1].map.corner(models[1].number('L1N9')).map((at) => at + 3)")
        page.locator("canvas").last.click(position={"x": x, "y": y})
        until(page, "[...document.querySelectorAll('.unit h3')].every((node) => node.textContent === 'L1N9')")
        assert page.locator(".unit h3").count() == 2
        assert "this model has no gate" in page.locator(".legend").first.text_content()
        assert "Kept by the gate" in page.locator(".legend").last.text_content()
        page.evaluate("location.hash = 'S1T0'")
        until(page, "document.querySelectorAll('.layers').length === 2")
        assert "writing most" in page.locator(".layers").first.text_content()
        assert "kept by the gate" in page.locator(".layers").last.text_content()


def test_two_runs_begin_with_a_unit_that_is_kept(runs, chromium, tmp_path):
    folder, _ = runs
    write(folder / "out" / "gated", folder / "out" / "plain", "--page", tmp_path / "both.html")
    with opened(chromium, tmp_path / "both.html") as page:
        assert page.evaluate("tellingUnit(models[0]) !== tellingUnit(models[1]) && state.unit === tellingUnit(models[0])")
        assert page.locator(".unit dd").first.text_content() != "never"


def test_a_page_without_gates(runs, chromium):
    folder, _ = runs
    with opened(chromium, folder / "out" / "plain" / "browse.html") as page:
        assert page.locator("[value=kept]").is_disabled() and page.locator("[value=fires]").is_checked()
        assert "kept" not in page.text_content("#units .unit")
        assert "units.py" not in page.text_content(".column") and "n2g.py" in page.text_content(".column")


def test_a_page_of_heads(runs, chromium):
    folder, _ = runs
    with opened(chromium, folder / "out" / "heads" / "browse.html", "#L1H1") as page:
        assert page.text_content(".unit h3") == "L1H1" and "head of layer 1" in page.text_content(".unit")
        page.evaluate("location.hash = 'L1A1'")
        until(page, "document.querySelector('.unit').textContent === 'This model has no L1A1.'")


def make_findings(run, checkpoint):
    """What the other experiments leave of neuron 3."""
    node = lambda text, activating, importance: {"id": text, "activating": activating, "importance": importance}
    graph = {"directed": True, "nodes": [node(" the", False, 0.9), node("</script>", False, 0.6), node(" dog", True, 1.0), *(
        node(f"n{i}", False, 0.1) for i in range(30))],
        "edges": [{"source": " the", "target": " dog"}, {"source": "</script>", "target": " the"}, {"source": "n29", "target": " dog"},
                  {"source": " dog", "target": " dog"}]}
    (run / "n2g_neurons.json").write_text(json.dumps({"checkpoint": checkpoint, "settings": {}, "neurons": [
        {"layer": 0, "neuron": 3, "peak": 1.0, "graph": graph, "precision": 0.75, "recall": None, "f1": 0.5},
        {"layer": 0, "neuron": 4, "peak": 0.0, "graph": None, "precision": None, "recall": None, "f1": None}]}))
    (run / "explain_neurons.json").write_text(json.dumps({"checkpoint": checkpoint, "settings": {}, "neurons": [
        {"layer": 0, "neuron": 3, "score": 0.91, "random_score": 0.5, "explanation": "<b>dogs</b>", "tokens": [[" dog", 1.0]]},
        {"layer": 0, "neuron": 4, "score": None, "random_score": None, "reason": "it never fires", "explanation": "", "tokens": []}]}))
    (run / "units.json").write_text(json.dumps({"checkpoint": checkpoint, "kinds": {
        "mlp": {"entropy": [3.25, 4.5], "rate": [[0.1] * 32] * 2}, "attn": {"dead": [0, None]}}}))


def test_what_other_experiments_found_is_shown_if_it_is_of_these_weights(runs, chromium, tmp_path):
    folder, models = runs
    run = make_run(tmp_path / "out" / "run", models["gated"], folder / "data")
    make_findings(run, fingerprint(models["gated"]))
    write(run)
    with opened(chromium, run / "browse.html", "#L0N3") as page:
        unit = page.locator(".unit")
        assert "<b>dogs</b>" in unit.text_content() and "score 0.91 · on random text alone 0.50" in unit.text_content()
        assert page.locator("svg rect").count() == 24 and page.locator("svg .activating").count() == 1
        assert "precision 0.75 · F1 0.50 · 9 less important ones left out" in unit.text_content()
        places = dict(zip(page.locator("svg g text").all_text_contents(), page.evaluate(
            "[...document.querySelectorAll('svg g')].map((node) => node.getBoundingClientRect().left)")))
        assert places["</script>"] < places["·the"] < places["·dog"]
        page.locator(".usage summary").click()
        page.set_viewport_size({"width": 375, "height": 700})
        assert page.locator("svg").bounding_box()["width"] > 375 and overflow(page) <= 0
        rows = page.locator(".usage tr").all_text_contents()
        assert rows == ["mlp entropyattn dead", "L03.250", "L14.5–"]
        page.evaluate("location.hash = 'L0N4'")
        until(page, "document.querySelector('.unit').textContent.includes('it never fires')")
    make_findings(run, "of other weights")
    write(run)
    with opened(chromium, run / "browse.html", "#L0N3") as page:
        assert page.locator("svg").count() == 0
        commands = page.locator(".column code").all_text_contents()
        assert commands == [f"python interp/{script}.py {run}" for script in ("n2g", "explain", "units")]
