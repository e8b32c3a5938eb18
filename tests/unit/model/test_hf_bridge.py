"""Export and import against transformers and tokenizers: they load what we write, and we load what they write."""

import dataclasses
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import InputError
from data_prep.bpe_reference import train as train_pairs
from data_prep.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer, alphabet_of, make_tokenizer
from model import generate, hf_bridge
from model.checkpoint import TrainedModel, load_model
from model.config import GPT2, NAMED_SHAPES, ModelConfig
from model.gpt import build_model
from model.hf.folder import open_folder
from model.hf.format import EMBEDDING, HEAD, check_expressible, from_json, to_json
from model.hf.tokenizer import read_tokenizer, tokenizer_config, tokenizer_json
from model.hf_bridge import write_folder
from tests.helpers.runs import assert_same_tensors, called, rows, tiny_config, validations
from tests.unit.data_prep.test_tokenizer import NASTY, SHARED_TEXTS, random_texts, small_ranks
from tests.unit.model.test_gpt import randomize
from train import main as trainer
from train.config import Config
from train.main import run
from train.processes.group import ProcessGroup

pytest.importorskip("safetensors")
TINY = ModelConfig(num_layers=2, num_heads=2, width=32, vocab_size=256, context_len=16, eot_id=None)
ALONE = ProcessGroup(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set HF_HUB_OFFLINE=1 for these tests only: the library reads the variable once, when it is imported."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def transformers() -> Any:
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def run_config(data: Path, run_dir: Path, **changes: Any) -> Config:
    config = tiny_config(data, run_dir, steps=4)
    validate, save = dataclasses.replace(config.validate, every=4), dataclasses.replace(config.save, every=2)
    return dataclasses.replace(config, validate=validate, save=save, **changes)


@pytest.fixture(scope="module")
def char_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a character model, with checkpoints of steps 2 and 4 and a validation at step 4."""
    run_dir = tmp_path_factory.mktemp("bridge") / "run"
    run(run_config(tiny_data, run_dir), ALONE)
    return run_dir


@pytest.fixture(scope="module")
def folder(char_run: Path) -> Path:
    done = called(hf_bridge.main, "export", str(char_run), "--out", str(char_run.parent / "exported"))
    assert done.returncode == 0, done.stderr
    assert "step 4 of run" in done.stdout
    return char_run.parent / "exported"


def untrained(config: ModelConfig, tokenizer: Tokenizer, path: Path) -> TrainedModel:
    """Return a random model as if it came from step 3 of a run."""
    model = build_model(config, seed=1)
    randomize(model, seed=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in (EMBEDDING, HEAD):
                parameter[config.vocab_size :] = 0
    return TrainedModel(model.eval(), tokenizer, 3, path / "run" / "checkpoints" / "step_00000003")


def some_tokens() -> Tensor:
    return torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(5))


# --- Models -----------------------------------------------------------------------------------------------------------


def test_export_and_load_return_the_same_model(char_run: Path, folder: Path) -> None:
    before, after = load_model(char_run), load_model(folder)
    assert_same_tensors(before.model.state_dict(), after.model.state_dict())
    assert after.model.config == before.model.config and not after.model.training
    assert after.tokenizer.describe() == before.tokenizer.describe()
    assert (after.step, after.checkpoint) == (None, folder)
    texts = [
        called(generate.main, str(path), "--prompt", "a", "--max-tokens", "40").stdout for path in (char_run, folder)
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 40


@pytest.mark.parametrize(
    "switches",
    [{}, {"mlp": "silu", "mlp_width": 40}, {"mlp": "relu2", "tie": False}, {"vocab_multiple": 1}],
    ids=str,
)
def test_transformers_computes_the_same_logits(tmp_path: Path, switches: dict[str, Any]) -> None:
    trained = untrained(dataclasses.replace(TINY, **switches), ByteTokenizer(), tmp_path)
    write_folder(trained, tmp_path / "out")
    theirs, loading = transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        expected, logits = trained.model(some_tokens())[..., :256], theirs.eval()(some_tokens()).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert theirs.generation_config.eos_token_id is None
    loaded = load_model(tmp_path / "out").model
    assert torch.equal(loaded(some_tokens())[..., :256], expected)
    if "vocab_multiple" not in switches:
        assert_same_tensors(loaded.state_dict(), trained.model.state_dict())


def save_by_transformers(path: Path, form: str, **settings: Any) -> Any:
    """Save a random GPT2LMHeadModel in one of the usual forms, with a byte tokenizer, and return it."""
    library = transformers()
    shape = {"vocab_size": 256, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = library.GPT2LMHeadModel(library.GPT2Config(**shape, **settings)).eval()
    randomize(model, seed=3)
    if "bin" in form:
        path.mkdir()
        model.config.save_pretrained(path)
        tensors = dict(model.state_dict())
        if form == "oldest bin":  # GPT-2's own: no prefix, no head, causal masks, and torch's first file format
            tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
            del tensors["lm_head.weight"]
            mask = torch.ones(16, 16, dtype=torch.uint8).tril().view(1, 1, 16, 16)
            tensors |= {f"h.{layer}.attn.bias": mask for layer in range(2)}
            tensors |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
        torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=form != "oldest bin")
    elif form == "without a head":
        model.transformer.save_pretrained(path)
    else:
        model.to(torch.bfloat16 if form == "bfloat16" else torch.float32)
        model.save_pretrained(path, max_shard_size="30KB" if form == "parts" else "1GB")
    give_tokenizer(path, ByteTokenizer())
    return model.float()


def give_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer, 16)))


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("safetensors", {"tie_word_embeddings": False, "activation_function": "silu", "n_inner": 48}),
        ("bfloat16", {}),
        ("parts", {}),
        ("without a head", {}),
        ("bin", {"activation_function": "gelu_pytorch_tanh"}),
        ("oldest bin", {}),
    ],
    ids=str,
)
def test_we_compute_the_logits_of_what_transformers_saved(tmp_path: Path, form: str, settings: dict[str, Any]) -> None:
    theirs = save_by_transformers(tmp_path / "made", form, **settings)
    assert (len(list((tmp_path / "made").glob("*.safetensors"))) > 2) == (form == "parts")
    ours = load_model(tmp_path / "made").model
    with torch.no_grad():
        torch.testing.assert_close(ours(some_tokens())[..., :256], theirs(some_tokens()).logits, rtol=0, atol=1e-4)
    done = called(hf_bridge.main, "import", str(tmp_path / "made"))
    assert done.returncode == 0 and "2 layers, 2 heads, 32 wide" in done.stdout
    assert ("bfloat16" in done.stdout) == (form == "bfloat16")


def test_the_configs_of_all_four_gpt2s_are_read(tmp_path: Path) -> None:
    assert from_json({"model_type": "gpt2"}, tmp_path) == dataclasses.replace(GPT2, eot_id=None)
    for config in (config for config in NAMED_SHAPES.values() if not config.switched()):
        theirs = transformers().GPT2Config(n_layer=config.num_layers, n_head=config.num_heads, n_embd=config.width)
        assert from_json(theirs.to_dict(), tmp_path) == dataclasses.replace(config, eot_id=None)


# --- Export -----------------------------------------------------------------------------------------------------------


def test_the_card_has_data_command_and_results(char_run: Path, folder: Path, tmp_path: Path) -> None:
    card = (folder / "README.md").read_text()
    last = rows(char_run)[-1]
    assert "step 4 of the run `run`" in card
    assert json.loads((char_run / "config.json").read_text())["data"] in card
    assert "`text.txt`, sha256 `" in card and "- train: 18,000 tokens" in card
    assert f"{last['val_loss']:.4f} +- {last['val_loss_stderr']:.4f} | {last['val_bits_per_byte']:.4f} |" in card
    assert json.loads((char_run / "provenance.json").read_text())["commit"] in card
    assert os.uname().nodename not in card.replace("`run`", "")
    parameters = transformers().AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert f"{parameters:,} parameters" in card
    assert called(hf_bridge.main, "export", f"{char_run}@2", "--out", str(tmp_path / "out")).returncode == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "step 2 of the run" in card and f"{last['val_loss']:.4f}" not in card, "step 2 has no validation"


def test_what_cannot_be_exported_or_imported_is_refused(
    char_run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(char_run.parent.iterdir())
    out = ["--out", str(tmp_path / "out")]
    for args, message, has_safetensors in (
        (["export", str(char_run), "--out", str(folder)], f"{folder}: exists", True),
        (["export", str(folder), *out], "is a Hugging Face folder already", True),
        (["export", f"{char_run}@3", *out], "no checkpoint of step 3; there are 2, 4", True),
        (["import", str(char_run)], "not a folder with weights", True),
        (["export", str(char_run), *out], "pip install -e '.[hf]'", False),
        (["import", str(folder)], "pip install -e '.[hf]'", False),
    ):
        with monkeypatch.context() as context:
            if not has_safetensors:
                context.setitem(sys.modules, "safetensors", None)
            done = called(hf_bridge.main, *args)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("hf_bridge: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert sorted(char_run.parent.iterdir()) == before and list(tmp_path.iterdir()) == []


def test_a_model_trained_with_dropout_is_exported_without_it() -> None:
    content = to_json(dataclasses.replace(TINY, dropout=0.2))
    assert content == to_json(TINY)
    assert [content[f"{name}_pdrop"] for name in ("attn", "embd", "resid")] == [0.0, 0.0, 0.0]


def test_a_model_that_no_class_of_theirs_fits_is_refused_by_name(tmp_path: Path) -> None:
    switches: dict[str, Any] = {"position_embedding": "rope", "norm": "rmsnorm", "norm_place": "post", "mlp": "swiglu"}
    switches |= {"bias": False, "qk_norm": True, "embedding_norm": True, "embedding_shortcut": True}
    switches |= {"value_embeddings": 1, "skips": True, "value_residual": True}
    flags = [f"--model.{name.replace('_', '-')} {value}" for name, value in switches.items()]
    with pytest.raises(InputError, match=f"no {', '.join(flags)};"):
        write_folder(untrained(dataclasses.replace(TINY, **switches), ByteTokenizer(), tmp_path), tmp_path / "out")
    with pytest.raises(InputError, match=r"no --model\.kind heads"):
        check_expressible(ModelConfig(kind="heads", num_layers=2, num_heads=2, width=32, context_len=32))
    assert list(tmp_path.iterdir()) == []


# --- Tokenizers -------------------------------------------------------------------------------------------------------

TEXTS = [text for text in NASTY if text.isprintable() or not any("\ud800" <= mark <= "\udfff" for mark in text)]


def trained_pairs(shared_data: Path) -> BpeTokenizer:
    text = (shared_data / "tinystories_2mb.txt").read_text(encoding="utf-8")[:100_000]
    tokens = train_pairs([text], 1000).tokens
    return BpeTokenizer({token: rank for rank, token in enumerate(tokens)}, name="trained")


OTHER_RECORDS = {
    "config.json": ["", "5", "[]", "{}", '{"config": {"data": 5}, "data": "x"}', "9" * 5_000, "[" * 100_000, "\udcff"],
    "provenance.json": ["", "[]", "{}", '{"command": 5}', "9" * 5_000],
    "metrics.jsonl": ["5\n", "{}\n", "[1]\n", '{"step": null}\n', '{"step": 1, "val_loss": 1}\n', "9" * 5_000 + "\n"],
}


@pytest.mark.parametrize("name", OTHER_RECORDS)
def test_a_record_of_the_run_of_another_form_is_refused_in_one_line(char_run: Path, tmp_path: Path, name: str) -> None:
    run_dir = shutil.copytree(char_run, tmp_path / "run")
    intact = (run_dir / name).read_bytes()
    args = ("export", str(run_dir), "--out", str(tmp_path / "out"))
    if name == "provenance.json":
        content = json.loads(intact) | {"command": "python 'train"}
        OTHER_RECORDS[name].append(json.dumps(content))
    for text in OTHER_RECORDS[name]:
        (run_dir / name).write_text(text, errors="surrogateescape")
        done = called(hf_bridge.main, *args)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (text[:50], done.stderr)
        assert f"{run_dir / name}: damaged" in done.stderr, text[:50]
    (run_dir / name).unlink()
    os.mkfifo(run_dir / name)
    done = called(hf_bridge.main, *args)
    assert done.returncode == 2 and "a FIFO" in done.stderr


@pytest.mark.parametrize("name", ["gpt2", "trained", "small", "byte", "char"])
def test_the_ids_of_every_text_are_the_same(shared_data: Path, tmp_path: Path, name: str) -> None:
    """Also of the text <|endoftext|>, and back to the same text; we read the saved tokenizer as the same one."""
    texts = [text for text in TEXTS if len(text) < 20_000] + random_texts(1)
    texts += [(shared_data / file).read_text(encoding="utf-8")[:5_000] for file in SHARED_TEXTS]
    match name:
        case "trained":
            tokenizer: Tokenizer = trained_pairs(shared_data)
        case "small":
            tokenizer = BpeTokenizer(small_ranks(), name="small")
        case _:
            tokenizer = make_tokenizer(name, "".join(sorted(alphabet_of("".join(texts)))))
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id)
    write_folder(untrained(config, tokenizer, tmp_path), tmp_path / "out")
    theirs = transformers().AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(theirs), theirs.eos_token_id) == (tokenizer.vocab_size, tokenizer.eot_id)
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, repr(text[:100])
        assert theirs.decode(ids) == text
    theirs.save_pretrained(tmp_path / "out")  # in their own spelling
    loaded = read_tokenizer(tmp_path / "out").describe()
    assert loaded.pop("name", None) == {"gpt2": "gpt2", "trained": "out", "small": "out"}.get(name)
    assert loaded.items() <= tokenizer.describe().items()
    if tokenizer.eot_id is not None:
        ids = theirs("a<|endoftext|>b", split_special_tokens=False)["input_ids"]
        assert ids == [*tokenizer.encode("a"), tokenizer.eot_id, *tokenizer.encode("b")]


def test_an_unknown_character_is_an_error_in_tokenizers_too(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    give_tokenizer(tmp_path, CharTokenizer("abc"))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("cab").ids == [2, 0, 1]
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        tokenizer.encode("cad")


def test_vocab_json_and_merges_txt_are_read(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = trained_pairs(shared_data)
    model = tokenizer_json(tokenizer)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"], ""]), encoding="utf-8")
    assert read_tokenizer(tmp_path).describe() == tokenizer.describe() | {"name": tmp_path.name}
    model["merges"][100:102] = reversed(model["merges"][100:102])
    (tmp_path / "merges.txt").write_text("\n".join(model["merges"]), encoding="utf-8")
    with pytest.raises(InputError, match="not a tokenizer of GPT-2's kind: it differs in its model"):
        read_tokenizer(tmp_path)


def test_another_kind_of_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    for path, value, message in (
        ("normalizer", {"type": "NFC"}, "differs in its normalizer"),
        ("pre_tokenizer.add_prefix_space", True, "differs in its pre_tokenizer"),
        ("pre_tokenizer.use_regex", False, "differs in its pre_tokenizer"),
        ("pre_tokenizer", None, "differs in its pre_tokenizer"),
        ("added_tokens.0.content", "[PAD]", "differs in its special tokens"),
        ("added_tokens.0.id", 3, "differs in its special tokens"),
        ("model.vocab.<|endoftext|>", 3, "differs in its special tokens"),
        ("model.dropout", 0.1, "differs in its model"),
        ("model.ignore_merges", True, "differs in its model"),
        ("model.end_of_word_suffix", "</w>", "differs in its model"),
        ("model.merges", ["a b", "\u0120 a", "ab c"], "differs in its model"),
        ("model.merges", ["a b", "a bc", "\u0120 a"], "differs in its model"),
        ("model.vocab.ab", 999, "ranks are not 0 to 258"),
        ("model.vocab.ab", "256", "no whole numbers"),
        ("model.vocab.\u4e2d", 259, "stands for no bytes"),
        ("model.vocab", [], "not a tokenizer of GPT-2's kind"),
        ("model.merges", [1], "not a tokenizer of GPT-2's kind"),
        ("model", None, "not a tokenizer of GPT-2's kind"),
        ("model.type", "WordLevel", "must be distinct characters"),
    ):
        content = json.loads(json.dumps(tokenizer_json(BpeTokenizer(small_ranks(), name="small"))))
        *parents, last = path.split(".")
        part = content
        for name in parents:
            part = part[int(name) if name.isdigit() else name]
        part[last] = value
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=message) as caught:
            read_tokenizer(tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path / "tokenizer.json") in str(caught.value)


def test_ranks_that_are_no_merges_are_refused_unless_the_tokenizer_is_left_out(tmp_path: Path) -> None:
    tokenizer = BpeTokenizer(small_ranks() | {b"xyz": 259}, name="unmergeable")
    trained = untrained(dataclasses.replace(TINY, vocab_size=261), tokenizer, tmp_path)
    with pytest.raises(InputError, match=r"no two tokens of lower rank make b'xyz', rank 259.*--no-tokenizer"):
        write_folder(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    write_folder(trained, tmp_path / "out", with_tokenizer=False)
    assert transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 261
    with pytest.raises(InputError, match=r"has no tokenizer\.json, nor vocab\.json and merges\.txt"):
        open_folder(tmp_path / "out")


# --- Fine-tuning ------------------------------------------------------------------------------------------------------


def finetune_config(data: Path, run_dir: Path, folder: Path, **train: Any) -> Config:
    config = run_config(data, run_dir, from_checkpoint=str(folder))
    model = dataclasses.replace(config.model, context_len=train.get("seq_len", 32))
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, **train))


def test_a_folder_is_finetuned_and_exported_again(
    char_run: Path, folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(folder, tmp_path / "folder")
    config = finetune_config(tiny_data, tmp_path / "new", source, steps=2)
    run(config, ALONE)
    assert validations(tmp_path / "new")[0] == (0, *validations(char_run)[-1][1:])
    assert f"weights from {source}\n" in (tmp_path / "new" / "log.txt").read_text()
    assert json.loads((tmp_path / "new" / "config.json").read_text())["config"]["from_checkpoint"] == str(source)
    shutil.rmtree(source)  # A run that has begun does not need the folder.
    run(config, ALONE)
    assert "continuing from" in (tmp_path / "new" / "log.txt").read_text()
    assert called(hf_bridge.main, "export", str(tmp_path / "new"), "--out", str(source)).returncode == 0
    assert "Fine-tuned from the weights of `folder`" in (source / "README.md").read_text()


def test_a_shorter_context_takes_the_first_positions(folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    run(finetune_config(tiny_data, tmp_path / "new", folder, steps=1, seq_len=8, micro_batch=12), ALONE)
    log = (tmp_path / "new" / "log.txt").read_text()
    assert f"weights from {folder}, without the last 24 of its 32 positions" in log
    positions, tuned = (
        load_model(path).model.state_dict()["transformer.wpe.weight"][:8] for path in (folder, tmp_path / "new")
    )
    assert (positions - tuned).abs().max() < 0.01, "one warm-up step changed them by more"


def test_a_folder_that_does_not_fit_the_run_is_refused(
    folder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"positions for 32 tokens; set --train\.seq-len 32 or less \(it is 64\)"):
        run(finetune_config(tiny_data, tmp_path / "long", folder, seq_len=64, micro_batch=3), ALONE)
    other = shutil.copytree(folder, tmp_path / "other")
    tokenizer = read_tokenizer(folder)
    assert isinstance(tokenizer, CharTokenizer)
    give_tokenizer(other, CharTokenizer("".join(sorted({*tokenizer.itos[1:], "\u00e9"}))))
    with pytest.raises(InputError, match="does not fit this run: another tokenizer"):
        run(finetune_config(tiny_data, tmp_path / "new", other), ALONE)
    config = finetune_config(tiny_data, tmp_path / "new", folder)
    untied = dataclasses.replace(config, model=dataclasses.replace(config.model, tie=False, num_heads=4))
    with pytest.raises(InputError, match=r"num_heads 2 \(this run: 4\), tie True \(this run: False\)"):
        run(untied, ALONE)
    monkeypatch.chdir(tmp_path)
    done = called(trainer.main, "finetune", "--data.dir", str(tiny_data), "--dry-run")
    assert done.returncode == 2 and f"{tmp_path / 'gpt2'}: no such run directory" in done.stderr
