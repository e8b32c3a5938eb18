"""Our models as folders that Hugging Face's transformers load, and theirs as ours.

    python model/hf_bridge.py export runs/NAME --out FOLDER    # or RUN@STEP; AutoModelForCausalLM loads FOLDER
    python model/hf_bridge.py import FOLDER                    # looks through it, and says what it is
    python model/generate.py FOLDER --prompt "The "
    python train/main.py finetune --from-checkpoint FOLDER --data.dir data/mine

Needs safetensors (pip install -e '.[hf]'). Exporting GPT-2 small takes 11 CPU seconds, start-up included, and 1.2 GB,
from a checkpoint of any layout; neither a GPU nor torchrun is needed. Nothing has to be converted to be used here:
whatever reads a trained model (model/checkpoint.py) reads a Hugging Face folder of GPT-2's too, 124M to 1.5B.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from common.errors import InputError, first_line, one_line_errors, reading_from
from common.files import fsync_directory, write_atomically, write_json_atomically
from data_prep.pipeline.partial_dir import put_in_place, unfinished_directory
from data_prep.tokenizer import Tokenizer
from model.base import HEAD
from model.checkpoint import TrainedModel, load_model
from model.config import ModelConfig
from model.hf.folder import CONFIG_FILE, WEIGHTS_FILE, is_hugging_face, open_folder
from model.hf.format import to_hugging_face, to_json
from model.hf.model_card import model_card
from model.hf.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, tokenizer_config, tokenizer_json

GENERATION_FILE = "generation_config.json"
CARD_FILE = "README.md"


@dataclass(frozen=True)
class Export:
    """Write a trained model as a folder that Hugging Face's transformers load."""

    path: Annotated[str, tyro.conf.Positional]
    """RUN directory, RUN@STEP, or the path of one checkpoint."""
    out: Path
    """The folder to make. It appears whole or not at all, and replaces nothing."""
    tokenizer: bool = True
    """Write its tokenizer, too; without it the folder is for transformers alone."""


@dataclass(frozen=True)
class Import:
    """Look through a folder of Hugging Face's GPT-2 as loading it would, and say what it is. Nothing is written."""

    folder: Annotated[Path, tyro.conf.Positional]
    """config.json, weights (safetensors or .bin, whole or in parts) and tokenizer of a GPT-2."""


def export(options: Export) -> None:
    """InputError, with nothing written, for what GPT2LMHeadModel cannot be and where --out is taken."""
    refuse_existing(options.out)
    if is_hugging_face(Path(options.path)):
        raise InputError(f"{options.path}: is a Hugging Face folder already; export takes a run or a checkpoint")
    trained = load_model(options.path)
    write_folder(trained, options.out, with_tokenizer=options.tokenizer)
    print(f"{options.out}: step {trained.step} of {trained.checkpoint.resolve().parents[1].name}")
    print("\n".join(described(trained.model.config, trained.tokenizer if options.tokenizer else None)))


def refuse_existing(out: Path) -> None:
    with reading_from(out):
        if out.exists():
            raise InputError(f"--out {out}: exists; choose another, or remove it")


def write_folder(trained: TrainedModel, out: Path, *, with_tokenizer: bool = True) -> None:
    """The whole folder under its final name, at once."""
    config = trained.model.config
    contents = {
        CONFIG_FILE: to_json(config),
        GENERATION_FILE: {"bos_token_id": config.eot_id, "eos_token_id": config.eot_id},
    }
    if with_tokenizer:
        try:
            contents[TOKENIZER_FILE] = tokenizer_json(trained.tokenizer)
        except InputError as error:
            raise InputError(f"its tokenizer has no tokenizer.json: {error}; --no-tokenizer leaves it out") from error
        contents[TOKENIZER_CONFIG_FILE] = tokenizer_config(trained.tokenizer, config.context_len)
    card = model_card(trained, out.resolve().name, described(config, trained.tokenizer))
    with unfinished_directory(out) as partial:
        refuse_existing(out)  # which another process may have made meanwhile
        for name, content in contents.items():
            write_json_atomically(partial / name, content)
        write_atomically(partial / CARD_FILE, card)
        _write_weights(trained, partial / WEIGHTS_FILE)
        shutil.copymode(partial / CARD_FILE, partial / WEIGHTS_FILE)  # safetensors makes it its owner's alone
        put_in_place(partial, out)


def _write_weights(trained: TrainedModel, path: Path) -> None:
    """model.safetensors as transformers writes it: a tied head is the embedding, and is there once."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise InputError("export needs safetensors: pip install -e '.[hf]'") from error
    tensors = to_hugging_face(trained.model.state_dict(), trained.model.config)
    if trained.model.is_tied:
        del tensors[HEAD]
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be written ({first_line(error)}); make room there, or mend that") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
    fsync_directory(path.parent)


def look_through(folder: Path) -> None:
    """Everything that loading reads, numbers too."""
    if not is_hugging_face(folder):
        raise InputError(f"{folder}: no folder with weights as Hugging Face names them; where is model.safetensors?")
    found = open_folder(folder)
    for name in found.tensors:
        found.parameter(name, found.config)
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values()})
    print(f"{folder}: GPT-2, {len(found.tensors)} tensors of {', '.join(types)} in {found.weights_file}")
    print("\n".join(described(found.config, found.tokenizer)))


def described(config: ModelConfig, tokenizer: Tokenizer | None) -> list[str]:
    """Shape and tokenizer, a line for each."""
    shape = (
        f"  shape      {config.num_layers} layers, {config.num_heads} heads, {config.width} wide, context "
        f"{config.context_len:,}, vocabulary {config.vocab_size:,}, MLP {config.resolved_mlp_width} ({config.mlp}), "
        f"{'tied' if config.tie else 'untied'} head"
    )
    if tokenizer is None:
        return [shape, "  tokenizer  none: only transformers can read this folder"]
    about = tokenizer.describe()
    return [shape, f"  tokenizer  {about.get('name', about['kind'])}, sha256 {about['sha256'][:16]}"]


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors("hf_bridge"):
        command = Annotated[Export, tyro.conf.subcommand("export")] | Annotated[Import, tyro.conf.subcommand("import")]
        options: Export | Import = tyro.cli(command, args=args, description=__doc__)
        if isinstance(options, Export):
            export(options)
        else:
            look_through(options.folder)


if __name__ == "__main__":
    main()
