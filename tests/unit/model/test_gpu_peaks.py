"""GPU peaks: recomputed from units x clock, consistent between formats, and matched by whole names."""

import pytest

from model.costs.gpu_peaks import BANDWIDTHS, PEAKS, DType, peak_flops

DTYPES: tuple[DType, ...] = ("bf16", "fp16", "tf32", "fp32")

# Units (SMs or CUs), the clock in MHz for which the maker states the figure, and a unit's 16-bit operations per clock
# with fp32 accumulation, which is 2 x the multiply-adds of its tensor cores. These come from other tables of the same
# white papers. A figure with sparsity, or with fp16 accumulation, would be off by a factor of 2.
UNITS = {
    "Tesla V100-SXM2-16GB": (80, 1530, 1024),
    "Tesla V100-PCIE-32GB": (80, 1380, 1024),
    "Tesla V100S-PCIE-32GB": (80, 1597, 1024),
    "Tesla T4": (40, 1590, 1024),
    "NVIDIA A100-SXM4-40GB": (108, 1410, 2048),
    "NVIDIA A30": (56, 1440, 2048),
    "NVIDIA A40": (84, 1740, 1024),
    "NVIDIA A10": (72, 1695, 1024),
    "NVIDIA A10G": (80, 1710, 512),
    "NVIDIA RTX A6000": (84, 1800, 1024),
    "NVIDIA GeForce RTX 3090": (82, 1695, 512),
    "NVIDIA GeForce RTX 3090 Ti": (84, 1860, 512),
    "NVIDIA GeForce RTX 4080": (76, 2505, 512),
    "NVIDIA GeForce RTX 4090": (128, 2520, 512),
    "NVIDIA RTX 6000 Ada Generation": (142, 2505, 1024),
    "NVIDIA L4": (58, 2040, 1024),
    "NVIDIA L40": (142, 2490, 512),
    "NVIDIA L40S": (142, 2520, 1024),
    "NVIDIA H100 80GB HBM3": (132, 1830, 4096),
    "NVIDIA H100 PCIe": (114, 1620, 4096),
    "NVIDIA GeForce RTX 5080": (84, 2617, 512),
    "NVIDIA GeForce RTX 5090": (170, 2407, 512),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (188, 2617, 1024),
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": (188, 2280, 1024),
    "AMD Instinct MI210": (104, 1700, 1024),
    "AMD Instinct MI250X": (110, 1700, 1024),
    "AMD Instinct MI300A": (228, 2100, 2048),
    "AMD Instinct MI300X": (304, 2100, 2048),
    "AMD Instinct MI350X": (256, 2200, 4096),
    "AMD Instinct MI355X": (256, 2400, 4096),
}


# Width of the memory's interface in bits, and 10^9 bits per second on each of its lines.
MEMORIES = {
    "NVIDIA GeForce RTX 4090": (384, 21),
    "NVIDIA GeForce RTX 5090": (512, 28),
    "NVIDIA L4": (192, 12.5),
    "NVIDIA L40S": (384, 18),
    "NVIDIA A100-SXM4-40GB": (5 * 1024, 2.43),
    "NVIDIA A100-SXM4-80GB": (5 * 1024, 3.186),
    "NVIDIA H100 80GB HBM3": (5 * 1024, 5.234),
    "NVIDIA H200": (6 * 1024, 6.25),
    "NVIDIA B200": (8 * 1024, 7.5),
    "AMD Instinct MI300X": (8 * 1024, 5.2),
}


def test_a_bandwidth_is_lines_times_their_rate() -> None:
    assert set(MEMORIES) == set(BANDWIDTHS) <= set(PEAKS)
    for name, (lines, gigabits) in MEMORIES.items():
        bandwidth, source = BANDWIDTHS[name]
        assert bandwidth == pytest.approx(lines * gigabits * 1e9 / 8, rel=0.006), name
        assert ", 20" in source and source.split()[0] == name.split()[0]


def test_a_peak_is_units_times_clock_times_operations() -> None:
    for name, (units, megahertz, operations) in UNITS.items():
        assert peak_flops(name, "fp16") == pytest.approx(units * megahertz * 1e6 * operations, rel=0.015), name


def test_the_formats_of_a_gpu_fit_together_and_have_a_source() -> None:
    for name, peak in PEAKS.items():
        assert peak.fp16 is not None, name
        assert peak.bf16 in (None, peak.fp16), name
        if peak.tf32 is not None:  # half the rate at twice the width, rounded in datasheets
            assert peak.tf32 == pytest.approx(peak.fp16 / 2, rel=0.025), name
        assert ", 20" in peak.source and peak.source.split()[0] == ("AMD" if name.startswith("AMD") else "NVIDIA")


def test_a_name_that_is_not_listed_has_no_peak() -> None:
    for name in (
        "",
        "cpu",
        "NVIDIA H100",
        "nvidia h200",
        "NVIDIA H200 ",
        "NVIDIA GeForce RTX 3080",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "AMD Instinct MI250X/MI250",
    ):
        assert [peak_flops(name, dtype) for dtype in DTYPES] == [None] * 4
