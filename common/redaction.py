"""Recognise secrets by a file's name or by their form, and remove them from commands and texts that are recorded.

The names are those of files in which programs keep credentials, as their manuals say. The forms of tokens are those
that the services document: GitHub (docs.github.com, "GitHub's token formats"), Hugging Face (hf_...), AWS (IAM
identifiers), Google Cloud, Slack, OpenAI, Anthropic, GitLab, PyPI, npm, Stripe and Weights & Biases; private keys are
RFC 7468's and OpenSSH's blocks. A value that is assigned to a name like API_KEY or --password counts too. The scanners
detect-secrets and gitleaks look for the same kinds; neither can be imported where launch/snapshot.py runs.

No list is complete. A secret of a form that nothing here knows is kept, so run directories also follow the umask.
"""

from __future__ import annotations  # launch/snapshot.py runs on Python 3.9

import fnmatch
import re
from collections.abc import Sequence
from pathlib import PurePath

MARK = "[redacted]"
# git's arguments for the form of diff that `redacted_diff` reads, whatever a person has configured.
DIFF = ("diff", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/", "HEAD")
SECRET_NAMES = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".my.cnf", ".htpasswd", ".git-credentials"),
    *(".npmrc", ".pypirc", ".dockercfg", ".docker/config.json", ".kube/config", "kubeconfig", "*.kubeconfig"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12", "*.pfx", "*.ppk", "*.jks"),
    *("*.keystore", "*.kdbx", "*.ovpn", "*.asc", "*.gpg", ".aws/*", ".ssh/*", ".gnupg/*", "gcloud/*", ".azure/*"),
    *(".s3cfg", ".boto", "rclone.conf", "credentials", "credentials.*", "client_secret*.json", "service*account*.json"),
    *("application_default_credentials.json", "secret.*", "secrets.*", "*.secret", "*.secrets", "*.token", "*.tfvars"),
    *("*.tfstate", ".vault-token", "huggingface/token", ".huggingface/token", "stored_tokens", "kaggle.json"),
    *(".bash_history", ".zsh_history", ".python_history", ".munge.key", "wandb/settings"),
)
HARMLESS_NAMES = ("*.example", "*.sample", "*.template", "*.dist", "*.pub", "secrets.py", "secret.py")

KEY_BLOCK = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:(?!-----BEGIN )[\s\S]){0,20000}?"
    r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\Z)|PuTTY-User-Key-File-[0-9]:[\s\S]{0,20000}"
)
TOKENS = re.compile(
    r"\b(?:gh[oprsu]_[A-Za-z0-9]{30,255}|github_pat_\w{22,255}|glpat-[\w-]{20,255}"
    r"|hf_[A-Za-z0-9]{30,255}|api_org_[A-Za-z0-9]{30,255}|wandb_v[0-9]_\w{20,255}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35}|ya29\.[\w-]{20,500}|xox[abeoprs]-[\w-]{10,255}|xapp-[\w-]{10,255}"
    r"|sk-(?=[\w-]*[0-9])[\w-]{20,255}|[rs]k_(?:live|test)_[A-Za-z0-9]{16,255}"
    r"|pypi-[\w-]{50,500}|npm_[A-Za-z0-9]{36}|AGE-SECRET-KEY-1[0-9A-Z]{50,100}"
    r"|eyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{0,1000})"
)
# One of these is in every text in which TOKENS finds something: looking for them is far faster.
TOKEN_MARKS = (
    *("gho_", "ghp_", "ghr_", "ghs_", "ghu_", "github_pat_", "glpat-", "hf_", "api_org_", "wandb_v", "AKIA", "ASIA"),
    *("AIza", "ya29.", "xox", "xapp-", "sk-", "k_live_", "k_test_", "pypi-", "npm_", "AGE-SECRET-KEY-1", "eyJ"),
)
IN_CONTEXT = tuple(
    (mark, re.compile(pattern, re.IGNORECASE))
    for mark, pattern in (
        ("://", r"(?<=://)(?P<name>[^\s/:@'\"]{0,100}:)(?P<value>[^\s/@'\"${<]{3,200})(?=@)"),
        ("://", r"(?<=://)(?P<value>[\w-]{20,200})(?=@)"),
        ("bearer", r"(?P<name>\bBearer\s+)(?P<value>(?=[^\s'\"]{0,100}[0-9])[\w.~+/=-]{16,2000})"),
        ("basic", r"(?P<name>\bBasic\s+)(?P<value>(?=[^\s'\"]{0,100}[0-9])[\w.~+/=-]{16,2000})"),
        ("login", r"(?P<name>\blogin\s+\S{1,100}\s+password\s+)(?P<value>[^\s<$]{3,200})"),
        ("wandb", r"(?P<name>\bwandb[ .]login\b[^\n]{0,60}?)(?P<value>\b(?:local-)?[0-9a-f]{40}\b)"),
        ("accountkey", r"(?P<name>\bAccountKey=)(?P<value>[\w+/=]{40,200})"),
    )
)
KEYWORD = (
    r"(?:token|secret[_-]?(?:access[_-]?)?key|secret|passw(?:or)?d|passphrase|pwd|api[_-]?key|access[_-]?key(?:[_-]?id)?"
    r"|private[_-]?key|auth[_-]?key|encryption[_-]?key|credentials?)"
)
ASSIGNMENT = re.compile(
    rf"(?=[acepst])(?P<key>{KEYWORD})(?P<sign>[\"']?[ \t]{{0,3}}(?:=>|:=|=|:)[ \t]{{0,3}}|[ \t]{{1,3}})"
    r"(?:(?P<quote>[\"'])(?P<quoted>[^\"'\n]{1,500})(?P=quote)|(?P<bare>[^\s\"'`,;<>(){}\[\]|&\\]{3,500}))(?P<next>.?)",
    re.IGNORECASE,
)
FLAG_OR_NAME = re.compile(rf"-{{0,2}}[\w.-]{{0,60}}?{KEYWORD}", re.IGNORECASE)
PREFIX = re.compile(r"[\w.-]{0,40}\Z")
# Words of language models and parsers, whose "token" is no secret.
OTHER_TOKENS = re.compile(r"(?:eot|eos|bos|pad|unk|mask|sep|cls|end|first|last|next|special|stop|start)[_-]?\Z", re.I)
PLACEHOLDER = re.compile(r"[$%<{\[(]|your|[x*._-]+\Z|(?:none|null|true|false|str|int|bytes|bool)\Z", re.I)
CONSTANT = re.compile(r"[A-Z][A-Z0-9]*_[A-Z0-9_]*")
PASSWORDS = ("pass", "pwd", "secret")


def secret_by_name(name: str) -> bool:
    """Return whether a file with this path is known to hold credentials, whatever its content."""
    path = name.lower()
    last = PurePath(path).name
    if any(fnmatch.fnmatchcase(last, pattern) for pattern in HARMLESS_NAMES):
        return False
    return any(
        fnmatch.fnmatchcase(f"/{path}", f"*/{pattern}") if "/" in pattern else fnmatch.fnmatchcase(last, pattern)
        for pattern in SECRET_NAMES
    )


def why_secret(name: str, content: bytes) -> str | None:
    """Return why a file must not be copied: its name or its content is that of a secret. None: it may be."""
    if secret_by_name(name):
        return "its name is that of a file with credentials"
    if b"\0" in content[:8192]:
        return None  # no text
    text = content.decode("utf-8", errors="replace")
    return "it holds a key, a token or a password" if redacted(text) != text else None


def redacted(text: str) -> str:
    """Return a text with what looks like a secret replaced by [redacted]."""
    text = KEY_BLOCK.sub(MARK, text)
    if any(mark in text for mark in TOKEN_MARKS):
        text = TOKENS.sub(MARK, text)
    lower = text.lower()
    for mark, pattern in IN_CONTEXT:
        if mark in lower:
            text = pattern.sub(lambda match: match[0].replace(match["value"], MARK), text)
    return ASSIGNMENT.sub(_assignment, text)


def redacted_words(words: Sequence[str]) -> list[str]:
    """Return a command's words without secrets. What a flag or a name for secrets is given is one, whatever it is."""
    result: list[str] = []
    follows_flag = False
    for word in words:
        name, equals, value = word.partition("=")
        is_name = FLAG_OR_NAME.fullmatch(name) is not None and not _is_other_token(name)
        if follows_flag and not word.startswith("--"):
            result.append(MARK)
        elif is_name and equals and value:
            result.append(f"{name}={MARK}")
        else:
            result.append(redacted(word))
        follows_flag = is_name and not equals and word.startswith("-")
    return result


def redacted_diff(diff: str) -> str:
    """Return the output of `git DIFF` without secrets. Of a file that is a secret by its name only the header stays."""
    head, *sections = re.split(r"^(?=diff --git )", diff, flags=re.MULTILINE)
    kept = [redacted(head)]
    for section in sections:
        header = section.partition("\n")[0]
        is_secret = secret_by_name(re.split('[ "]b/', header)[-1].rstrip('"'))
        kept.append(f"{header}\n{MARK}\n" if is_secret else redacted(section))
    return "".join(kept)


def _is_other_token(name: str) -> bool:
    return name.lower().endswith("token") and OTHER_TOKENS.search(name[: -len("token")]) is not None


def _assignment(match: re.Match[str]) -> str:
    """Return a matched assignment, with [redacted] for its value if that looks like a secret."""
    prefix = PREFIX.search(match.string, max(0, match.start() - 40), match.start())
    name = (prefix[0] if prefix else "") + match["key"]
    value = match["quoted"] or match["bare"]
    if PLACEHOLDER.match(value) or _is_other_token(name):
        return match[0]
    is_flag, sign = name.startswith("-"), match["sign"]
    if not sign.strip() and not is_flag:
        return match[0]  # words one after the other
    is_random = bool(re.search("[0-9]", value) and re.search("[A-Za-z]", value)) and len(value) >= 6
    if match["quoted"]:
        is_password = any(word in match["key"].lower() for word in PASSWORDS) and len(value) >= 4
        is_secret = " " not in value and "{" not in value and (is_random or is_password or len(value) >= 16)
    elif sign == "=" and name.upper() == name and match["next"] not in ("(", "[", "{"):
        is_secret = len(value) >= 4 and not value.isdigit()  # as a shell sets a variable
    else:
        is_secret = is_random and match["next"] not in ("(", "[", "{") and not CONSTANT.fullmatch(value)
    if not is_secret:
        return match[0]
    start = match.start("quoted") if match["quoted"] else match.start("bare")
    return match[0][: start - match.start()] + MARK + match[0][start - match.start() + len(value) :]
