"""What experiments read: activations of the clean stream, windows of text, strongest snippets.

Example: the 20 strongest activations of every neuron, and the text around them:

    activate = partial(read_sites, [Site(model, layer, "mlp_act") for layer in range(n_layer)])
    text, best = Text(tokens, eot, T, device, context=64), Strongest(20)
    for x, positions, stories in text.read(activate):
        best.add(x, positions, stories)
    values, positions = best.found()
    snippets = text.snippets(activate, positions, left=63, right=0)

Shape letters: B windows of T tokens, d channels of a site, V vocabulary; n tokens of a batch, U
units (channels, or features of an autoencoder), S stories in a batch, K activations kept per unit.
"""

from collections import defaultdict
from contextlib import ExitStack, suppress
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from model import GPTNeo
from prepare import UserError

# a site is the output of this module of a block, or its input if the site is one of UNITS
SITES = {"mlp_out": "mlp", "attn_out": "attn.attention", "resid": "", "mlp_act": "mlp.c_proj",
         "attn_act": "attn.attention.out_proj"}
UNITS = ("mlp_act", "attn_act")  # neurons, and the channels of all heads' outputs
TOKENS = 8192  # in a forward pass; a constant, so that a resumed measurement rounds the same way


class Reached(Exception):
    """Ends a forward pass as soon as all activations are read."""


class Site:
    """A place in the clean stream of a model: block `layer`, and one of SITES.

    center: read x minus its mean over channels, as the paper's library does; LayerNorm removes that
    mean anyway. UNITS are never centred. Raises UserError if there is no such block.
    """

    def __init__(self, model, layer, site, center=True):
        if not 0 <= layer < model.config.n_layer:
            last = model.config.n_layer - 1
            raise UserError(f"--layer={layer}: the blocks of this model are 0 to {last}")
        self.model, self.layer, self.site = model, layer, site
        self.center = center and site not in UNITS
        self.d = model.config.n_embd * (4 if site == "mlp_act" else 1)
        self.module = model.transformer["h"][layer].get_submodule(SITES[site])

    def hook(self, use):
        """Call use(x), x (B, T, d), in every pass; what it returns, unless None, replaces x.
        -> a handle: call its remove(), or use it in a `with` block, to end this."""
        def on_input(module, args):
            return use(args[0])

        def on_output(module, args, out):
            x, *others = out if isinstance(out, tuple) else (out,)  # others: keys and values
            if self.center:
                x = x - x.mean(-1, keepdim=True)
            x = use(x)
            return (x, *others) if others and x is not None else x

        if self.site in UNITS:
            return self.module.register_forward_pre_hook(on_input)
        return self.module.register_forward_hook(on_output)

    @torch.no_grad()
    def run(self, idx, edit):
        """idx (B, T) -> clean logits (B, T, V), with edit(x) in place of the site's x (B, T, d)."""
        with self.hook(edit):
            return self.model(idx)

    def read(self, idx):
        """idx (B, T) -> x (B, T, d)."""
        return read_sites([self], idx)


@torch.no_grad()
def read_sites(sites, idx):
    """idx (B, T) -> x (B, T, U), U the channels of all these sites of one model, side by side.
    One forward pass, which ends after the last of them."""
    found = {}

    def keep(number, x):
        found[number] = x  # (B, T, d)
        if len(found) == len(sites):
            raise Reached

    with suppress(Reached), ExitStack() as hooks:
        for number, site in enumerate(sites):
            hooks.enter_context(site.hook(partial(keep, number)))
        sites[0].model(idx)
    return torch.cat([found[number] for number in range(len(sites))], -1)  # (B, T, U)


@torch.no_grad()
def kept_units(model, idx):
    """The units that the gates keep at idx (B, T): -> {"attn", "mlp": (B, T, L, k), rising}."""
    hidden, inputs, caches = model.clean_pass(idx)
    _, masks = model.ablated_pass(hidden, inputs, caches)  # without logits: most of the work
    kept = {}
    for kind, of_layers in zip(("attn", "mlp"), zip(*masks)):
        mask = torch.stack(of_layers, 2)  # (B, T, L, U), k ones a row
        kept[kind] = mask.nonzero()[:, -1].view(*mask.shape[:3], -1)
    return kept


def untrained(config, seed):
    """A model of this GPTNeoConfig before training. The CPU's random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTNeo(config).eval()


def windows_at(tokens, starts, T, device):
    """The windows of T tokens that begin at these positions: -> (len(starts), T) int64."""
    idx = tokens[np.asarray(starts)[:, None] + np.arange(T)]  # (B, T) uint16
    return torch.from_numpy(idx.astype(np.int64)).to(device)


def held_out_windows(tokens, T, count):
    """Where at most count windows begin, spread evenly over validation text. Raises UserError."""
    windows = len(tokens) // T
    if not windows:
        raise UserError(f"{len(tokens)} validation tokens are fewer than a window of {T}: "
                        f"choose other --data")
    numbers = np.linspace(0, windows, min(count, windows), endpoint=False)
    return numbers.astype(np.int64) * T


def token_text(tokenizer, token):
    """The text of a token; bytes that are not UTF-8 are shown as \\xe2\\x80."""
    return tokenizer.decode_single_token_bytes(token).decode(errors="backslashreplace")


def read_windows(activate, tokens, starts, T, device, title=None):
    """Yields, batch by batch, where windows start (B) and their activations (B, T, U): of activate,
    idx (B, T) -> (B, T, U), such as Site.read. Without a title there is no progress bar."""
    step = max(1, TOKENS // T)  # windows in a batch
    with tqdm(total=len(starts) * T, desc=title, unit=" tokens", unit_scale=True, leave=False,
              disable=title is None) as bar:
        for first in range(0, len(starts), step):
            part = starts[first : first + step]
            yield part, activate(windows_at(tokens, part, T, device))
            bar.update(len(part) * T)


class Snippet(NamedTuple):
    """A piece of one story, and what one unit does in it."""

    tokens: list
    values: list  # the unit's activations, one a token
    peak: int  # which of the tokens it was cut out around


class Text:
    """A stream of tokens, stories that each end in eot, as windows of T tokens for a model to read.

    context: tokens at the start of a window that are only read, and not counted; the window before
    overlaps this one and counts them. starts: where the windows begin, rising; by default they
    cover the text, except its first `context` tokens and an incomplete last window. Raises
    UserError.
    """

    def __init__(self, tokens, eot, T, device, context=0, starts=None):
        if starts is None:
            starts = np.arange(0, len(tokens) - T + 1, T - context)
        self.tokens, self.T, self.device = tokens, T, device
        self.context, self.starts = context, np.asarray(starts)
        if not len(self.starts):
            raise UserError(f"{len(tokens)} tokens are fewer than a window of {T}: "
                            f"choose other --data")
        self.ends = np.flatnonzero(tokens == eot)  # where the end-of-text of every story is

    def stories(self, positions):
        """The numbers of the stories that these tokens belong to. An end-of-text ends its own."""
        return np.searchsorted(self.ends, positions)

    def read(self, activate, title=None):
        """Yields all that count, batch by batch: activations (n, U), positions (n), stories (n)."""
        batches = read_windows(activate, self.tokens, self.starts, self.T, self.device, title)
        for starts, x in batches:  # (B), (B, T, U)
            positions = (starts[:, None] + np.arange(self.context, self.T)).flatten()  # (n)
            yield x[:, self.context :].flatten(0, 1), positions, self.stories(positions)

    def piece(self, position, start, left, right):
        """Where a snippet begins and ends: within its story and the window that begins at start."""
        story = self.stories(position)
        begin = self.ends[story - 1] + 1 if story else 0
        end = self.ends[story] + 1 if story < len(self.ends) else len(self.tokens)
        return max(begin, start, position - left), min(end, start + self.T, position + right + 1)

    def snippets(self, activate, positions, left, right, title=None):
        """The text around counted positions (U, K): -> for each unit a list of K Snippets, with up
        to left tokens before and right tokens after, within the story and the window. The windows
        are read again. activate: idx (B, T) -> (B, T, U), those U units."""
        positions = np.asarray(positions)
        which = np.searchsorted(self.starts + self.context, positions, side="right") - 1  # (U, K)
        wanted = defaultdict(list)  # where a window begins: (unit, place) of what lies in it
        for (unit, place), window in np.ndenumerate(which):
            wanted[int(self.starts[window])].append((unit, place))
        found = np.empty(positions.shape, dtype=object)  # (U, K)
        again = np.array(sorted(wanted), dtype=np.int64)
        batches = read_windows(activate, self.tokens, again, self.T, self.device, title)
        for starts, x in batches:
            for start, values in zip(starts.tolist(), x.cpu()):  # values (T, U)
                for unit, place in wanted[start]:
                    position = int(positions[unit, place])
                    low, high = self.piece(position, start, left, right)
                    found[unit, place] = Snippet(
                        self.tokens[low:high].tolist(),
                        values[low - start : high - start, unit].tolist(), int(position - low))
        return found.tolist()


class Strongest:
    """The `count` largest activations of every unit, one per story; of equal ones the first."""

    def __init__(self, count):
        self.count = count
        self.kept = None  # values (K, U), largest first, and positions (K, U)
        self.story = None  # the last one seen: it may continue in the next batch
        self.open = None  # its largest values (1, U) so far, and their positions (1, U)

    def add(self, x, positions, stories):
        """x (n, U); positions (n) and stories (n) of its tokens, which rise from call to call."""
        if not len(x):
            return
        begins = np.flatnonzero(np.diff(stories, prepend=-1))  # (S), rows of x where a story begins
        lengths = np.diff(begins, append=len(stories)).tolist()
        tops = [rows.max(0) for rows in x.split(lengths)]  # of equals, max takes the first
        values = torch.stack([top.values for top in tops])  # (S, U)
        rows = [top.indices + begin for top, begin in zip(tops, begins.tolist())]  # S times (U)
        places = torch.from_numpy(positions).to(x.device)[torch.stack(rows)]  # (S, U)
        if self.story == stories[0]:  # it continues in this batch
            larger = values[:1] > self.open[0]  # (1, U)
            values[:1] = torch.where(larger, values[:1], self.open[0])
            places[:1] = torch.where(larger, places[:1], self.open[1])
        elif self.open:
            self.kept = self.merged(self.open)
        self.kept = self.merged((values[:-1], places[:-1]))
        self.story, self.open = stories[-1], (values[-1:], places[-1:])

    def merged(self, later):
        """What is kept once the (values, positions), each (S, U), of later stories join."""
        pairs = [self.kept, later] if self.kept else [later]
        values, places = (torch.cat(rows) for rows in zip(*pairs))  # (K + S, U)
        # equals stay in the order of the text
        values, order = values.sort(dim=0, descending=True, stable=True)
        return values[: self.count], places.gather(0, order)[: self.count]

    def found(self):
        """values (U, K), largest first, and positions (U, K), on the CPU; K < count where stories
        are few. Units that never fire are there too, with what they have."""
        values, places = self.merged(self.open)
        return values.T.cpu(), places.T.cpu()
