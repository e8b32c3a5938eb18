"""Damaged, planted and foreign Hugging Face folders: each is refused in one line, runs no code and writes nothing."""

import json
import os
import pickle
import random
import resource
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
NUM_DAMAGES = 15  # of each file; thousands were tried when the test was written
INDEX = "model.safetensors.index.json"
BASE = ["config.json", "tokenizer.json"]
FILES_READ = {  # the files that loading reads, for each form of a folder
    "whole": [*BASE, "model.safetensors"],
    "parts": [*BASE, INDEX, "model-0.safetensors", "model-1.safetensors"],
    "bin": [*BASE, "pytorch_model.bin"],
    "old bin": [*BASE, "pytorch_model.bin"],
    "vocabulary": ["config.json", "merges.txt", "vocab.json", "model.safetensors"],
}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of each form, all with the same model."""
    path = tmp_path_factory.mktemp("forms")
    tokenizer = BpeTokenizer(small_ranks(), name="small")
    checkpoint = path / "run" / "checkpoints" / "step_00000003"
    write_folder(TrainedModel(build_model(CONFIG, seed=1), tokenizer, 3, checkpoint), path / "whole")
    tensors = safetensors.load_file(path / "whole" / "model.safetensors")
    for form in list(FILES_READ)[1:]:
        shutil.copytree(path / "whole", path / form)
        if form != "vocabulary":
            (path / form / "model.safetensors").unlink()
    torch.save(tensors, path / "bin" / "pytorch_model.bin")
    torch.save(tensors, path / "old bin" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        part = {name: tensors[name] for name in files if files[name] == file}
        safetensors.save_file(part, path / "parts" / file)
    (path / "parts" / INDEX).write_text(json.dumps({"weight_map": files}))
    (path / "vocabulary" / "tokenizer.json").unlink()
    model = tokenizer_json(tokenizer)["model"]
    (path / "vocabulary" / "vocab.json").write_text(json.dumps(model["vocab"]))
    (path / "vocabulary" / "merges.txt").write_text("\n".join(model["merges"]))
    return path


@pytest.fixture
def whole(forms: Path, tmp_path: Path) -> Path:
    return shutil.copytree(forms / "whole", tmp_path / "whole")


def refusal(folder: Path) -> str:
    """Return the one line of `hf_bridge import` on a folder that it refuses, and check that nothing was written."""
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    done = called(hf_bridge.main, "import", str(folder))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"hf_bridge: {folder}") and done.stderr.count("\n") == 1 and len(done.stderr) < 700
    assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")} == before
    return done.stderr


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- Damage -----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut, overwrite, shorten or lengthen the content, or change a number, near one of its ends."""
    altered = bytearray(content)
    near = min(len(content), 3000)
    offset = rng.choice([rng.randrange(near), len(content) - 1 - rng.randrange(near)])
    match rng.randrange(5):
        case 0:
            del altered[offset:]
        case 1:
            altered[offset : offset + 1] = rng.randbytes(1)
        case 2:
            del altered[offset : offset + rng.choice([1, 4, 50])]
        case 3:
            altered[offset:offset] = rng.randbytes(rng.choice([1, 3, 40]))
        case _:
            digits = [index for index in range(near) if chr(content[index]).isdigit()] or [offset]
            values = [b"-1", b"0", b"99999999999999999999", b"1e9", b"[]", b"null", b"NaN", b'"x"', b"{" * 3000]
            index = rng.choice(digits)
            altered[index : index + 1] = rng.choice(values)
    return bytes(altered)


@pytest.mark.parametrize("form", FILES_READ)
def test_every_form_loads_the_same_model_or_is_refused_when_damaged(forms: Path, tmp_path: Path, form: str) -> None:
    folder = shutil.copytree(forms / form, tmp_path / form)
    expected, loaded = load_model(forms / "whole").model.state_dict(), load_model(folder).model.state_dict()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    files, rng = sorted(folder.iterdir()), random.Random(form)
    for path in (folder / name for name in FILES_READ[form]):
        content = path.read_bytes()
        num_refused = 0
        for _ in range(NUM_DAMAGES):
            path.write_bytes(damaged(content, rng))
            try:
                load_model(folder)
            except InputError as error:
                num_refused += 1
                assert "\n" not in str(error) and len(str(error)) < 700 and str(folder) in str(error)
        assert num_refused >= NUM_DAMAGES // 6, path  # The others hit blanks, weights or ignored settings.
        if path.suffix in (".bin", ".safetensors"):
            for length in range(0, len(content), len(content) // 10):
                path.write_bytes(content[:length])
                with pytest.raises(InputError, match=path.name):
                    load_model(folder)
        path.write_bytes(content)
    assert sorted(folder.iterdir()) == files


def test_one_changed_bit_of_a_bin_is_noticed(forms: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(forms / "bin", tmp_path / "bin")
    path = folder / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    weights = load_model(folder).model.state_dict()["transformer.wpe.weight"]
    content[content.index(weights.numpy().tobytes())] ^= 1
    path.write_bytes(bytes(content))
    assert "the checksum of pytorch_model/data/" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_that_is_no_json_is_refused(whole: Path, name: str) -> None:
    for content in (b"", b"[]", b"null", b"\xff", b"[" * 100_000, b"9" * 5000, b'{"model_type": "g'):
        (whole / name).write_bytes(content)
        assert name in refusal(whole)
    with (whole / name).open("wb") as file:
        file.truncate(10**12)
    assert f"{name}: 1,000,000,000,000 bytes, but such a file has at most 64,000,000" in refusal(whole)


def test_a_missing_file_is_named(whole: Path) -> None:
    (whole / "config.json").unlink()
    assert "config.json: no such file" in refusal(whole)
    (whole / "model.safetensors").unlink()
    assert "where is model.safetensors?" in refusal(whole)
    with pytest.raises(InputError, match="no checkpoint in it yet, and no weights as Hugging Face names them"):
        load_model(whole)


# --- Planted code -----------------------------------------------------------------------------------------------------


class Payload:
    """An object whose unpickling makes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_code_in_a_bin_is_not_run(forms: Path, tmp_path: Path, form: str) -> None:
    folder = shutil.copytree(forms / "bin", tmp_path / "bin")
    path, mark = folder / "pytorch_model.bin", tmp_path / "code was run"
    payload = Payload(mark)
    for content in (payload, {"transformer.wte.weight": payload}):
        if form == "pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
        assert "pytorch_model.bin: refused: " in refusal(folder)
        done = called(generate.main, str(folder))
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert not mark.exists()
    if form == "pickle":
        pickle.loads(path.read_bytes())
        assert mark.exists(), "the payload does not work"


class Allocation:
    """An object whose unpickling allocates; torch.load with weights_only lets it."""

    def __reduce__(self) -> Any:
        return bytearray, (2**31,)


@pytest.mark.parametrize("is_new", [True, False])
def test_an_allocation_in_a_bin_is_not_made(forms: Path, tmp_path: Path, is_new: bool) -> None:
    folder = shutil.copytree(forms / "bin", tmp_path / "bin")
    torch.save({"a": Allocation()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_new)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "refused: " in refusal(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB


@pytest.mark.parametrize("is_new", [True, False])
def test_a_bin_of_a_models_own_state_dict_is_read(forms: Path, tmp_path: Path, is_new: bool) -> None:
    """An OrderedDict with attributes, of parameters or of tensors that share memory."""
    folder = shutil.copytree(forms / "bin", tmp_path / "bin")
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    module = torch.nn.Module()
    content = module.state_dict() | {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    content["lm_head.weight"] = content["transformer.wte.weight"]
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_new)
    expected, loaded = load_model(forms / "whole").model.state_dict(), load_model(folder).model.state_dict()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)


def test_code_that_config_json_names_is_not_run(whole: Path) -> None:
    (whole / "modeling.py").write_text("raise SystemExit('code was run')")
    edit_config(whole, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert "auto_map" in refusal(whole)


def test_a_compressed_bin_is_not_unpacked(forms: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(forms / "bin", tmp_path / "bin")
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert "it is compressed" in refusal(folder)


def test_an_index_reaches_only_weights_files_beside_it(forms: Path, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(forms / "parts", tmp_path / "parts")
    index = json.loads((folder / INDEX).read_text())
    for file in ("../whole/model.safetensors", "/etc/passwd", "config.json", "gone.safetensors", ".."):
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], file)}))
        assert f"{file!r} is no weights file beside it" in refusal(folder)
    index["weight_map"] |= dict.fromkeys(["transformer.wte.weight", "transformer.wpe.weight"], "model-1.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    assert f"its tensors are not those that {INDEX} lists" in refusal(folder)


def linked_away(path: Path) -> None:
    """Move a file out of its folder and leave a link."""
    outside = path.parent.parent / f"outside_{path.name}"
    path.rename(outside)
    path.symlink_to(f"../{outside.name}")


@pytest.mark.parametrize("form", FILES_READ)
def test_no_link_leaves_the_folder_and_nothing_blocks(forms: Path, tmp_path: Path, form: str) -> None:
    for number, name in enumerate(FILES_READ[form]):
        for kind, damage in enumerate((linked_away, make_fifo, make_folder)):
            folder = shutil.copytree(forms / form, tmp_path / f"{number}_{kind}" / form)
            damage(folder / name)
            line = refusal(folder)
            assert damage is not linked_away or f"{name}: a link out of {folder}" in line


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_links_inside_the_hubs_cache_are_followed_and_no_others(forms: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--gpt2"
    revision = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    revision.mkdir(parents=True)
    for name in FILES_READ["parts"]:
        shutil.copy(forms / "parts" / name, repository / "blobs" / f"hash_{name}")
        (revision / name).symlink_to(f"../../blobs/hash_{name}")
    expected, loaded = load_model(forms / "whole").model.state_dict(), load_model(revision).model.state_dict()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    (tmp_path / "here").symlink_to(revision)  # a person's own name for it
    assert load_model(tmp_path / "here").model.config == CONFIG
    other = tmp_path / "models--someone--other" / "blobs" / "hash"
    other.parent.mkdir(parents=True)
    shutil.copy(forms / "parts" / "config.json", other)
    (revision / "config.json").unlink()
    (revision / "config.json").symlink_to(other)
    with pytest.raises(InputError, match=r"config\.json: a link out of"):
        load_model(revision)


# --- Another model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, """"model_type" is 'llama'; only "gpt2" can be read"""),
        ({"activation_function": "gelu"}, "activation_function 'gelu' (there are gelu_new, silu, relu2, "),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06 (only 1e-05)"),
        ({"scale_attn_weights": False}, "scale_attn_weights False (only true)"),
        ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4} (only null)"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads {'0': [1]} (only {})"),
        ({"n_ctx": 4}, "n_ctx 4 (only 8)"),
        ({"n_head": 3}, "n_embd 16 (not divisible by n_head 3)"),
        ({"n_layer": 10**9, "n_embd": 16.0}, "(a whole number from 1 to 1,000,000 is needed); n_embd"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings 'no' (true or false)"),
        ({"n_layer": 900_000}, "model.safetensors: has tensors of 2 layers, but config.json says n_layer 900000"),
        ({"n_embd": 10**6}, "transformer.h.0.attn.c_attn.bias [48], not [3000000]"),
        ({"n_inner": 32}, "transformer.h.0.mlp.c_fc.bias [64], not [32]"),
        ({"n_positions": 9, "n_ctx": 9}, "transformer.wpe.weight [8, 16], not [9, 16]"),
        ({"vocab_size": 261}, "the tokenizer has 260 ids, but config.json says vocab_size 261"),
        ({"tie_word_embeddings": False}, "lacks lm_head.weight"),
    ],
    ids=str,
)
def test_a_config_that_our_model_cannot_be_is_refused_by_name(
    whole: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(whole, **changes)
    assert message in refusal(whole)


def test_settings_without_effect_are_accepted(whole: Path) -> None:
    edit_config(whole, n_ctx=8, reorder_and_upcast_attn=True, resid_pdrop=0.1, summary_type="mean", use_cache=False)
    assert load_model(whole).model.config == CONFIG


@pytest.mark.parametrize(
    ("changes", "message"),  # None removes the tensor
    [
        ({"transformer.ln_f.bias": None}, "lacks transformer.ln_f.bias"),
        ({"score.weight": torch.zeros(2)}, "has tensors that GPT-2 does not have: transformer.score.weight"),
        ({f"lm_head.{i}\n": torch.zeros(1) for i in range(9)}, r"'lm_head.0\n', 'lm_head.1\n'"),
        ({"ln_f.bias": torch.zeros(16)}, "has transformer.ln_f.bias twice, with and without 'transformer.'"),
        ({"lm_head.weight": torch.zeros(260, 16)}, "lm_head.weight is not transformer.wte.weight"),
        ({"transformer.ln_f.bias": torch.zeros(16).double()}, "has tensors that are not plain fp32"),
        ({"transformer.ln_f.bias": torch.full((16,), torch.nan)}, "numbers that are not finite"),
        ({"transformer.ln_f.bias": torch.zeros(17)}, "transformer.ln_f.bias [17], not [16]"),
    ],
    ids=["missing", "unknown", "many", "twice", "untied", "fp64", "nan", "shape"],
)
def test_other_tensors_are_refused_by_name(
    forms: Path, tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    tensors = safetensors.load_file(forms / "whole" / "model.safetensors") | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for form, save in (("whole", safetensors.save_file), ("bin", torch.save)):
        folder = shutil.copytree(forms / form, tmp_path / form)
        save(tensors, folder / FILES_READ[form][-1])
        assert message in refusal(folder)


def test_a_bin_without_a_models_tensors_is_refused(forms: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(forms / "bin", tmp_path / "bin")
    contents: list[object] = [[], {"a": 1}, {1: torch.zeros(1)}, torch.zeros(1), {"model": {}}]
    for content in contents:
        torch.save(content, folder / "pytorch_model.bin")
        line = refusal(folder)
        assert "tensors by name" in line or "a key near byte" in line
    torch.save({}, folder / "pytorch_model.bin")
    assert "has tensors of 0 layers" in refusal(folder)
