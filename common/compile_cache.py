"""Where torch.compile keeps what it has compiled: a folder of this user on this host, which restarts use again."""

import os
import stat
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from common.errors import InputError, writing_to

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # Triton's cache is a folder in it


def take_compile_cache(environ: MutableMapping[str, str] = os.environ) -> None:
    """Make torch use `gpt-ladder-compiled-UID` in the folder for temporary files, or what VARIABLE names.

    Call this before anything loads Inductor, as torch.use_deterministic_algorithms does: it then sets VARIABLE itself.

    torch runs the code in its cache and unpickles its entries. So the cache is not in the run directory, which others
    may be able to write: nothing there is ever executed. It is not on a shared disk either, since torch's temporary
    names are unique on one host only; a restart on another node compiles again. Raise InputError if somebody else can
    write the folder.
    """
    if environ.get(VARIABLE):
        return
    folder = Path(tempfile.gettempdir()) / f"gpt-ladder-compiled-{os.getuid()}"
    with writing_to(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise InputError(
            f"{folder}: another user can write it or has made it, and torch runs the code in it; set {VARIABLE} to a "
            "folder of yours"
        )
    environ[VARIABLE] = str(folder)
