"""Export and import against Hugging Face's own transformers and tokenizers, which load what we write and write what
we load."""

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
from model.config import NAMED_SHAPES, ModelConfig
from model.gpt import build_model
from model.hf.folder import open_folder
from model.hf.format import EMBEDDING, HEAD, from_json, to_json
from model.hf.tokenizer import read_tokenizer, tokenizer_config, tokenizer_json
from model.hf_bridge import write_folder
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import called, rows, tiny_config, validations
from tests.unit.data_prep.test_tokenizer import NASTY, SHARED_TEXTS, random_texts, small_ranks
from tests.unit.model.test_gpt import randomize
from train import main as trainer
from train.config import Config, ParallelConfig
from train.main import run
from train.processes.group import ProcessGroup

pytest.importorskip("safetensors")
TINY = ModelConfig(num_layers=2, num_heads=2, width=32, vocab_size=256, context_len=16, eot_id=None)
ALONE = ProcessGroup(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=1, for these tests alone: the variable is read when the library is imported, which others use."""
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


def configured(data: Path, run_dir: Path, **changes: Any) -> Config:
    config = tiny_config(data, run_dir, steps=4)
    every_four = dataclasses.replace(config.validate, every=4)
    save = dataclasses.replace(config.save, every=2)
    return dataclasses.replace(config, validate=every_four, save=save, **changes)


@pytest.fixture(scope="module")
def old(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character model's run, with checkpoints of steps 2 and 4, validated at 4."""
    run_dir = tmp_path_factory.mktemp("bridge") / "run"
    run(configured(tiny_data, run_dir), ALONE)
    return run_dir


@pytest.fixture(scope="module")
def folder(old: Path) -> Path:
    done = called(hf_bridge.main, "export", str(old), "--out", str(old.parent / "exported"))
    assert done.returncode == 0, done.stderr
    assert "step 4 of run" in done.stdout
    return old.parent / "exported"


def trained_of(config: ModelConfig, tokenizer: Tokenizer, path: Path) -> TrainedModel:
    """A model that no training made, as if it came from the step 3 of a run."""
    model = build_model(config, seed=1)
    randomize(model, seed=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in (EMBEDDING, HEAD):
                parameter[config.vocab_size :] = 0
    return TrainedModel(model.eval(), tokenizer, 3, path / "run" / "checkpoints" / "step_00000003")


def some_tokens(vocab_size: int, T: int) -> Tensor:
    return torch.randint(vocab_size, (2, T), generator=torch.Generator().manual_seed(5))


def assert_same_model(left: TrainedModel, right: TrainedModel) -> None:
    ours, theirs = left.model.state_dict(), right.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# --- Models -----------------------------------------------------------------------------------------------------------


def test_there_and_back_is_exact(old: Path, folder: Path) -> None:
    before, after = load_model(old), load_model(folder)
    assert_same_model(before, after)
    assert after.model.config == before.model.config
    assert after.tokenizer.describe() == before.tokenizer.describe()
    assert (after.step, after.checkpoint) == (None, folder)
    assert not after.model.training


@pytest.mark.parametrize(
    "switches",
    [{}, {"mlp": "silu"}, {"mlp": "relu2"}, {"mlp_width": 40}, {"tie": False}, {"vocab_multiple": 1}],
    ids=str,
)
def test_transformers_computes_the_same(tmp_path: Path, switches: dict[str, Any]) -> None:
    trained = trained_of(dataclasses.replace(TINY, **switches), ByteTokenizer(), tmp_path)
    write_folder(trained, tmp_path / "out")
    theirs, loading = transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    tokens_BT = some_tokens(256, 16)
    with torch.no_grad():
        wanted, found = trained.model(tokens_BT)[..., :256], theirs.eval()(tokens_BT).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert theirs.generation_config.eos_token_id is None
    back = load_model(tmp_path / "out")
    if "vocab_multiple" not in switches:
        assert_same_model(trained, back)
    torch.testing.assert_close(back.model(tokens_BT)[..., :256], wanted, rtol=0, atol=0)


def made_by_transformers(path: Path, form: str, **settings: Any) -> Any:
    """A random GPT2LMHeadModel, saved in one of the forms that are about, with a byte tokenizer."""
    library = transformers()
    shape = {"vocab_size": 256, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = library.GPT2LMHeadModel(library.GPT2Config(**shape, **settings)).eval()
    randomize(model, seed=3)
    if form == "bfloat16":
        model.to(torch.bfloat16)
    if form in ("safetensors", "bfloat16"):
        model.save_pretrained(path)
    elif form == "parts":
        model.save_pretrained(path, max_shard_size="30KB")
    elif form == "without a head":
        model.transformer.save_pretrained(path)
    else:
        path.mkdir()
        model.config.save_pretrained(path)
        tensors = dict(model.state_dict())
        if form == "oldest bin":  # as GPT-2's own: no prefix, no head, masks, torch's first file format
            tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
            del tensors["lm_head.weight"]
            mask = torch.ones(16, 16, dtype=torch.uint8).tril().view(1, 1, 16, 16)
            tensors |= {f"h.{layer}.attn.bias": mask for layer in range(2)}
            tensors |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
        torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=form != "oldest bin")
    give_tokenizer(path, ByteTokenizer())
    return model.float()


def give_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer, 16)))


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("safetensors", {}),
        ("safetensors", {"tie_word_embeddings": False, "activation_function": "silu", "n_inner": 48}),
        ("bfloat16", {}),
        ("parts", {}),
        ("without a head", {}),
        ("bin", {"activation_function": "gelu_pytorch_tanh"}),
        ("oldest bin", {}),
    ],
    ids=str,
)
def test_what_transformers_writes_computes_the_same(tmp_path: Path, form: str, settings: dict[str, Any]) -> None:
    theirs = made_by_transformers(tmp_path / "made", form, **settings)
    assert (len(list((tmp_path / "made").glob("*.safetensors"))) > 2) == (form == "parts")
    ours = load_model(tmp_path / "made").model
    tokens_BT = some_tokens(256, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens_BT)[..., :256], theirs(tokens_BT).logits, rtol=0, atol=1e-4)
    done = called(hf_bridge.main, "import", str(tmp_path / "made"))
    assert done.returncode == 0 and "2 layers, 2 heads, 32 wide" in done.stdout
    assert ("bfloat16" in done.stdout) == (form == "bfloat16")


def test_the_shapes_of_all_four_gpt2s_are_understood(tmp_path: Path) -> None:
    for config in NAMED_SHAPES.values():
        if not config.switched():
            back = from_json(json.loads(json.dumps(to_json(config))), tmp_path)
            assert back == dataclasses.replace(config, eot_id=None)


# --- Export -----------------------------------------------------------------------------------------------------------


def test_the_card_tells_data_command_and_results(old: Path, folder: Path) -> None:
    card = (folder / "README.md").read_text()
    last = rows(old)[-1]
    assert "step 4 of the run `run`" in card
    assert json.loads((old / "config.json").read_text())["data"] in card
    assert "`text.txt`, sha256 `" in card and "- train: 18,000 tokens" in card
    assert f"{last['val_loss']:.4f} +- {last['val_loss_stderr']:.4f} | {last['val_bits_per_byte']:.4f} |" in card
    assert json.loads((old / "provenance.json").read_text())["commit"] in card
    assert os.uname().nodename not in card.replace("`run`", "")
    parameters = transformers().AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert f"{parameters:,} parameters" in card


def test_a_step_without_a_validation_has_none_in_its_card(old: Path, tmp_path: Path) -> None:
    assert called(hf_bridge.main, "export", f"{old}@2", "--out", str(tmp_path / "out")).returncode == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "step 2 of the run" in card and f"{rows(old)[-1]['val_loss']:.4f}" not in card


def refusal(*arguments: object) -> str:
    done = called(hf_bridge.main, *map(str, arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hf_bridge: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_export_takes_no_place_and_no_folder_of_theirs(old: Path, folder: Path, tmp_path: Path) -> None:
    before = sorted(old.parent.iterdir())
    assert f"{folder}: exists" in refusal("export", old, "--out", folder)
    assert "is a Hugging Face folder already" in refusal("export", folder, "--out", tmp_path / "out")
    assert "no checkpoint of step 3; there are 2, 4" in refusal("export", f"{old}@3", "--out", tmp_path / "out")
    assert "no folder with weights" in refusal("import", old)
    assert sorted(old.parent.iterdir()) == before and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        (
            {"position_embedding": "rope", "mlp": "swiglu", "bias": False},
            "no --model.position-embedding rope, --model.mlp swiglu, --model.bias False",
        ),
        ({"kind": "heads"}, "no --model.kind heads"),
    ],
    ids=str,
)
def test_what_no_class_of_theirs_fits_is_refused(
    tiny_data: Path, tmp_path: Path, switches: dict[str, Any], said: str
) -> None:
    config = configured(tiny_data, tmp_path / "run")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1))
    model = {"kind": "heads"} if "kind" in switches else dataclasses.asdict(config.model) | switches
    if "kind" in switches:
        model |= {"num_layers": 2, "num_heads": 2, "width": 32, "context_len": 32}
    run(dataclasses.replace(config, model=ModelConfig(**model)), ALONE)
    assert said in refusal("export", tmp_path / "run", "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_absent_safetensors_is_named(old: Path, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install -e '.[hf]'" in refusal("export", old, "--out", tmp_path / "out")
    assert "pip install -e '.[hf]'" in refusal("import", folder)
    assert list(tmp_path.iterdir()) == []


# --- Tokenizers -------------------------------------------------------------------------------------------------------

TEXTS = [text for text in NASTY if text.isprintable() or not any("\ud800" <= mark <= "\udfff" for mark in text)]


def own_pairs(shared_data: Path) -> BpeTokenizer:
    text = (shared_data / "tinystories_2mb.txt").read_text(encoding="utf-8")[:100_000]
    tokens = train_pairs([text], 1000).tokens
    return BpeTokenizer({token: rank for rank, token in enumerate(tokens)}, name="own")


def codec_named(name: str, shared_data: Path, texts: list[str]) -> Tokenizer:
    match name:
        case "own":
            return own_pairs(shared_data)
        case "small":
            return BpeTokenizer(small_ranks(), name="small")
    return make_tokenizer(name, "".join(sorted(alphabet_of("".join(texts)))))


@pytest.mark.parametrize("name", ["gpt2", "own", "small", "byte", "char"])
def test_ids_are_the_codecs_for_every_text(shared_data: Path, tmp_path: Path, name: str) -> None:
    """Text that reads <|endoftext|> too, and back to the same text; and we read the tokenizer as what it was."""
    texts = [text for text in TEXTS if len(text) < 20_000] + random_texts(1)
    texts += [(shared_data / file).read_text(encoding="utf-8")[:5_000] for file in SHARED_TEXTS]
    tokenizer = codec_named(name, shared_data, texts)
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id)
    write_folder(trained_of(config, tokenizer, tmp_path), tmp_path / "out")
    theirs = transformers().AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(theirs), theirs.eos_token_id) == (tokenizer.vocab_size, tokenizer.eot_id)
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, repr(text[:100])
        assert theirs.decode(ids) == text
    theirs.save_pretrained(tmp_path / "out")  # in their own hand
    back = read_tokenizer(tmp_path / "out").describe()
    assert back.pop("name", None) == {"gpt2": "gpt2", "own": "out", "small": "out"}.get(name)
    assert back.items() <= tokenizer.describe().items()
    if tokenizer.eot_id is not None:
        read_as_special = theirs("a<|endoftext|>b", split_special_tokens=False)["input_ids"]
        assert read_as_special == [*tokenizer.encode("a"), tokenizer.eot_id, *tokenizer.encode("b")]


def test_an_unknown_character_is_an_error_there_too(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    give_tokenizer(tmp_path, CharTokenizer("abc"))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("cab").ids == [2, 0, 1]
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        tokenizer.encode("cad")


def test_the_older_files_are_read(shared_data: Path, tmp_path: Path) -> None:
    """vocab.json and merges.txt, as GPT-2's own repository has them."""
    tokenizer = own_pairs(shared_data)
    model = tokenizer_json(tokenizer)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"], ""]), encoding="utf-8")
    assert read_tokenizer(tmp_path).describe() == tokenizer.describe() | {"name": tmp_path.name}
    model["merges"][100:102] = reversed(model["merges"][100:102])
    (tmp_path / "merges.txt").write_text("\n".join(model["merges"]), encoding="utf-8")
    with pytest.raises(InputError, match="another kind of tokenizer than GPT-2's, in its model"):
        read_tokenizer(tmp_path)


def broken(part: str, value: Any) -> dict[str, Any]:
    """A tokenizer.json of ours with one part changed."""
    content = json.loads(json.dumps(tokenizer_json(BpeTokenizer(small_ranks(), name="small"))))
    *way, last = part.split(".")
    place = content
    for name in way:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("normalizer", {"type": "NFC"}, "in its normalizer"),
        ("pre_tokenizer.add_prefix_space", True, "in its pre_tokenizer"),
        ("pre_tokenizer.use_regex", False, "in its pre_tokenizer"),
        ("pre_tokenizer", None, "in its pre_tokenizer"),
        ("added_tokens.0.content", "[PAD]", "in its special tokens"),
        ("added_tokens.0.id", 3, "in its special tokens"),
        ("model.vocab.<|endoftext|>", 3, "in its special tokens"),
        ("model.dropout", 0.1, "in its model"),
        ("model.ignore_merges", True, "in its model"),
        ("model.end_of_word_suffix", "</w>", "in its model"),
        ("model.merges", ["a b", "\u0120 a", "ab c"], "in its model"),
        ("model.merges", ["a b", "a bc", "\u0120 a"], "in its model"),
        ("model.vocab.ab", 999, "ranks are not 0 to 258"),
        ("model.vocab.ab", "256", "no whole numbers"),
        ("model.vocab.\u4e2d", 259, "stands for no bytes"),
        ("model.vocab", [], "no tokenizer of GPT-2's kind"),
        ("model.merges", [1], "no tokenizer of GPT-2's kind"),
        ("model", None, "no tokenizer of GPT-2's kind"),
        ("model.type", "WordLevel", "must be distinct characters"),
    ],
)
def test_another_tokenizer_is_refused_in_one_line(tmp_path: Path, part: str, value: Any, said: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(broken(part, value)))
    with pytest.raises(InputError, match=said) as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path / "tokenizer.json") in str(caught.value)


def test_ranks_that_are_no_merges_are_refused_unless_they_are_left_out(tmp_path: Path) -> None:
    ranks = small_ranks() | {b"xyz": 259}
    trained = trained_of(dataclasses.replace(TINY, vocab_size=261), BpeTokenizer(ranks, name="odd"), tmp_path)
    with pytest.raises(InputError, match=r"no two tokens of lower rank make b'xyz', rank 259.*--no-tokenizer"):
        write_folder(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    write_folder(trained, tmp_path / "out", with_tokenizer=False)
    assert transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 261
    with pytest.raises(InputError, match=r"has no tokenizer\.json, nor vocab\.json and merges\.txt"):
        open_folder(tmp_path / "out")


# --- What reads a folder ----------------------------------------------------------------------------------------------


def test_a_folder_speaks_as_the_run_does(old: Path, folder: Path) -> None:
    said = [called(generate.main, str(path), "--prompt", "a", "--max-tokens", "40").stdout for path in (old, folder)]
    assert said[0] == said[1] and len(said[0]) > 40


def further(data: Path, run_dir: Path, folder: Path, **train: Any) -> Config:
    config = configured(data, run_dir, from_checkpoint=str(folder))
    context = {"context_len": train.get("seq_len", 32)}
    model = dataclasses.replace(config.model, **context)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, **train))


def test_a_folder_is_trained_further(old: Path, folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    here = shutil.copytree(folder, tmp_path / "folder")
    config = further(tiny_data, tmp_path / "new", here, steps=2)
    run(config, ALONE)
    assert validations(tmp_path / "new")[0] == (0, *validations(old)[-1][1:])
    assert f"weights from {here}\n" in (tmp_path / "new" / "log.txt").read_text()
    assert json.loads((tmp_path / "new" / "config.json").read_text())["config"]["from_checkpoint"] == str(here)
    shutil.rmtree(here)  # what has begun does without it
    run(config, ALONE)
    assert "continuing from" in (tmp_path / "new" / "log.txt").read_text()
    assert called(hf_bridge.main, "export", str(tmp_path / "new"), "--out", str(here)).returncode == 0
    assert "Fine-tuned from the weights of `folder`" in (here / "README.md").read_text()
    done = called(generate.main, str(tmp_path / "gone"))
    assert done.returncode == 2 and "no such run directory or checkpoint" in done.stderr


def test_a_shorter_context_takes_the_first_positions(folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    run(further(tiny_data, tmp_path / "new", folder, steps=1, seq_len=8, micro_batch=12), ALONE)
    log = (tmp_path / "new" / "log.txt").read_text()
    assert f"weights from {folder}, without the last 24 of its 32 positions" in log
    whole, cut = load_model(folder).model, load_model(tmp_path / "new").model
    difference = whole.state_dict()["transformer.wpe.weight"][:8] - cut.state_dict()["transformer.wpe.weight"]
    assert difference.abs().max() < 0.01  # one step of warm-up away
    with pytest.raises(InputError, match=r"positions for 32 tokens; set --train\.seq-len 32 or less \(it is 64\)"):
        run(further(tiny_data, tmp_path / "long", folder, seq_len=64, micro_batch=3), ALONE)


def test_another_tokenizer_or_shape_is_not_trained_further(folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    tokenizer = read_tokenizer(folder)
    assert isinstance(tokenizer, CharTokenizer)
    give_tokenizer(other, CharTokenizer("".join(sorted({*tokenizer.itos[1:], "\u00e9"}))))
    with pytest.raises(InputError, match="does not fit this run: another tokenizer"):
        run(further(tiny_data, tmp_path / "new", other), ALONE)
    config = further(tiny_data, tmp_path / "new", folder)
    untied = dataclasses.replace(config, model=dataclasses.replace(config.model, tie=False, num_heads=4))
    with pytest.raises(InputError, match=r"num_heads 2 \(this run: 4\), tie True \(this run: False\)"):
        run(untied, ALONE)


def train_sharded(group: ProcessGroup, config: Config) -> None:
    run(dataclasses.replace(config, parallel=ParallelConfig(mode="fsdp")), group)


def test_sharded_ranks_are_exported_here_and_trained_further(tiny_data: Path, tmp_path: Path) -> None:
    """FSDP2 in two processes -> a folder, without them -> FSDP2 in two processes."""
    run_on_ranks(2, train_sharded, configured(tiny_data, tmp_path / "run"))
    write_folder(load_model(tmp_path / "run"), tmp_path / "out")
    assert_same_model(load_model(tmp_path / "run"), load_model(tmp_path / "out"))
    run_on_ranks(2, train_sharded, further(tiny_data, tmp_path / "new", tmp_path / "out", steps=1))
    assert validations(tmp_path / "new")[0] == (0, *validations(tmp_path / "run")[-1][1:])


def test_the_preset_wants_a_folder(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = called(trainer.main, "finetune", "--data.dir", str(tiny_data), "--dry-run")
    assert done.returncode == 2 and f"{tmp_path / 'gpt2'}: no such run directory" in done.stderr
