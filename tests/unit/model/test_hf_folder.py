"""Folders that are damaged, planted or of another model: one line each, no code run, nothing written."""

import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import InputError
from data_prep.tokenizer import BpeTokenizer
from model import generate, hf_bridge
from model.checkpoint import TrainedModel, load_model
from model.config import ModelConfig
from model.gpt import build_model
from model.hf.tokenizer import tokenizer_json
from model.hf_bridge import write_folder
from tests.helpers.runs import called
from tests.unit.data_prep.test_tokenizer import small_ranks

safetensors = pytest.importorskip("safetensors.torch")
CONFIG = ModelConfig(num_layers=2, num_heads=2, width=16, vocab_size=260, context_len=8, eot_id=259)
FUZZ = 15  # of each file; thousands were tried when it was written
FORMS = ("whole", "parts", "bin", "old bin", "vocabulary")
WEIGHTS = {"whole": "model.safetensors", "bin": "pytorch_model.bin", "old bin": "pytorch_model.bin"}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as each form of a folder."""
    path = tmp_path_factory.mktemp("forms")
    tokenizer = BpeTokenizer(small_ranks(), name="small")
    whole = path / "whole"
    write_folder(
        TrainedModel(build_model(CONFIG, seed=1), tokenizer, 3, path / "run" / "checkpoints" / "step_00000003"), whole
    )
    tensors = safetensors.load_file(whole / "model.safetensors")
    for form in FORMS[1:]:
        shutil.copytree(whole, path / form)
        if form != "vocabulary":
            (path / form / "model.safetensors").unlink()
    torch.save(tensors, path / "bin" / "pytorch_model.bin")
    torch.save(tensors, path / "old bin" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        part = {name: tensors[name] for name in files if files[name] == file}
        safetensors.save_file(part, path / "parts" / file)
    (path / "parts" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (path / "vocabulary" / "tokenizer.json").unlink()
    model = tokenizer_json(tokenizer)["model"]
    (path / "vocabulary" / "vocab.json").write_text(json.dumps(model["vocab"]))
    (path / "vocabulary" / "merges.txt").write_text("\n".join(model["merges"]))
    return path


@pytest.fixture
def here(forms: Path, tmp_path: Path) -> Path:
    """The whole folder, to be broken."""
    return shutil.copytree(forms / "whole", tmp_path / "here")


def refusal(folder: Path) -> str:
    """The one line with which it is refused; nothing else is printed or written."""
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    done = called(hf_bridge.main, "import", str(folder))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"hf_bridge: {folder}") and done.stderr.count("\n") == 1 and len(done.stderr) < 700
    assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")} == before
    return done.stderr


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_model(forms: Path, form: str) -> None:
    wanted, found = load_model(forms / "whole").model.state_dict(), load_model(forms / form).model.state_dict()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut off, overwritten, shortened, lengthened or with another number; near the ends, where formats say most."""
    altered = bytearray(content)
    near = min(len(content), 3000)
    place = rng.choice([rng.randrange(near), len(content) - 1 - rng.randrange(near)])
    match rng.randrange(5):
        case 0:
            del altered[place:]
        case 1:
            altered[place : place + 1] = rng.randbytes(1)
        case 2:
            del altered[place : place + rng.choice([1, 4, 50])]
        case 3:
            altered[place:place] = rng.randbytes(rng.choice([1, 3, 40]))
        case _:
            digits = [index for index in range(near) if chr(content[index]).isdigit()] or [place]
            odd = [b"-1", b"0", b"99999999999999999999", b"1e9", b"[]", b"null", b"NaN", b'"x"', b"{" * 3000]
            index = rng.choice(digits)
            altered[index : index + 1] = rng.choice(odd)
    return bytes(altered)


@pytest.mark.parametrize("form", FORMS)
def test_whatever_is_damaged_is_refused_in_one_line_or_is_no_damage(forms: Path, tmp_path: Path, form: str) -> None:
    folder = shutil.copytree(forms / form, tmp_path / form)
    rng = random.Random(form)
    read = [path for path in sorted(folder.iterdir()) if path.name in (forms_files(form))]
    assert len(read) >= 3
    for path in read:
        content = path.read_bytes()
        refused = 0
        for _ in range(FUZZ):
            path.write_bytes(damaged(content, rng))
            try:
                load_model(folder)
            except InputError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 700 and str(folder) in str(error)
        assert refused >= FUZZ // 6, path  # the rest hit blanks, numbers of weights, or what is not read
        path.write_bytes(content)
    assert sorted(folder.iterdir()) == sorted(folder / path.name for path in (forms / form).iterdir())


def forms_files(form: str) -> set[str]:
    """What is read of a folder."""
    tokenizer = {"vocab.json", "merges.txt"} if form == "vocabulary" else {"tokenizer.json"}
    parts = {"model.safetensors.index.json", "model-0.safetensors", "model-1.safetensors"}
    return {"config.json", *tokenizer, *(parts if form == "parts" else [WEIGHTS.get(form, "model.safetensors")])}


@pytest.mark.parametrize("form", ["whole", "bin", "old bin"])
def test_weights_cut_off_anywhere_are_refused(forms: Path, tmp_path: Path, form: str) -> None:
    folder = shutil.copytree(forms / form, tmp_path / form)
    path = folder / WEIGHTS[form]
    content = path.read_bytes()
    for length in range(0, len(content), len(content) // 25):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=path.name):
            load_model(folder)


def test_one_changed_bit_of_a_bin_is_found(forms: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(forms / "bin", tmp_path / "bin")
    path = folder / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    weights = load_model(folder).model.state_dict()["transformer.h.0.mlp.c_fc.bias"]
    assert not weights.any()
    place = content.index(load_model(folder).model.state_dict()["transformer.wpe.weight"].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))
    assert "the checksum of pytorch_model/data/" in refusal(folder)


# --- Planted code -----------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


def save_pickle(path: Path, content: object, form: str) -> None:
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_code_in_a_bin_is_not_run(forms: Path, tmp_path: Path, form: str, as_tensor: bool) -> None:
    folder = shutil.copytree(forms / "bin", tmp_path / "bin")
    mark = tmp_path / "code was run"
    payload = Payload(mark)
    save_pickle(folder / "pytorch_model.bin", {"transformer.wte.weight": payload} if as_tensor else payload, form)
    assert "pytorch_model.bin: refused: " in refusal(folder)
    done = called(generate.main, str(folder))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert not mark.exists()
    if form == "pickle":
        pickle.loads((folder / "pytorch_model.bin").read_bytes())
        assert mark.exists()  # it would have been


def test_code_that_config_names_is_not_looked_for(here: Path) -> None:
    (here / "modeling.py").write_text("raise SystemExit('code was run')")
    edit_config(here, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert "auto_map" in refusal(here)


def test_a_compressed_bin_is_not_unpacked(forms: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(forms / "bin", tmp_path / "bin")
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert "it is compressed" in refusal(folder)


@pytest.mark.parametrize("file", ["../whole/model.safetensors", "/etc/passwd", "config.json", "gone.safetensors", ".."])
def test_an_index_reaches_no_file_but_weights_beside_it(forms: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(forms / "whole", tmp_path / "whole")
    folder = shutil.copytree(forms / "parts", tmp_path / "parts")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], file)}))
    assert f"{file!r} is no weights file beside it" in refusal(folder)
    index["weight_map"] |= dict.fromkeys(["transformer.wte.weight", "transformer.wpe.weight"], "model-1.safetensors")
    path.write_text(json.dumps(index))
    assert "its tensors are not those that model.safetensors.index.json names" in refusal(folder)


# --- Another model ----------------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, """"model_type" is 'llama'; only "gpt2" can be read"""),
        ({"activation_function": "gelu"}, "activation_function 'gelu' (there are gelu_new, silu, relu2, "),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06 (only 1e-05)"),
        ({"scale_attn_weights": False}, "scale_attn_weights False (only true)"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True (only false)"),
        ({"add_cross_attention": True}, "add_cross_attention True (only false)"),
        ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4} (only null)"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads {'0': [1]} (only {})"),
        ({"n_ctx": 4}, "n_ctx 4 (only 8)"),
        ({"n_head": 3}, "n_embd 16 (not divisible by n_head 3)"),
        (
            {"n_layer": 10**9, "n_embd": 16.0},
            "n_layer 1000000000 (a whole number from 1 to 1,000,000 is needed); n_embd",
        ),
        ({"n_layer": True}, "n_layer True (a whole number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings 'no' (true or false)"),
        ({"n_layer": 3}, "model.safetensors: has tensors of 2 layers, config.json says n_layer 3"),
        ({"n_layer": 900_000}, "has tensors of 2 layers"),
        ({"n_embd": 10**6}, "transformer.h.0.attn.c_attn.bias [48], not [3000000]"),
        ({"n_inner": 32}, "transformer.h.0.mlp.c_fc.bias [64], not [32]"),
        ({"n_positions": 9, "n_ctx": 9}, "transformer.wpe.weight [8, 16], not [9, 16]"),
        ({"vocab_size": 261}, "its tokenizer has 260 ids, its config.json says vocab_size 261"),
        ({"tie_word_embeddings": False}, "lacks lm_head.weight"),
    ],
    ids=str,
)
def test_what_our_model_cannot_be_is_refused_by_name(here: Path, changes: dict[str, Any], said: str) -> None:
    edit_config(here, **changes)
    assert said in refusal(here)


def test_settings_without_effect_here_are_taken(here: Path) -> None:
    edit_config(here, n_ctx=8, reorder_and_upcast_attn=True, resid_pdrop=0.1, summary_type="mean", use_cache=False)
    assert load_model(here).model.config == CONFIG


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("transformer.ln_f.bias"), "lacks transformer.ln_f.bias"),
        (lambda t: t.update({"score.weight": torch.zeros(2)}), "has what GPT-2 has not: transformer.score.weight"),
        (lambda t: t.update({f"lm_head.{i}\n": torch.zeros(1) for i in range(9)}), r"'lm_head.0\n', 'lm_head.1\n'"),
        (
            lambda t: t.update({"ln_f.bias": torch.zeros(16)}),
            "has transformer.ln_f.bias twice, with and without 'transformer.'",
        ),
        (lambda t: t.update({"lm_head.weight": torch.zeros(260, 16)}), "lm_head.weight is not transformer.wte.weight"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(16).double()}), "another form than plain fp32"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.full((16,), torch.nan)}), "numbers that are not finite"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(17)}), "transformer.ln_f.bias [17], not [16]"),
        (lambda t: t.clear(), "has tensors of 0 layers"),
    ],
)
@pytest.mark.parametrize("form", ["whole", "bin"])
def test_other_tensors_are_refused_by_name(
    forms: Path, tmp_path: Path, form: str, edit: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    folder = shutil.copytree(forms / form, tmp_path / form)
    tensors = safetensors.load_file(forms / "whole" / "model.safetensors")
    edit(tensors)
    save = safetensors.save_file if form == "whole" else torch.save
    save(tensors, folder / WEIGHTS[form])
    assert said in refusal(folder)


@pytest.mark.parametrize("content", [[], {"a": 1}, {1: torch.zeros(1)}, torch.zeros(1), {"model": {}}], ids=str)
def test_a_bin_of_something_else_is_refused(forms: Path, tmp_path: Path, content: object) -> None:
    folder = shutil.copytree(forms / "bin", tmp_path / "bin")
    torch.save(content, folder / "pytorch_model.bin")
    assert "tensors by name" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b"9" * 5000, b'{"model_type": "g'])
def test_json_that_is_none_is_refused(here: Path, name: str, content: bytes) -> None:
    (here / name).write_bytes(content)
    assert name in refusal(here)


def test_json_without_end_is_not_read(here: Path) -> None:
    with (here / "config.json").open("wb") as file:
        file.truncate(10**12)
    assert "1,000,000,000,000 bytes, where at most 64,000,000 make sense" in refusal(here)


def test_what_a_folder_lacks_is_named(here: Path) -> None:
    (here / "config.json").unlink()
    assert "config.json: no such file" in refusal(here)
    (here / "model.safetensors").unlink()
    assert "where is model.safetensors?" in refusal(here)
    with pytest.raises(InputError, match="no checkpoint in it yet, and no weights as Hugging Face names them"):
        load_model(here)
