"""The printed text of training sequences against the sequences that training reads."""

import shutil
from pathlib import Path

import pytest

from data_prep.manifest import open_split
from data_prep.textfiles import Options, prepare
from data_prep.tokenizer import BpeTokenizer
from data_prep.verify import main
from tests.helpers.runs import called
from train.data import TrainingSequences

TEXT = "".join(f"line {number} of the caf\u00e9.\n" for number in range(60))
EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TEXT as bytes, in shards of 100; the last tenth is val."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    prepare(Options((str(folder / "text.txt"),), folder / "data", "byte", shard_tokens=100))
    return folder / "data"


def test_every_sequence_is_the_one_that_training_reads(plain: Path) -> None:
    seq_len = 48
    sequences = TrainingSequences(open_split(plain, "train"), seq_len, seed=1)
    inputs_BT, targets_BT = sequences.read(list(range(sequences.count)))
    expected = ""
    for number, (inputs_T, targets_T) in enumerate(zip(inputs_BT.tolist(), targets_BT.tolist(), strict=True)):
        shard, offset = divmod(number * seq_len, 100)
        text = bytes([*inputs_T, targets_T[-1]]).decode(errors="replace")
        expected += f"sequence {number}: {plain}/train_{shard:06d}.bin from token {offset}, {number == 0:d} documents "
        expected += f"begin in it\n{text}\n"
    numbers = map(str, range(sequences.count))
    done = called(main, str(plain), "--sequence", *numbers, "--seq-len", str(seq_len))
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


def test_documents_and_their_ends_are_seen_across_shards(tmp_path: Path) -> None:
    """Ten documents of 20 letters make 21 tokens each with EOT. Sequence 1 at 40 is tokens 40 to 80."""
    BpeTokenizer({bytes([byte]): byte for byte in range(256)}, name="bytes").save(tmp_path)
    (tmp_path / "text.txt").write_text("|".join(chr(ord("a") + number) * 20 for number in range(10)))
    data, source, tokenizer = tmp_path / "data", str(tmp_path / "text.txt"), str(tmp_path / "tokenizer")
    prepare(Options((source,), data, tokenizer, split_documents_on="|", shard_tokens=50, val_fraction=0.1))
    done = called(main, str(data), "--sequence", "1", "--seq-len", "40")
    assert done.stdout.splitlines() == [
        f"sequence 1: {data / 'train_000000.bin'} from token 40, 2 documents begin in it",
        f"bb{EOT}{'c' * 20}{EOT}{'d' * 17}",
    ]
    validation = called(main, str(data), "--sequence", "0", "--seq-len", "20", "--split", "val")
    assert validation.stdout.splitlines()[1] == EOT + "j" * 20


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            "--sequence 30 4 -1 --seq-len 64",
            "--sequence 30 -1: train has 18 sequences of --seq-len 64, numbered from 0",
        ),
        ("--sequence 1", "--sequence 1: train has 1 sequences of --seq-len 1024, numbered from 0"),
        ("--sequence 0 --seq-len 5000", "train has 0 sequences of --seq-len 5000"),
        ("--sequence 0 --seq-len 0", "--seq-len 0 must be at least 1"),
        ("--sequence 0 --split test", "has no split 'test', only train, val"),
        ("--sequence 0 --adopt", "--adopt and --sequence cannot be combined"),
        ("--window 0", "--window is now called --sequence"),
    ],
)
def test_an_impossible_request_is_refused_in_one_line(plain: Path, flags: str, line: str) -> None:
    done = called(main, str(plain), *flags.split())
    assert done.returncode == 2 and done.stdout == ""
    assert line in done.stderr and done.stderr.count("\n") == 1


def test_an_id_that_the_tokenizer_does_not_have_is_named(plain: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(plain, tmp_path / "data"))
    with (data / "train_000001.bin").open("r+b") as file:
        file.seek(1024 + 2 * 5)
        file.write(b"\x00\x01")
    done = called(main, str(data), "--sequence", "1", "--seq-len", "100")
    assert (
        done.returncode == 2 and "train_000001.bin: token 5 is id 256, outside the vocabulary of 256; " in done.stderr
    )


def test_flags_without_effect_are_told(plain: Path) -> None:
    done = called(main, str(plain), "--seq-len", "64", "--split", "val", "--tokenizer", "gpt2")
    assert done.stderr.splitlines() == [
        "verify: warning: --tokenizer has no effect without --adopt",
        "verify: warning: --seq-len has no effect without --sequence",
        "verify: warning: --split has no effect without --sequence",
    ]
    shown = called(main, str(plain), "--sequence", "0", "--seq-len", "8", "--samples", "3")
    assert shown.stderr == "verify: warning: --samples has no effect with --sequence\n"
