"""Measure trained models: perplexity, bits per byte, L1, use of units; samples and a plot.

    python eval.py out/local_k2                        a run folder (its best.pt) or a .pt file
    python eval.py out/sweep/*/ --over_seeds           one row for runs that differ only in the seed
    python eval.py out/local_k2 --json > runs.json     every number, with each unit's firing rate
    python eval.py out/* --csv > runs.csv              the same rows without the rates
    python eval.py out/local_k2 --sample "Once upon"   a story from each of the two streams
    python eval.py out/* --plot runs.png               loss curves, firing rate of every unit

Every token of the validation split is predicted once, in windows of block_size tokens that do not
overlap. The ± of a perplexity is its standard error over windows. With --over_seeds every ± is the
sample standard deviation over the runs of a row.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import config as knobs
from model import GPTNeo, load_checkpoint, replace_file
from prepare import UserError, load_meta, load_tokenizer, load_tokens

# knobs that only older checkpoints have, with the value that today's code stands for
OLD_KNOBS = {"freeze": "none", "gate_lr_multiplier": 1.0, "anneal_end": 0.0, "adam_eps": 1e-8}
DEFAULTS = {name: field.default for name, field in knobs.FIELDS.items()} | OLD_KNOBS
COLUMNS = (  # heading, entry of a row, its format
    ("run", "run", ""), ("data", "data", ""), ("step", "step", ",.0f"),
    ("ablation", "ablation", ""), ("k attn", "k_attn", ""), ("k mlp", "k_mlp", ""),
    ("differs", "differs", ""), ("seeds", "n", ""),
    ("ppl clean", "ppl_clean", ".3f"), ("ppl ablated", "ppl_ablated", ".3f"),
    ("bits/byte", "bits_per_byte_clean", ".4f"), ("ablated bits", "bits_per_byte_ablated", ".4f"),
    ("L1", "l1", ".4f"), ("L1 all", "l1_all", ".4f"), ("L1 blocks", "l1_blocks", ".4f"),
    ("attn ever", "attn_ever", ".1%"), ("mlp ever", "mlp_ever", ".1%"),
    ("attn/story", "attn_per_story", ".1f"), ("mlp/story", "mlp_per_story", ".1f"))

# ------------------------------------------------------------------------------------ measurements


def loss_numbers(stream, losses, is_end, T, text_bytes):
    """{name: number} of one stream over a split with text_bytes UTF-8 bytes of text.

    losses (n,): nats per token. is_end (n,): end-of-text tokens, which have no bytes.
    """
    windows = losses.split(T)
    sums = np.array([window.sum().item() for window in windows])  # nats
    sizes = np.array([len(window) for window in windows])  # tokens
    loss = sums.sum() / sizes.sum()
    # windows vary independently, tokens do not: standard error of a ratio of sums over windows
    variance = ((sums - loss * sizes) ** 2).sum() * len(sums) / max(1, len(sums) - 1)
    error = math.sqrt(variance) / sizes.sum()
    bits = losses[~is_end].sum().item() / math.log(2)
    return {
        f"loss_{stream}": loss,
        f"ppl_{stream}": math.exp(loss),
        f"ppl_{stream}_se": math.exp(loss) * error,
        f"bits_per_byte_{stream}": bits / text_bytes}


def window_batches(n, T, batch_size):
    """The positions 0 to n - 1 in windows, (B, T) each. A shorter last window comes alone."""
    whole = torch.arange(n - n % T).view(n // T, T)
    rest = torch.arange(n - n % T, n)[None]
    return [at for at in (*whole.split(batch_size), rest) if at.numel()]


@torch.no_grad()
def measure_split(model, tokens, eot, text_bytes, batch_size=8, device="cpu"):
    """{name: number or list}: the losses of each stream over a split, and the use of units.

    tokens: uint16 (n,), stories that each end in eot, with text_bytes UTF-8 bytes in all.
    A unit is used at a token when its mask is 1 there.
    """
    config, n = model.config, len(tokens)
    L, T = config.n_layer, config.block_size
    # the end-of-text in front stands for the end of the story before
    text = torch.from_numpy(np.concatenate(([eot], tokens), dtype=np.int32))  # (n + 1)
    is_end = text[1:] == eot  # (n)
    story = is_end.cumsum(0) - is_end.int()  # (n): the story of each target, counted from 0
    streams, units = ["clean"], {}
    if config.ablation != "none":
        streams, units = ["clean", "ablated"], {"attn": config.attn_units, "mlp": 4 * config.n_embd}
    losses = {stream: torch.zeros(n).double() for stream in streams}  # nats per token
    counts = {}  # tokens of a story at which a unit is used
    for kind, N in units.items():
        counts[kind] = torch.zeros(int(story[-1]) + 1, L * N).int()  # (stories, L * N)

    for at in window_batches(n, T, batch_size):  # (B, T)
        inputs, targets = text[at].long().to(device), text[at + 1].long().to(device)
        outputs = model.ablated(inputs) if units else [model(inputs)]
        for stream, logits in zip(streams, outputs):  # (B, T, V)
            rows = logits.flatten(0, 1).float()  # (B * T, V)
            nats = F.cross_entropy(rows, targets.flatten(), reduction="none")  # (B * T)
            losses[stream][at] = nats.view(at.shape).cpu().double()
        for kind, mask in zip(units, outputs[2:]):  # (B, T, L, N) of zeros and ones
            used = mask.flatten(0, 1).flatten(1).int().cpu()  # (B * T, L * N)
            counts[kind].index_add_(0, story[at].flatten(), used)

    numbers = {"tokens": n, "stories": int(is_end.sum())}
    for stream in streams:
        numbers |= loss_numbers(stream, losses[stream], is_end, T, text_bytes)
    for kind, count in counts.items():
        tokens_used = count.sum(0)  # (L * N)
        numbers[f"{kind}_ever"] = (tokens_used > 0).double().mean().item()
        numbers[f"{kind}_per_story"] = (count > 0).sum(1).double().mean().item()
        numbers[f"{kind}_rate"] = (tokens_used.double() / n).view(L, -1).tolist()
    return numbers


def centred(weight, dim):
    return weight - weight.mean(dim, keepdim=True)


def mean_abs(tensors):
    """The mean absolute entry of all of them together."""
    return sum(w.abs().sum().item() for w in tensors) / sum(w.numel() for w in tensors)


def l1_norms(model):
    """Mean absolute weight of the clean stream. Gates do not count.

    l1: of the weights as TransformerLens stores them, which the paper used: embedding and
        unembedding apart, biases of q, k, v and unembedding present and zero, weights that write
        to the residual stream centred over channels, the unembedding over the vocabulary.
    l1_all, l1_blocks: of the model's own weights, with and without the two embeddings.
    """
    L, C, V = model.config.n_layer, model.config.n_embd, model.config.vocab_size
    weights = {name: w.double() for name, w in model.clean_state_dict().items()}
    weights.pop("lm_head.weight")  # tied: it is the token embedding
    wte = weights.pop("transformer.wte.weight")  # (V, C)
    wpe = weights.pop("transformer.wpe.weight")  # (block_size, C)
    lens = [centred(wte, -1), centred(wpe, -1), centred(wte, 0)]  # W_E, W_pos, W_U
    lens.append(wte.new_zeros(V + 3 * L * C))  # b_U; b_Q, b_K, b_V of every layer
    for name, w in weights.items():
        writes = "out_proj" in name or "c_proj" in name  # along dimension 0
        lens.append(centred(w, 0) if writes else w)
    blocks = list(weights.values())
    return {
        "l1": mean_abs(lens),
        "l1_all": mean_abs([wte, wpe, *blocks]),
        "l1_blocks": mean_abs(blocks)}


# ------------------------------------------------------------------------------------ runs as rows


class Run(NamedTuple):
    path: str  # as the user typed it
    model: GPTNeo
    step: int  # updates done
    train_config: dict  # {knob: value}
    tokenizer: dict  # for load_tokenizer
    data_checksum: str  # of the data it was trained on


def run_paths(paths):
    """The paths without existing files and folders that are no runs, as out/* finds them."""
    runs = []
    for path in paths:
        is_run = path.endswith(".pt") or os.path.exists(Path(path, "best.pt"))
        if is_run or not os.path.exists(path):
            runs.append(path)
        else:
            print(f"{path} has no best.pt: left out", file=sys.stderr)
    return runs or paths


def open_run(path):
    """The Run of a folder's best.pt or of a .pt file. Raises ModelError."""
    checkpoint = load_checkpoint(path)
    model = GPTNeo.from_checkpoint(checkpoint).eval()
    names = ("step", "train_config", "tokenizer", "data")
    return Run(path, model, *[checkpoint[name] for name in names])


def find_data(run, data=None):
    """(folder, its meta.json) of the data to measure a run on: data, or else the run's own.

    A relative folder is looked for here and in every folder above the run. Raises UserError.
    """
    name = run.train_config["data"] if data is None else data
    for parent in (Path(), *Path(run.path).absolute().parents):
        folder = parent / name
        meta = load_meta(folder) if os.path.isfile(folder / "meta.json") else {}
        fits = meta.get("tokenizer") == run.tokenizer
        if fits and (data is not None or meta["checksum"] == run.data_checksum):
            return str(folder), meta
    raise UserError(f"no data for {run.path}: {name} is not there, has another tokenizer, or has "
                    f"changed since training. Name data of the same tokenizer with --data")


def trained_with(run):
    """{knob: value}. In init_from, the run's own seed is written {seed}, as in bench/sweep.py."""
    values = DEFAULTS | run.train_config | dataclasses.asdict(run.model.config)
    if values["ablation"] == "none":
        values |= {"k_attn": 0, "k_mlp": 0}
    own = rf"seed{values['seed']}(?!\d)"
    return values | {"init_from": re.sub(own, "seed{seed}", values["init_from"])}


def describe_run(run, folder, meta):
    """A row before anything is measured: a dict with every knob that decides the result.

    recipe: a name that runs share if they differ only in the seed.
    """
    values = knobs.decisive(trained_with(run))
    same = [{**values, "seed": None}, run.data_checksum, meta["checksum"]]
    recipe = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:8]
    return {"run": str(run.path), "recipe": recipe, "step": run.step, **values,
            "data": folder, "checksum": meta["checksum"]}


def evaluate_run(run, folder, meta, batch_size, device):
    """The row of a run: a dict."""
    model, tokens = run.model.to(device), load_tokens(folder, "val")
    text_bytes = meta["val"]["bytes"]
    numbers = measure_split(model, tokens, meta["eot"], text_bytes, batch_size, device)
    return describe_run(run, folder, meta) | numbers | l1_norms(model)


def refuse_repeats(rows):
    """Raises UserError when runs have the same recipe and the same seed."""
    paths = {}
    for row in rows:
        paths.setdefault((row["recipe"], row["seed"]), []).append(row["run"])
    for same in paths.values():
        if len(same) > 1:
            raise UserError(f"{' and '.join(same)} are the same run with the same seed: "
                            f"give one of them")


def common_name(paths):
    return os.path.commonprefix([*paths]) + ("*" if len(paths) > 1 else "")


def over_seeds(frame):
    """A DataFrame with one row for each recipe.

    Of every measured number x: x, the mean; x_sd, the sample standard deviation.
    """
    groups = frame.groupby("recipe", sort=False)
    table = groups.agg(run=("run", common_name), n=("seed", "size"), seeds=("seed", list))
    shared = [*knobs.decisive(DEFAULTS), "data", "checksum", "tokens", "stories"]
    table = table.join(groups[shared].first().drop(columns="seed"))
    for name in frame.select_dtypes("number").columns.difference(shared, sort=False):
        table[[name, f"{name}_sd"]] = groups[name].agg(["mean", "std"])
    return table.reset_index()


def differences(frame):
    """For every row a text: the knobs in which rows differ and that are not at their default."""
    texts = frame["run"].str[:0]
    for name in frame.columns.intersection([*DEFAULTS], sort=False):
        if frame[name].nunique() > 1 and name not in ("data", "ablation", "k_attn", "k_mlp"):
            words = f" {name}=" + frame[name].astype(str)
            texts += words.where(frame[name] != DEFAULTS[name], "")
    return texts.str.strip()


def to_json(frame):
    """Its rows with every digit, null for what a row lacks."""
    whole = frame.astype(object).where(frame.notna(), None)
    return json.dumps(whole.to_dict("records"), indent=1)


def cell(row, name, form):
    """An entry of a row as text, ± its deviation or error; - where the row lacks it."""
    value = row.get(name, math.nan)
    spread = row.get(f"{name}_sd", row.get(f"{name}_se", math.nan))
    if value != value:  # NaN
        return "-"
    text = format(value, form)
    return text if math.isnan(spread) else f"{text} ± {spread:{form}}"


def to_text(frame):
    """COLUMNS, without those in which no row has anything. The runs are aligned to the left."""
    table, rows = frame[["run"]].copy(), frame.to_dict("records")
    for heading, name, form in COLUMNS:
        texts = [cell(row, name, form) for row in rows]
        if set(texts) - {"-", ""}:
            table[heading] = texts
    return table.set_index("run").rename_axis(index=None, columns="run").to_string()


# --------------------------------------------------------------------------------- samples, plots


def print_samples(run, args):
    """Continue the prompt once from each stream, with the same random numbers."""
    tokenizer, device = load_tokenizer(run.tokenizer), run.model.lm_head.weight.device
    prompt = tokenizer.encode_ordinary(args.sample) or [tokenizer.eot_token]
    idx = torch.tensor([prompt], device=device)  # (1, T)
    for stream in ["clean"] if run.model.config.ablation == "none" else ["clean", "ablated"]:
        story = run.model.generate(
            idx, args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
            generator=torch.Generator(device).manual_seed(args.seed),
            stream=stream, stop_token=tokenizer.eot_token)
        tokens = [token for token in story[0].tolist() if token != tokenizer.eot_token]
        print(f"\n--- {run.path}, {stream} stream, temperature {args.temperature}, "
              f"seed {args.seed}\n{tokenizer.decode(tokens)}")


def save_figure(path, figure):
    """A matplotlib figure, in the format that path ends in; the file is whole or not there."""
    with replace_file(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=120)


def plain(text):
    """For matplotlib, which reads $...$ as a formula and leaves out labels with a leading _."""
    return re.sub("^_", " _", str(text).replace("$", r"\$"))


def draw_runs(path, rows):
    """Three panels: validation loss; firing rate of the attention units, and of the neurons."""
    import pandas as pd
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    loss, *panels = figure.subplots(1, 3)
    for place, row in enumerate(rows):
        color, run = f"C{place}", Path(row["run"])
        loss.plot([], color=color, label=plain(run) if place < 6 else None)
        metrics = (run if run.is_dir() else run.parent) / "metrics.jsonl"
        if metrics.exists():
            lines = pd.read_json(metrics, lines=True).query("step > 0")  # step 0 is far above
            loss.plot(lines["step"], lines["val_clean"], "-", color=color)
            loss.plot(lines["step"], lines["val_ablated"].astype(float), "--", color=color)
        for axes, kind in zip(panels, ("attn", "mlp")):
            rates = np.array(row.get(f"{kind}_rate", []))  # (L, N)
            axes.semilogy(-np.sort(-rates).T, color=color)
    title = f"6 of {len(rows)} runs" if len(rows) > 6 else None
    loss.legend(title=title, fontsize="small")
    loss.set(title="validation loss (dashed: ablated stream)", xlabel="updates",
             ylabel="nats per token")
    for axes, units in zip(panels, ("attention units", "neurons")):
        axes.set(title=f"firing rate of {units}, a line for each layer", ylabel="share of tokens",
                 xlabel=f"{units}, the busiest first")
    save_figure(path, figure)


# ------------------------------------------------------------------------------------ command line


def at_least(low, kind):
    """For argparse: a number of this kind, from low on."""
    def number(text):
        if not kind(text) >= low:  # NaN too
            raise argparse.ArgumentTypeError(f"{text} is not at least {low}")
        return kind(text)
    return number


def picture(text):
    """For argparse: the name of a picture."""
    if not text.endswith((".png", ".pdf", ".svg")):
        raise argparse.ArgumentTypeError(f"{text} must end in .png, .pdf or .svg")
    return text


def run_parser(description):
    """An argparse parser with the flags of every program that works on runs."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    parser.error = knobs.usage_error
    parser.add_argument("runs", nargs="+", help="run folders (their best.pt) or .pt files")
    parser.add_argument("--device", default="auto", help="auto takes a GPU if there is one")
    return parser


def main():
    parser = run_parser(__doc__)
    add, add_one_of = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--data", help="prepared data to measure on (default: the run's own)")
    add("--batch_size", type=at_least(1, int), default=8, help="windows at a time")
    add("--over_seeds", action="store_true", help="one row for runs that differ only in the seed")
    add("--plot", metavar="FILE", type=picture, help="save a plot of loss curves and unit use")
    add_one_of("--json", action="store_true", help="print JSON and nothing else")
    add_one_of("--csv", action="store_true", help="print CSV and nothing else")
    add_one_of("--sample", metavar="PROMPT", help="continue this text with each stream")
    add("--max_new_tokens", type=at_least(1, int), default=200)
    add("--temperature", type=at_least(0, float), default=0.8, help="0 takes the likeliest token")
    add("--top_k", type=at_least(1, int), help="sample from the k likeliest tokens only")
    add("--seed", type=at_least(0, int), default=1337, help="of the samples")
    args = parser.parse_args()
    device = knobs.pick_device(args.device)
    runs = [open_run(path) for path in run_paths(args.runs)]
    texts = [find_data(run, args.data) for run in runs]  # (folder, meta) each
    if args.over_seeds:
        refuse_repeats([describe_run(run, *text) for run, text in zip(runs, texts)])
    rows = [evaluate_run(run, *text, args.batch_size, device) for run, text in zip(runs, texts)]

    import pandas as pd  # here: it takes 0.7 s

    frame = over_seeds(pd.DataFrame(rows)) if args.over_seeds else pd.DataFrame(rows)
    frame["differs"] = differences(frame)
    if args.json:
        print(to_json(frame))
    elif args.csv:
        print(frame.drop(columns=["attn_rate", "mlp_rate"], errors="ignore").to_csv(index=False))
    else:
        print(to_text(frame))
        if args.over_seeds:
            print("± is the sample standard deviation over the seeds of a row")
    for run in runs if args.sample is not None else ():
        print_samples(run, args)
    if args.plot:
        draw_runs(args.plot, rows)


if __name__ == "__main__":
    knobs.cli(main)
