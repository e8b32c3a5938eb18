"""Memory that a step frees stays with the process: the next step finds it without page faults."""

import multiprocessing
import resource

import torch

from train.processes.host_memory import keep_freed_memory


def page_faults() -> int:
    """Return the page faults of making and freeing a tensor of 8 MB ten times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def count_faults() -> tuple[int, int]:
    """Return them before and afterwards, the first time not counted."""
    given_back = page_faults()
    keep_freed_memory()
    page_faults()
    return given_back, page_faults()


def test_freed_memory_is_used_again_without_page_faults() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # the setting stays with its process
        given_back, kept = pool.apply(count_faults)
    assert kept < 100 and given_back > 10 * kept + 1000
