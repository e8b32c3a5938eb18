"""Secrets are recognised by name and form, and this repository's own text is none."""

import subprocess
import time
from pathlib import Path

import pytest

from common.redaction import MARK, redacted, redacted_diff, redacted_words, secret_by_name, why_secret
from tests.helpers.secrets_planted import DASHES, SECRETS, TEXTS

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("kind", TEXTS)
def test_a_secret_of_every_kind_is_found_in_a_text_and_the_rest_stays(kind: str) -> None:
    text = f"before = 1\n{TEXTS[kind]}\nafter = 2\n"
    without = redacted(text)
    assert SECRETS[kind] not in without and MARK in without
    assert without.startswith("before = 1\n") and (without.endswith("\nafter = 2\n") or kind == "unfinished key")
    assert why_secret("notes.txt", text.encode()) is not None
    assert redacted(without) == without


@pytest.mark.parametrize(
    "text",
    [
        "tokens = read_tokens(path)",
        'eos_token="<|endoftext|>", pad_token: "<|pad_token_1|>"',
        "token: str",
        "self.token = next_token(1)",
        "HF_TOKEN=$HF_TOKEN python train.py",
        "export WANDB_API_KEY=<your key>",
        'api_key = os.environ["API_KEY"]',
        "HF_TOKEN: ${{ secrets.HF_TOKEN }}",
        "--train.batch-tokens 524288 --tokens all --token TOKEN",
        "commit 0123456789abcdef0123456789abcdef01234567",
        'sha256 = "' + "0123456789abcdef" * 4 + '"',
        "https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards",
        "ssh://git@github.com/someone/something",
        "password: str = getpass()",
        "the token 12345 is followed by the secret of 3 words",
        "bytes_per_token = GPT2_BYTES_PER_TOKEN if x else 4.4",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text
    assert redacted_words(text.split(" ")) == text.split(" ") or "TOKEN" in text or "API_KEY" in text or "pass" in text


def test_no_file_of_this_repository_is_a_secret() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    names = [name.decode() for name in listed if name and (ROOT / name.decode()).is_file()]
    assert {name: why for name in names if (why := why_secret(name, (ROOT / name).read_bytes())) is not None} == {}


@pytest.mark.parametrize(
    "name",
    [
        *(".env", "sub/.env", ".env.local", "prod.env", ".netrc", "home/_netrc", ".pgpass", ".npmrc", ".pypirc"),
        *("id_rsa", "keys/id_ed25519", "server.pem", "TLS.KEY", "x.p12", ".aws/credentials", "a/.aws/config"),
        *("credentials.json", "secrets.yaml", ".git-credentials", ".docker/config.json", ".kube/config"),
        *("service-account.json", "client_secret_12.json", ".huggingface/token", "kaggle.json", "main.tfvars"),
    ],
)
def test_files_with_credentials_are_known_by_name(name: str) -> None:
    assert secret_by_name(name)


@pytest.mark.parametrize(
    "name", [".env.example", "train/env.py", "keyboard.py", "tokenizer.json", "id_rsa.pub", "secrets.py", "config.json"]
)
def test_other_files_are_not(name: str) -> None:
    assert not secret_by_name(name)


def test_a_command_loses_what_its_flags_for_secrets_are_given() -> None:
    words = [
        "main.py",
        "--api-key",
        "abc",
        "--run-dir",
        "runs/a",
        "--hub_token=def",
        "HF_TOKEN=ghi",
        "--password",
        "--x",
    ]
    kept = ["main.py", "--api-key", MARK, "--run-dir", "runs/a", f"--hub_token={MARK}", f"HF_TOKEN={MARK}"]
    assert redacted_words(words) == [*kept, "--password", "--x"]
    assert redacted_words(["--train.eot-token", "50256", "--train.batch-tokens", "512"])[1::2] == ["50256", "512"]


def test_a_diff_loses_secrets_whether_they_are_added_or_removed() -> None:
    section = "diff --git a/{0} b/{0}\n--- a/{0}\n+++ b/{0}\n@@ -1 +1 @@\n"
    lines = f"-{TEXTS['github']}\n+{TEXTS['aws key']}\n+plain = 1\n"
    diff = section.format("notes.txt") + lines + section.format("conf/.netrc") + "+machine x\n+swordfish\n"
    diff += 'diff --git "a/\\303\\244/.env" "b/\\303\\244/.env"\n+swordfish\n'
    diff += section.format("run.py") + "+".join(["", *TEXTS["unfinished key"].splitlines(keepends=True)])
    without = redacted_diff(diff)
    assert not any(secret in without for secret in (*SECRETS.values(), "swordfish", "machine x"))
    assert "+plain = 1\n" in without and "diff --git a/conf/.netrc" in without and "diff --git a/run.py" in without


@pytest.mark.parametrize(
    "part", ["token", "a", f"{DASHES}BEGIN PRIVATE KEY{DASHES}", "https://", "eyJa.", "secret=", "- ", "AKIA"]
)
def test_a_long_text_takes_linear_time(part: str) -> None:
    text = part * (1_000_000 // len(part))
    begin = time.process_time()
    redacted(text)
    redacted_diff(text)
    assert time.process_time() - begin < 10
