"""To and from Hugging Face, and so to TransformerLens and SAELens, with no code of ours over there.

    python interp/hf.py export out/local_k2 local_k2_hf    a folder that transformers loads
    python interp/hf.py import local_k2_hf out/again       such a folder as a run, with its gates
    python interp/hf.py import gpt-neo-125m out/neo --data data/openwebtext
                                                           any GPT-Neo, which has no gates
    python interp/hf.py sae out/local_k2 local_k2_saes     the autoencoders of sae.pt, for SAELens

An exported folder has model.safetensors, the clean stream; config.json; generation_config.json;
tokenizer.json and tokenizer_config.json; README.md, the model card; gates.safetensors, the weights
of the gates; and training.json, what import needs beside them. Import gives back the same bits;
the optimizer is not among them, so such a run can be evaluated, but not continued.

A folder to write must not be there yet, and is there only when it is whole.

Shape letters: d inputs and F features of an autoencoder.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python puts interp/ there
import config as knobs
from eval import COLUMNS, cell, evaluate_run, find_data, open_run, trained_with
from interp.common import check_range
from interp.results import fingerprint, fits, result_path, write_json, write_text
from model import GPTNeo, GPTNeoConfig, load_torch, replace_file, save_checkpoint
from prepare import EOT, PIECE, UserError, load_meta, load_tokenizer

try:
    import safetensors.torch
except ImportError:  # train.py does without it
    safetensors = None

# what beside the weights makes a run of a folder: training.json
TRAINING = {"config": dict, "train_config": dict, "tokenizer": dict, "data": str, "step": int,
            "digest": str}


# --------------------------------------------------------------------------- files and folders


def one_line(error):
    """An exception's reason. Without a path, where the system gives one: our messages name it."""
    reason = getattr(error, "strerror", None) or str(error)
    return " ".join(reason.split())[:300] or type(error).__name__


@contextmanager
def new_folder(path):
    """A folder to fill, which gets its name when it is whole; else nothing is left of it.

    Raises UserError when that name is taken or the folder cannot be made.
    """
    refuse_existing(path)
    temporary = Path(f"{os.path.abspath(path)}.{os.getpid()}.tmp")
    try:
        try:
            temporary.mkdir(parents=True)
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
            raise UserError(f"cannot write {path}: {one_line(error)}") from None
        yield temporary
        refuse_existing(path)  # another program may have been faster
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(path):
    if not str(path):
        raise UserError("the name of the folder to write is empty: give one, such as local_k2_hf")
    if os.path.lexists(path):
        raise UserError(f"{path} is there already: choose another name, or delete it")


def read_json(path):
    """A JSON file that holds an object, as a dict. Raises UserError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def write_tensors(path, tensors):
    """{name: tensor} as a safetensors file, atomically."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replace_file(path) as file:
        file.write(safetensors.torch.save(whole, {"format": "pt"}))


def digest(tensors):
    """64 hex digits that name {name: tensor}, to the last bit."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def read_tensors(path):
    """{name: tensor} of a safetensors file, or of one of torch.save. Raises UserError."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # absent, damaged, of another kind: as many exceptions
        kind = type(error).__name__
        raise UserError(f"cannot read {path}: {kind}: {one_line(error)[:150]}") from None


# -------------------------------------------------------------------------------- the tokenizer


def byte_letters():
    """{byte: the letter that stands for it in tokenizer files}, as GPT-2 has it: printable bytes
    for themselves, the others, in their order, for the letters from U+0100 on."""
    letters = {}
    for low, high in (("!", "~"), ("¡", "¬"), ("®", "ÿ")):
        for byte in range(ord(low), ord(high) + 1):
            letters[byte] = chr(byte)
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - 188))  # 188 are printable
    return letters


def last_merge(token, ranks):
    """The two tokens that merging makes this one of, or None where merging does not make it.

    token: two bytes or more. ranks: {token: rank}; of all neighbours that together are a token,
    those of the lowest rank merge, of equal ones the first.
    """
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        pairs = [parts[at] + parts[at + 1] for at in range(len(parts) - 1)]
        known = [at for at, pair in enumerate(pairs) if pair in ranks]
        if not known:
            return None
        first = min(known, key=lambda at: ranks[pairs[at]])
        parts[first : first + 2] = [pairs[first]]
    return parts


def tokenizer_json(encoding):
    """tokenizer.json of a tiktoken.Encoding with GPT-2's pieces: the same tokens for any text.

    tiktoken merges whatever two neighbours make the token of the lowest rank; Hugging Face knows
    pairs, each with a rank of its own. Yet the two are equal. What is merged inside of a token's
    bytes does not depend on what is around, so a token is always made of the same two: one pair for
    each token, in the order of ranks, says it all. Both look a whole piece up before they merge
    ("ignore_merges"), so a token that merging cannot make is found only as a whole piece.
    """
    letters = byte_letters()

    def spell(token):
        return "".join(letters[byte] for byte in token)

    tokens = [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    merges = []
    for token in tokens:
        parts = last_merge(token, ranks) if len(token) > 1 else None
        if parts:
            merges.append([spell(part) for part in parts])
    # $ is the end of a line there, and only \z that of the text
    pieces = {"type": "Split", "pattern": {"Regex": PIECE.replace("$", r"\z")},
              "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}
    end = {"id": encoding.eot_token, "content": EOT, "single_word": False, "lstrip": False,
           "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pieces, byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {**vocabulary, EOT: encoding.eot_token}, "merges": merges}}


def check_vocabulary(folder, data):
    """Raises UserError where a Hugging Face folder's model has other tokens than prepared data.

    Where the folder has no tokenizer that says which, their number must be the same.
    """
    folder, meta = Path(folder), load_meta(data)
    size = read_hf_config(folder)["vocab_size"]
    known = None
    if (folder / "tokenizer.json").exists():
        model = read_json(folder / "tokenizer.json").get("model")
        known = model.get("vocab") if isinstance(model, dict) else None
    elif (folder / "vocab.json").exists():
        known = read_json(folder / "vocab.json")
    same = size == meta["vocab_size"]
    if same and isinstance(known, dict):
        ours = tokenizer_json(load_tokenizer(meta["tokenizer"]))["model"]["vocab"]
        del ours[EOT]  # where that is, differs between versions of a file
        same = all(known.get(token) == rank for token, rank in ours.items())
    if not same:
        raise UserError(f"{folder} has a vocabulary of {size:,} tokens and {data} one of "
                        f"{meta['vocab_size']:,}, which is another: give data that are made with "
                        f"its tokens")


# -------------------------------------------------------------------------------------- reading


def need_safetensors():
    if safetensors is None:
        raise UserError("this needs the package safetensors: "
                        "pip install -r requirements-interp.txt")


def find_folder(name):
    """A local folder, or else the files of that name on the Hugging Face hub. Raises UserError."""
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    for weights in ("*.safetensors", "*.bin"):
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=["*.json", weights]))
        except Exception as error:  # no network, no such name, no rights: one advice
            raise UserError(f"there is no folder {name}, and the Hugging Face hub does not give "
                            f"it either ({type(error).__name__})") from None
        if any(folder.glob(weights)):
            break
    return folder


def read_hf_config(folder):
    """Fields of a GPTNeoConfig, a dict, from a folder's config.json. Raises UserError.

    Where config.json is silent, GPT-Neo's own defaults hold, those of its 1.3B.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is no folder of Hugging Face's, which has a config.json, and no "
                        f"run to begin with, which has a best.pt")
    found = {"vocab_size": 50257, "max_position_embeddings": 2048, "hidden_size": 2048,
             "num_layers": 24, "num_heads": 16, "window_size": 256,
             "attention_types": [[["global", "local"], 12]], "intermediate_size": None,
             "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, **read_json(path)}
    if found.get("model_type") != "gpt_neo":
        raise UserError(f"{path} describes a model of type {found.get('model_type')!r}: "
                        f"only gpt_neo is one of ours")
    C = found["hidden_size"]
    ours = {"intermediate_size": (None, 4 * C), "layer_norm_epsilon": (1e-5,),
            "activation_function": ("gelu_new", "gelu_pytorch_tanh")}
    for name, values in ours.items():
        if found[name] not in values:
            raise UserError(f"{path} has {name}={found[name]!r}: a model of ours has {values[-1]}")
    try:
        layers = []
        for pattern, times in found["attention_types"]:
            layers += pattern * times
        length = shortest_pattern(layers)
        config = {"vocab_size": found["vocab_size"], "block_size": found["max_position_embeddings"],
                  "n_layer": found["num_layers"], "n_head": found["num_heads"], "n_embd": C,
                  "attention_layers": ",".join(layers[:length]),
                  "window_size": found["window_size"]}
        knobs.Config(**config, ablation="none")
    except (TypeError, ValueError) as error:  # ModelError is one
        raise UserError(f"{path} describes no model of ours: {one_line(error)}") from None
    if len(layers) != config["n_layer"]:
        raise UserError(f"{path} is damaged: it names the attention of {len(layers)} layers "
                        f"out of {config['n_layer']}")
    return config


def shortest_pattern(layers):
    """How many entries of a list it takes to make the whole list by repeating them."""
    for length in range(1, len(layers)):
        times, rest = divmod(len(layers), length)
        if not rest and layers == layers[:length] * times:
            return length
    return len(layers)


def read_hf(folder):
    """A Hugging Face GPT-Neo -> the geometry, a dict of GPTNeoConfig's fields, and the weights.

    The weights, fp32, are named as GPTNeo.clean_state_dict names them. folder: as save_pretrained
    writes it, in one file or several, safetensors or torch's; needs no transformers. Raises
    UserError where it is something else.
    """
    need_safetensors()
    folder, config = Path(folder), read_hf_config(folder)
    found = {}
    for name in weight_files(folder):
        found |= read_tensors(folder / name)
    weights = {}
    whole = any(name.startswith("transformer.") for name in found)
    for name, value in found.items():
        if name.endswith((".attention.bias", ".attention.masked_bias")):
            continue  # earlier versions saved the causal mask too
        if not whole and name != "lm_head.weight":  # of a GPTNeoModel, without its head
            name = f"transformer.{name}"
        weights[name] = value.float()
    with torch.device("meta"):
        model = GPTNeo(GPTNeoConfig(**config, ablation="none"))
    embeddings = weights.get("transformer.wte.weight")
    weights.setdefault("lm_head.weight", embeddings)  # tied, and then often saved once
    expected = {name: value.shape for name, value in model.state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        shape = getattr(weights.get(name), "shape", None)
        if shape != expected.get(name):
            raise UserError(f"{folder}: its weights are not those of its config.json: {name} is "
                            f"{shape_text(shape)}, not {shape_text(expected.get(name))}")
    if not torch.equal(weights["lm_head.weight"], embeddings):
        raise UserError(f"{folder} has an lm_head of its own: a model of ours has that of its "
                        f"token embeddings")
    return config, weights


def shape_text(shape):
    return "absent" if shape is None else " x ".join(map(str, shape))


def weight_files(folder):
    """The names of the files that hold a folder's weights. Raises UserError."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict):
                raise UserError(f"{index} is damaged: it has no 'weight_map'")
            return sorted(set(map(str, names.values())))
        if (folder / name).exists():
            return [name]
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin: "
                    f"give a folder that save_pretrained wrote")


def import_run(folder, out, data=None):
    """Writes a Hugging Face folder as a run folder. -> the config of its model

    data: prepared data in the vocabulary of a GPT-Neo that is not an exported run of ours.
    Raises UserError and ModelError.
    """
    refuse_existing(out)
    geometry, weights = read_hf(folder)
    if (folder / "training.json").exists():
        if data is not None:
            raise UserError(f"--data has no effect here: {folder} says itself what it was "
                            f"trained on")
        told = read_training(folder)
        weights |= read_gates(folder, told)
    else:
        told = training_of(folder, geometry, data, out)
    content = {"config": told.pop("config"), "model": weights}
    model = GPTNeo.from_checkpoint(content)
    if told.pop("digest", None) not in (None, digest(model.state_dict())):
        raise UserError(f"the weights in {folder} have changed since they were exported: without "
                        f"training.json they can be imported as any GPT-Neo's, without gates")
    with new_folder(out) as unfinished:
        save_checkpoint(unfinished / "best.pt", model.config, model.state_dict(), **told)
    return model.config


def read_training(folder):
    """training.json of an exported run. Raises UserError where it is not as `export` writes it."""
    told = read_json(folder / "training.json")
    if not fits(told, TRAINING):
        raise UserError(f"{folder / 'training.json'} is damaged, or of another version")
    return {name: told[name] for name in TRAINING}


def read_gates(folder, told):
    """{name: tensor} of an exported run's gates. Raises UserError."""
    if told["config"].get("ablation") == "none":
        return {}
    return read_tensors(folder / "gates.safetensors")


def training_of(folder, geometry, data, out):
    """What training.json would hold of a GPT-Neo that was trained elsewhere. Raises UserError."""
    if data is None:
        raise UserError(f"{folder} is no exported run: say with --data which prepared data are "
                        f"in its vocabulary")
    check_vocabulary(folder, data)
    meta = load_meta(data)
    config = knobs.Config(**geometry, ablation="none", data=str(data), out=str(out))
    return {"config": asdict(config.model), "train_config": asdict(config), "step": 0,
            "tokenizer": meta["tokenizer"], "data": meta["checksum"]}


# -------------------------------------------------------------------------------------- writing


def hf_config(config):
    """Keyword arguments of the transformers.GPTNeoConfig that describes the clean stream."""
    pattern = config.attention_layers.split(",")
    dropouts = ("embed_dropout", "attention_dropout", "resid_dropout")
    return dict(vocab_size=config.vocab_size, max_position_embeddings=config.block_size,
                hidden_size=config.n_embd, num_layers=config.n_layer, num_heads=config.n_head,
                attention_types=[[pattern, config.n_layer // len(pattern)]],
                window_size=config.window_size, **dict.fromkeys(dropouts, 0.0))


def export_run(run, out, row=None):
    """Writes an eval.Run as a Hugging Face folder. row: its figures for the card, eval.py's.

    Raises UserError and ModelError.
    """
    need_safetensors()
    encoding, model = load_tokenizer(run.tokenizer), run.model
    C, eot = model.config.n_embd, encoding.eot_token
    clean = model.clean_state_dict()
    gates = {name: value for name, value in model.state_dict().items() if name not in clean}
    del clean["lm_head.weight"]  # tied: it is the token embedding
    ends = {"bos_token_id": eot, "eos_token_id": eot}
    config = {
        "architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo", **hf_config(model.config),
        "intermediate_size": 4 * C, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True, "dtype": "float32", **ends}
    # past its positions the model cannot write: a story ends there at the latest
    generation = {**ends, "pad_token_id": eot, "do_sample": True, "temperature": 0.8,
                  "max_length": model.config.block_size}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT,
                 "model_max_length": model.config.block_size, "add_prefix_space": False,
                 "clean_up_tokenization_spaces": False}
    training = {"config": asdict(model.config), "train_config": run.train_config,
                "tokenizer": run.tokenizer, "data": run.data_checksum, "step": run.step,
                "digest": digest(model.state_dict())}
    with new_folder(out) as folder:
        write_tensors(folder / "model.safetensors", clean)
        if gates:
            write_tensors(folder / "gates.safetensors", gates)
        write_json(folder / "training.json", training)
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", generation)
        write_json(folder / "tokenizer_config.json", tokenizer)
        write_json(folder / "tokenizer.json", tokenizer_json(encoding))
        write_text(folder / "README.md", model_card(run, row))


def model_card(run, row):
    """README.md: what it is, how to load it, its figures and what it was trained with."""
    config, trained = run.model.config, trained_with(run)
    name, gated = Path(os.path.abspath(run.path)).name, config.ablation != "none"
    what = "A plain GPT-Neo"
    if gated:
        what = (f"A GPT-Neo trained with self-ablation ({config.ablation} gates, k_attn = "
                f"{config.k_attn}, k_mlp = {config.k_mlp}; *Self-Ablating Transformers: More "
                f"Interpretability, Less Sparsity*)")
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation",
        "tags: [gpt_neo, self-ablation, interpretability]", "---", "", f"# {name}", "",
        f"{what}, after {run.step:,} updates: {config.n_layer} layers, {config.n_head} heads, "
        f"width {config.n_embd}, a context of {config.block_size} tokens, a vocabulary of "
        f"{config.vocab_size:,} ({run.tokenizer['name']}).", "",
        "```python", "from transformers import pipeline", "",
        'print(pipeline("text-generation", "THIS_FOLDER")("Once upon a time"))', "```", "",
        f"`{EOT}` in a text is the token that ends it; with `split_special_tokens=True` the "
        "tokenizer takes it for ordinary text, as in the training data.", ""]
    if gated:
        lines += ["`model.safetensors` is the clean stream, which inference uses. The gates are in "
                  "`gates.safetensors`, for the code that trained them.", ""]
    if row:
        lines += ["## Figures", "", f"On all {row['tokens']:,} validation tokens of "
                  f"`{row['data']}` (checksum {row['checksum']}).", "", "| | |", "|---|---|"]
        for name, form in COLUMNS.items():
            if name in row and name not in ("run", "data"):
                lines.append(f"| {name} | {cell(row, name, form)} |")
        lines += [""]
    lines += ["## Training", "", f"On `{trained['data']}` (checksum {run.data_checksum}).", "",
              "| | |", "|---|---|"]
    lines += [f"| {knob} | {value} |" for knob, value in knobs.decisive(trained).items()]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------- autoencoders

# what TransformerLens calls the sites of interp/activations.py in block {}
HOOKS = {"mlp_out": "blocks.{}.hook_mlp_out", "attn_out": "blocks.{}.hook_attn_out",
         "resid": "blocks.{}.hook_resid_post", "mlp_act": "blocks.{}.mlp.hook_post",
         "attn_act": "blocks.{}.attn.hook_z"}
SAES = {"checkpoint": str, "settings": {"activation": str, "center": bool},
        "saes": [{"layer": int, "site": str, "seed": int, "weights": dict}]}


def read_saes(run):
    """What interp/sae.py wrote beside a run: see SAES. Raises UserError and ModelError."""
    path = result_path(run.path, "sae.pt")
    if not path.is_file():
        raise UserError(f"no {path}: make it with python interp/sae.py {run.path}")
    found = load_torch(path)
    if not fits(found, SAES):
        raise UserError(f"{path} is damaged, or of another version of interp/sae.py")
    if found["checkpoint"] != fingerprint(run.model):
        raise UserError(f"{path} was made with weights that this run no longer has: "
                        f"make it again with --force")
    return found


def saelens_sae(row, settings, context):
    """A row of sae.pt -> what SAELens calls it, its cfg.json and its weights.

    Ours see x minus its mean over channels where settings say so. Here that is part of the
    encoder: f = ReLU((x - mean x) W_enc + b_enc) = ReLU(x (W_enc - its mean over d) + b_enc), so
    that the features are the same on a model whose weights TransformerLens has centred and on one
    where it has not.
    """
    weights = dict(row["weights"])
    if settings["center"] and row["site"] not in ("mlp_act", "attn_act"):
        weights["W_enc"] = weights["W_enc"] - weights["W_enc"].mean(0)  # (d, F)
    d, F = weights["W_enc"].shape
    hook = HOOKS[row["site"]].format(row["layer"])
    place = {"sae_lens_version": "6.0.0",  # of the format
             "hook_name": hook, "hook_head_index": None, "model_class_name": "HookedTransformer",
             "context_size": context, "prepend_bos": False}
    form = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu"}[settings["activation"]]
    config = {
        "architecture": form, "d_in": d, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none",
        "reshape_activations": "hook_z" if row["site"] == "attn_act" else "none",
        "metadata": place}
    value = "k" if "k" in row else "l1"
    if form == "topk":
        config |= {"k": row["k"], "rescale_acts_by_decoder_norm": False}
    if form == "jumprelu":  # theirs keeps what is above it, ours also what is equal
        below = weights["threshold"].nextafter(torch.tensor(-torch.inf))
        weights["threshold"] = below.expand(F)
    return f"{hook}_{value}_{row[value]:g}_seed{row['seed']}", config, weights


def export_saes(run, out):
    """Writes the autoencoders of a run, each as a folder that SAELens loads. -> their names"""
    need_safetensors()
    found = read_saes(run)
    saes = [saelens_sae(row, found["settings"], run.model.config.block_size)
            for row in found["saes"]]
    with new_folder(out) as folder:
        for name, config, weights in saes:
            (folder / name).mkdir()
            write_json(folder / name / "cfg.json", config)
            write_tensors(folder / name / "sae_weights.safetensors", weights)
    return [name for name, _, _ in saes]


# ------------------------------------------------------------------------------------- command line

FLAGS = {"export": ("data", "batch_size", "device", "no_figures"), "import": ("data",), "sae": ()}


def parse_arguments():
    """The command line. Raises UserError on what cannot work."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    add = parser.add_argument
    add("what", choices=FLAGS)
    add("source", help="a run folder (its best.pt) or a .pt file; import: a Hugging Face folder, "
                       "or the name of a model on the hub")
    add("out", help="the folder to write")
    add("--data", help="export: measure the card's figures on it (default: the run's own); "
                       "import: what a GPT-Neo from elsewhere has the vocabulary of")
    add("--no_figures", action="store_true", help="a model card without evaluation")
    add("--batch_size", type=int, default=8, help="windows at a time, for the figures (8)")
    add("--device", default="auto", help="where to measure them: auto takes a GPU if there is one")
    args = parser.parse_args()
    for flag in FLAGS["export"]:
        given = getattr(args, flag) != parser.get_default(flag)
        if given and flag not in FLAGS[args.what]:
            raise UserError(f"--{flag} has no effect on {args.what}: drop it")
    check_range(args, "batch_size", 1)
    return args


def measure(run, args):
    """The card's figures: the row of eval.py."""
    device = knobs.pick_device(args.device)
    try:
        folder, meta = find_data(run, args.data)
        row = evaluate_run(run, folder, meta, args.batch_size, device)
    except UserError as error:
        raise UserError(f"{error}; or leave figures out with --no_figures") from None
    run.model.cpu()
    return row


def main():
    args = parse_arguments()
    refuse_existing(args.out)
    if args.what == "import":
        config = import_run(find_folder(args.source), args.out, args.data)
        print(f"{args.out}: {config.n_layer} layers, ablation={config.ablation}")
        return
    run = open_run(args.source)
    if args.what == "sae":
        print(*[f"{args.out}/{name}" for name in export_saes(run, args.out)], sep="\n")
        return
    export_run(run, args.out, None if args.no_figures else measure(run, args))
    print(f"{args.out}: transformers.AutoModelForCausalLM.from_pretrained({args.out!r}) loads it")


if __name__ == "__main__":
    knobs.cli(main)
