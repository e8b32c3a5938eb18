"""Named corpora for `textfiles.py NAME`: where their files are, what they must hash to, how they are read.

Sources of the hashes: Tiny Shakespeare's is of the file itself. The others are as several public repositories give
them, one quoting the Hub's Git LFS ids; none of these files was downloaded to check (of OpenWebText's 80 files only the
first one's hash is known here, so only that is fetched).
"""

from dataclasses import dataclass

CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
OPENWEBTEXT = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/79d93d786212f7344586290adb811d4ae6a1762c"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINYSTORIES_TRAIN_SHA256 = "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"
TINYSTORIES_VALID_SHA256 = "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"
OPENWEBTEXT_FIRST_SHA256 = "caed9f4b7053d7cd4d1a13ce9ec9224d84a3bba1f11579193562a7e31ebe656e"


@dataclass(frozen=True)
class RemoteFile:
    """A file at a pinned revision. sha256 is None where it is not known: then it is never downloaded."""

    url: str
    sha256: str | None
    num_bytes: int | None = None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class Corpus:
    """val: files that are the validation split; without them it is the last `val_fraction` of the text."""

    train: tuple[RemoteFile, ...]
    val: tuple[RemoteFile, ...] = ()
    tokenizer: str = "gpt2"
    val_fraction: float = 0.1
    split_documents_on: str | None = None


def _openwebtext(numbers: range) -> tuple[RemoteFile, ...]:
    urls = [f"{OPENWEBTEXT}/plain_text/train-{number:05d}-of-00080.parquet" for number in numbers]
    first = RemoteFile(urls[0], OPENWEBTEXT_FIRST_SHA256, 302_848_326)
    return (first, *(RemoteFile(url, None) for url in urls[1:]))


CORPORA = {
    "tinyshakespeare": Corpus(
        (RemoteFile(f"{CHAR_RNN}/data/tinyshakespeare/input.txt", TINYSHAKESPEARE_SHA256, 1_115_394),),
        tokenizer="char",
    ),
    "tinystories": Corpus(
        (RemoteFile(f"{TINYSTORIES}/TinyStoriesV2-GPT4-train.txt", TINYSTORIES_TRAIN_SHA256, 2_227_753_162),),
        (RemoteFile(f"{TINYSTORIES}/TinyStoriesV2-GPT4-valid.txt", TINYSTORIES_VALID_SHA256, 22_502_601),),
        split_documents_on="<|endoftext|>",
    ),
    # nanoGPT keeps 0.0005 of OpenWebText for validation (data/openwebtext/prepare.py).
    "openwebtext": Corpus(train=_openwebtext(range(80)), val_fraction=0.0005),
    "openwebtext-1of80": Corpus(train=_openwebtext(range(1)), val_fraction=0.005),
}
