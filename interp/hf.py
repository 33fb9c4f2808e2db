"""To and from Hugging Face folders, which transformers, TransformerLens and SAELens load.

    python -m interp.hf export out/local_k2 local_k2_hf    a folder for transformers
    python -m interp.hf import local_k2_hf imported/local_k2     such a folder as a run, with gates
    python -m interp.hf import EleutherAI/gpt-neo-125m out/neo --data data/openwebtext
                                                           any GPT-Neo, as a run without gates
    python -m interp.hf sae out/local_k2 local_k2_saes     the autoencoders of sae.pt, for SAELens

An exported folder holds the clean stream (model.safetensors, config.json, generation_config.json),
its tokenizer (tokenizer.json, tokenizer_config.json), and a model card (README.md). Import also
needs gates.safetensors and training.json, to make a run with exactly the same weights. The state of
the optimizer is not exported: an imported run can be evaluated, but not resumed.

The card shows what eval.py measures, unless you add --no_figures. The folder to write must not
exist yet. It appears only when it is complete.
"""

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pandas as pd

import config as knobs
from eval import COLUMNS, measure_run, open_run, text_table, with_data
from interp.activations import UNITS, Site
from interp.results import ROOT, digest, digests, result_path, write_json
from model import GPTNeo, load_torch, save_checkpoint
from prepare import EOT, PIECE, UserError, load_meta, load_tokenizer, require_tokenizer

# what TransformerLens calls the sites of interp/activations.py in block {}
HOOKS = {"mlp_out": "blocks.{}.hook_mlp_out", "attn_out": "blocks.{}.hook_attn_out",
         "resid": "blocks.{}.hook_resid_post", "mlp_act": "blocks.{}.mlp.hook_post",
         "attn_act": "blocks.{}.attn.hook_z"}


@contextmanager
def new_folder(path):
    """A folder to fill. It gets its name at the end; after an error it is removed."""
    if os.path.lexists(path):
        raise UserError(f"{path} is there already: choose another name, or delete it")
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        raise UserError(f"{path} was not written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def convert_tokenizer(encoding):
    """tiktoken.Encoding with GPT-2's pieces -> tokenizers.Tokenizer, the same tokens for any text.

    tiktoken merges the two neighbours that make the token of the lowest rank. tokenizers ranks
    pairs: here all pairs that make a token, in the order of the tokens' ranks. Both look up a
    whole piece before they merge (ignore_merges).
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    # GPT-2's spelling: printable bytes are their own letter, the others get those after U+00FF
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    order = sorted(range(256), key=lambda byte: chr(byte) not in alphabet)
    letters = dict(zip(order, sorted(alphabet)))  # {byte: letter}
    vocabulary = {}
    for rank in range(encoding.eot_token):
        token = encoding.decode_single_token_bytes(rank).decode("latin1").translate(letters)
        vocabulary[token] = rank
    pairs = [(token[:at], token[at:]) for token in vocabulary for at in range(1, len(token))]
    merges = [pair for pair in pairs if vocabulary.keys() >= set(pair)]
    vocabulary[EOT] = encoding.eot_token
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    # in this library $ also matches at the end of a line; \z only at the end of the text
    pieces = pre_tokenizers.Split(Regex(PIECE.replace("$", r"\z")), "isolated")
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, spelled])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOT, normalized=False)])
    return tokenizer


def write_tokenizer(folder, encoding, block_size):
    content = json.loads(convert_tokenizer(encoding).to_str())
    # texts, not pairs: transformers before 4.45 reads only texts
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
        "bos_token": EOT, "eos_token": EOT, "pad_token": EOT, "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # generation continues the end of a text
        # without token_type_ids, which transformers 4 makes and GPT-Neo adds to its embeddings
        "model_input_names": ["input_ids", "attention_mask"]})


def export_run(run, out, row=None):
    """Write an eval.Run as a Hugging Face folder. row: its figures, from eval.measure_run."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig, GPTNeoConfig, GPTNeoForCausalLM

    config, weights = run.model.config, run.model.state_dict()
    encoding = load_tokenizer(run.tokenizer)
    ends = {"bos_token_id": encoding.eot_token, "eos_token_id": encoding.eot_token}
    pattern = config.attention_layers.split(",")
    theirs = GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=config.vocab_size, max_position_embeddings=config.block_size,
        hidden_size=config.n_embd, num_layers=config.n_layer, num_heads=config.n_head,
        attention_types=[[pattern, config.n_layer // len(pattern)]],
        intermediate_size=4 * config.n_embd, window_size=config.window_size, **ends))
    theirs.load_state_dict(run.model.clean_state_dict())
    theirs.generation_config = GenerationConfig(
        **ends, pad_token_id=encoding.eot_token, do_sample=True, temperature=0.8,
        max_length=config.block_size)
    theirs.save_pretrained(out)
    write_tokenizer(out, encoding, config.block_size)
    gates = {name: weight for name, weight in weights.items() if "_gate." in name}
    if gates:
        save_file(gates, out / "gates.safetensors")
    write_json(out / "training.json", {
        "config": asdict(config), "train_config": run.knobs, "tokenizer": run.tokenizer,
        "data": run.checksum, "step": run.step, "digest": digest(weights)})
    model_card(run, row).save(out / "README.md")


def model_card(run, row):
    """The README.md of a folder, from the template assets/model_card.md."""
    from huggingface_hub import ModelCard, ModelCardData

    tables = {f"Trained on {run.knobs['data']} ({run.checksum})": knobs.decisive(run.knobs)}
    if row:
        title = f"On all validation tokens of {row['data']} ({row['checksum']})"
        figures = text_table(pd.DataFrame([row]), COLUMNS).drop(columns=["run", "data"])
        tables = {title: figures.iloc[0], **tables}
    about = ModelCardData(library_name="transformers", pipeline_tag="text-generation",
                          tags=["gpt_neo", "self-ablation", "interpretability"])
    return ModelCard.from_template(
        about, str(ROOT / "assets" / "model_card.md"), name=Path(run.path).absolute().name,
        model=run.model.config, tokenizer=run.tokenizer["name"], step=run.step, tables=tables)


def import_run(name, out, data=None):
    """Write a Hugging Face folder, or a model from the hub, as a run. With data, prepared with its
    tokenizer, any GPT-Neo can be imported, without gates."""
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    model = GPTNeo.from_pretrained(name)
    if data:
        require_tokenizer(name, model.config.vocab_size, data)
        meta, config = load_meta(data), knobs.Config(**asdict(model.config) | {"data": data})
        training = {"train_config": asdict(config), "step": 0, "tokenizer": meta["tokenizer"],
                    "data": meta["checksum"]}
    else:
        try:
            path = cached_file(name, "training.json")
        except OSError:
            raise UserError(f"{name} has no training.json, so it is not an exported run: give data "
                            f"with its tokenizer, --data") from None
        try:
            training = json.loads(Path(path).read_text())
            config, weights = training.pop("config"), model.state_dict()
            if config["ablation"] != "none":
                weights |= load_file(cached_file(name, "gates.safetensors"))
            model = GPTNeo.from_checkpoint({"config": config, "model": weights})
            if not training.pop("digest").startswith(digest(model.state_dict())):
                raise ValueError("the weights have changed since they were exported")
        except Exception as error:  # a missing or damaged file raises almost any
            reason = " ".join(str(error).split())
            raise UserError(f"cannot read training.json and gates of {name} ({reason}): import it "
                            f"without gates, with data of its tokenizer, --data") from None
    save_checkpoint(out / "best.pt", model.config, model.state_dict(), **training)


# ------------------------------------------------------ autoencoders, of d inputs and F features


def read_saes(run):
    """The content of sae.pt, which interp/sae.py wrote beside a run. Raises UserError."""
    path = result_path(run.path, "sae.pt")
    if not path.exists():
        raise UserError(f"there is no {path}: run python -m interp.sae {run.path} first")
    found = load_torch(path)
    if found["checkpoint"] != digests(run.model.state_dict())["checkpoint"]:
        raise UserError(f"{path} was made with other weights: make it again with --force")
    for row in found["saes"]:
        d, weights = Site(run.model, row["layer"], row["site"]).d, row["weights"]
        finite = all(weight.isfinite().all() for weight in weights.values())
        if not finite or len(weights["W_enc"]) != d or "l1" not in row:
            raise UserError(f"{path} is damaged, or of another version: make it again with --force")
    return found


def saelens_sae(row, center, context):
    """A row of sae.pt -> its name, its cfg.json and its weights in SAELens.

    center: our autoencoder reads x minus its mean over channels. In SAELens this becomes a part of
    the encoder: ReLU((x - mean x) W_enc + b_enc) = ReLU(x (W_enc - its mean over d) + b_enc). So
    features are the same whether TransformerLens has centred the model's weights or not.
    """
    weights, site = dict(row["weights"]), row["site"]
    if center and site not in UNITS:
        weights["W_enc"] = weights["W_enc"] - weights["W_enc"].mean(0)  # (d, F)
    d, F = weights["W_enc"].shape
    hook = HOOKS[site].format(row["layer"])
    l1 = str(row["l1"]).removesuffix(".0")
    place = {"sae_lens_version": "6.0.0",  # of the format
             "hook_name": hook, "hook_head_index": None, "model_class_name": "HookedTransformer",
             "context_size": context, "prepend_bos": False}
    config = {
        "architecture": "standard", "d_in": d, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none",
        "reshape_activations": "hook_z" if site == "attn_act" else "none", "metadata": place}
    return f"{hook}_l1_{l1}_seed{row['seed']}", config, weights


def export_saes(run, out):
    """Write every autoencoder of a run as a folder that SAELens loads."""
    from safetensors.torch import save_file

    found = read_saes(run)
    for row in found["saes"]:
        name, config, weights = saelens_sae(
            row, found["settings"]["center"], run.model.config.block_size)
        (out / name).mkdir()
        write_json(out / name / "cfg.json", config)
        save_file(weights, out / name / "sae_weights.safetensors")


def main():
    parser = knobs.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export, load, sae = map(commands.add_parser, ("export", "import", "sae"))
    for command in (export, sae):
        command.add_argument("source", metavar="RUN", help="a run folder, or a .pt file")
    load.add_argument("source", metavar="FOLDER", help="a folder, or a name on the hub")
    for command in (export, load, sae):
        command.add_argument("out", metavar="NEW", type=Path, help="the folder to write")
    figures = export.add_mutually_exclusive_group()
    figures.add_argument("--data", help="measure the card's figures on it (default: the run's own)")
    figures.add_argument("--no_figures", action="store_true", help="a card without figures")
    load.add_argument("--data", help="import any GPT-Neo that has the tokenizer of these data")
    args = parser.parse_args()
    with new_folder(args.out) as folder:
        if args.command == "export":
            run, row = open_run(args.source), None
            if not args.no_figures:
                row = measure_run(with_data(run, args.data), 8, knobs.pick_device())
            export_run(run, folder, row)
        elif args.command == "import":
            import_run(args.source, folder, args.data)
        else:
            export_saes(open_run(args.source), folder)
    print(*sorted(args.out.iterdir()), sep="\n")


if __name__ == "__main__":
    knobs.cli(main)
