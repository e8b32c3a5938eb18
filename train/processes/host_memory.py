"""Keeps the memory that a step on a CPU frees, for the next step.

glibc gives freed memory back to the system, and each step then takes it again page by page. A compiled step of
shakespeare-char-cpu had 1,800 page faults, a fifth of its time.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 2**30


def keep_freed_memory() -> None:
    """Let malloc keep up to KEPT_BYTES of what this process frees; do nothing where the C library is not glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for setting in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(setting, KEPT_BYTES)
