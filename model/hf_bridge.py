"""Export a run as a folder that Hugging Face's transformers load, and check a folder of theirs.

    python model/hf_bridge.py export runs/NAME --out FOLDER    # or RUN@STEP; AutoModelForCausalLM loads FOLDER
    python model/hf_bridge.py import FOLDER                    # checks all of it and prints what it is
    python model/generate.py FOLDER --prompt "The "
    python train/main.py finetune --from-checkpoint FOLDER --data.dir data/mine

The command needs safetensors (pip install -e '.[hf]'), but neither a GPU nor torchrun. Exporting GPT-2 small from a
checkpoint of any layout takes 11 CPU seconds, start-up included, and 1.2 GB of memory. A folder needs no conversion to
be used here: every command that reads a trained model (model/checkpoint.py) also reads a Hugging Face folder of GPT-2,
124M to 1.5B.
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
from common.reading import require_place
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
    """A run directory, RUN@STEP, or the path of one checkpoint."""
    out: Path
    """The folder to make. It appears complete or not at all, and an existing folder is never replaced."""
    tokenizer: bool = True
    """Write the tokenizer too. Without it only transformers can load the folder."""


@dataclass(frozen=True)
class Import:
    """Check a Hugging Face folder of GPT-2 as loading would, and print what it is. Nothing is written."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A folder with the config.json, weights (safetensors or .bin, in one file or several) and tokenizer of a GPT-2."""


def export(options: Export) -> None:
    """Write a run's model as a Hugging Face folder, and print what it is.

    Raise InputError, with nothing written, if GPT2LMHeadModel cannot be this model or if --out exists.
    """
    refuse_existing(options.out)
    if is_hugging_face(Path(options.path)):
        raise InputError(f"{options.path}: is a Hugging Face folder already; export takes a run or a checkpoint")
    trained = load_model(options.path)
    write_folder(trained, options.out, with_tokenizer=options.tokenizer)
    mean = ", the mean of its weights" if trained.is_averaged else ""
    print(f"{options.out}: step {trained.step} of {trained.checkpoint.resolve().parents[1].name}{mean}")
    print("\n".join(description(trained.model.config, trained.tokenizer if options.tokenizer else None)))


def refuse_existing(out: Path) -> None:
    """Raise InputError if `out` exists or cannot be made."""
    with reading_from(out):
        if out.exists():
            raise InputError(f"--out {out}: exists; choose another, or remove it")
    require_place(out.parent)


def write_folder(trained: TrainedModel, out: Path, *, with_tokenizer: bool = True) -> None:
    """Write the complete folder and rename it to `out` as the last action."""
    config = trained.model.config
    contents = {
        CONFIG_FILE: to_json(config),
        GENERATION_FILE: {"bos_token_id": config.eot_id, "eos_token_id": config.eot_id},
    }
    if with_tokenizer:
        try:
            contents[TOKENIZER_FILE] = tokenizer_json(trained.tokenizer)
        except InputError as error:
            raise InputError(f"the tokenizer has no tokenizer.json: {error}; --no-tokenizer leaves it out") from error
        contents[TOKENIZER_CONFIG_FILE] = tokenizer_config(trained.tokenizer, config.context_len)
    card = model_card(trained, out.resolve().name, description(config, trained.tokenizer))
    with unfinished_directory(out) as partial:
        refuse_existing(out)  # Another process may have made it meanwhile.
        for name, content in contents.items():
            write_json_atomically(partial / name, content)
        write_atomically(partial / CARD_FILE, card)
        _write_weights(trained, partial / WEIGHTS_FILE)
        shutil.copymode(partial / CARD_FILE, partial / WEIGHTS_FILE)  # safetensors lets only the owner read it.
        put_in_place(partial, out)


def _write_weights(trained: TrainedModel, path: Path) -> None:
    """Write model.safetensors as transformers does: a tied head is stored once, as the embedding."""
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
        raise InputError(f"{path}: cannot be written ({first_line(error)}); is there room on the disk?") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
    fsync_directory(path.parent)


def check_folder(folder: Path) -> None:
    """Read everything that loading reads, the weights too, and print what the folder holds."""
    if not is_hugging_face(folder):
        raise InputError(f"{folder}: not a folder with weights under Hugging Face's names; where is model.safetensors?")
    content = open_folder(folder)
    for name in content.tensors:
        content.parameter(name, content.config)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in content.tensors.values()})
    print(f"{folder}: GPT-2, {len(content.tensors)} tensors of {', '.join(dtypes)} in {content.weights_file}")
    print("\n".join(description(content.config, content.tokenizer)))


def description(config: ModelConfig, tokenizer: Tokenizer | None) -> list[str]:
    """Return one line about the shape and one about the tokenizer."""
    shape = (
        f"  shape      {config.num_layers} layers, {config.num_heads} heads, {config.width} wide, context "
        f"{config.context_len:,}, vocabulary {config.vocab_size:,}, MLP {config.resolved_mlp_width} ({config.mlp}), "
        f"{'tied' if config.tie else 'untied'} head"
    )
    if tokenizer is None:
        return [shape, "  tokenizer  none: only transformers can read this folder"]
    facts = tokenizer.describe()
    return [shape, f"  tokenizer  {facts.get('name', facts['kind'])}, sha256 {facts['sha256'][:16]}"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; an InputError ends it with one line and exit code 2."""
    with one_line_errors("hf_bridge"):
        options: Export | Import = tyro.cli(Export | Import, args=args, description=__doc__)
        if isinstance(options, Export):
            export(options)
        else:
            check_folder(options.folder)


if __name__ == "__main__":
    main()
