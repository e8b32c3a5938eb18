"""Names of runs that a shell, Slurm, W&B or matplotlib may take for something else, and names that are refused."""

import os
import string

PRINTABLE = "".join(c for c in string.punctuation if c != "/")
# Fewer than 255 bytes: a flag, blanks at both ends, every printable character of ASCII, words that a shell would run.
ODD = f" --name {PRINTABLE}{string.digits}{string.ascii_letters} $(touch pwned) `touch pwned` $1$2 \u00e9\u540d "
ODD_FOR_SUBMIT = ODD.replace("%", "").replace("\\", "")  # which Slurm replaces in the names of logs
LONG = "n" * 255  # bytes, as long as a name may be
REFUSED = ("two\nlines", "a\ttab", "\x1b[31mred", "nothing\u200b", os.fsdecode(b"not UTF-8 \xff"))
