"""A secret of every kind, put together here, so that no file of this repository holds one."""

LETTERS = "aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0zAbCdEfGhI"
HEX = "0123456789abcdef0123456789abcdef01234567"
DASHES = "-" * 5
BODY = f"MIIEvQIBADANBgkqh{LETTERS}\n{LETTERS}{LETTERS}\n"


def block(kind: str) -> str:
    return f"{DASHES}BEGIN {kind}{DASHES}\n{BODY}{DASHES}END {kind}{DASHES}"


SECRETS = {
    "hub": "hf_" + LETTERS[:34],
    "github": "ghp_" + LETTERS[:36],
    "github fine": "github_pat_" + LETTERS[:22] + "_" + LETTERS,
    "gitlab": "glpat-" + LETTERS[:20],
    "aws key": "AKIA" + "IOSFODNN7EXAMPLE",
    "aws secret": LETTERS[:12] + "/+" + LETTERS[14:40],
    "wandb": HEX,
    "wandb login": HEX[::-1],
    "wandb new": "wandb_v1_" + LETTERS,
    "slack": "xoxb-" + "123456789012-" + LETTERS[:24],
    "google": "AIza" + LETTERS[:35],
    "openai": "sk-proj-" + LETTERS,
    "pypi": "pypi-" + "AgEIcHlwaS5vcmc" + LETTERS,
    "npm": "npm_" + LETTERS[:36],
    "stripe": "sk_live_" + LETTERS[:24],
    "jwt": "eyJ" + "hbGciOiJIUzI1NiJ9." + "eyJ" + "zdWIiOiIxMjM0In0." + LETTERS,
    "url": "hunter2swordfish",
    "bearer": LETTERS[::-1],
    "netrc": "opensesame1",
    "password": "{}fish".format("sword"),
    "quoted": "correcthorsebatterystaple",
    "json": LETTERS[5:30],
    "flag": "abcdef123456",
    "yaml": "tr0ub4dor",
    "rsa key": BODY.split("\n")[0],
    "openssh key": LETTERS + LETTERS,
    "pgp key": LETTERS + LETTERS,
    "unfinished key": LETTERS + LETTERS,
}
TEXTS = {
    "hub": f"login({SECRETS['hub']})",
    "github": f"remote {SECRETS['github']} of mine",
    "github fine": f"x = '{SECRETS['github fine']}'",
    "gitlab": SECRETS["gitlab"],
    "aws key": f"aws_access_key_id = {SECRETS['aws key']}",
    "aws secret": f"aws_secret_access_key = {SECRETS['aws secret']}",
    "wandb": f"export WANDB_API_KEY={SECRETS['wandb']}",
    "wandb login": f"wandb login --relogin {SECRETS['wandb login']}",
    "wandb new": SECRETS["wandb new"],
    "slack": SECRETS["slack"],
    "google": SECRETS["google"],
    "openai": SECRETS["openai"],
    "pypi": SECRETS["pypi"],
    "npm": SECRETS["npm"],
    "stripe": SECRETS["stripe"],
    "jwt": SECRETS["jwt"],
    "url": f"https://me:{SECRETS['url']}@example.org/x.git",
    "bearer": f"Authorization: Bearer {SECRETS['bearer']}",
    "netrc": f"machine api.wandb.ai login user {'password'} {SECRETS['netrc']}",
    "password": f'password = "{SECRETS["password"]}"',
    "quoted": f"MY_TOKEN = '{SECRETS['quoted']}'",
    "json": f'{{"client_secret": "{SECRETS["json"]}"}}',
    "flag": f"run.sh --api-key {SECRETS['flag']} --x 1",
    "yaml": f"db_password: {SECRETS['yaml']}",
    "rsa key": block("RSA PRIVATE KEY"),
    "openssh key": block("OPENSSH PRIVATE KEY"),
    "pgp key": block("PGP PRIVATE KEY BLOCK"),
    "unfinished key": f"{DASHES}BEGIN EC PRIVATE KEY{DASHES}\n{BODY}",
}
