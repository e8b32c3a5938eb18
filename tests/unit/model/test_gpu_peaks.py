"""GPU peaks: exact names, exact figures, and the figures again from units x clock."""

import pytest

from model.costs.gpu_peaks import PEAKS, DType, peak_flops

TERA = 1e12


@pytest.mark.parametrize(
    ("name", "bf16", "fp16", "tf32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 312, 156),
        ("NVIDIA A100 80GB PCIe", 312, 312, 156),
        ("NVIDIA H100 80GB HBM3", 989.4, 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756, 756, 378),
        ("NVIDIA H100 NVL", 835.5, 835.5, 417.5),
        ("NVIDIA H200", 989.4, 989.4, 494.7),
        ("NVIDIA H200 NVL", 835.5, 835.5, 417.5),
        ("NVIDIA GH200 480GB", 989.4, 989.4, 494.7),
        ("NVIDIA B200", 2250, 2250, 1100),
        ("NVIDIA L4", 121, 121, 60),
        ("NVIDIA L40S", 362.05, 362.05, 183),
        ("NVIDIA A10G", 70, 70, 35),
        ("NVIDIA RTX A6000", 154.8, 154.8, 77.4),
        ("NVIDIA RTX 6000 Ada Generation", 364.2, 364.2, 182.1),
        ("NVIDIA GeForce RTX 3090", 71, 71, 35.6),
        ("NVIDIA GeForce RTX 3090 Ti", 80, 80, 40),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2, 82.6),
        ("NVIDIA GeForce RTX 5090", 209.5, 209.5, 104.8),
        ("Tesla V100-SXM2-32GB", None, 125, None),
        ("Tesla V100-PCIE-16GB", None, 112, None),
        ("Tesla T4", None, 65, None),
        ("AMD Instinct MI250X", 191.5, 191.5, None),
        ("AMD Instinct MI300X", 1307.4, 1307.4, 653.7),
    ],
)
def test_the_peaks_of_known_names(name: str, bf16: float | None, fp16: float | None, tf32: float | None) -> None:
    expected: dict[DType, float | None] = {"bf16": bf16, "fp16": fp16, "tf32": tf32}
    for dtype, teraflops in expected.items():
        found = peak_flops(name, dtype)
        assert found == (None if teraflops is None else pytest.approx(teraflops * TERA, rel=1e-12))


def test_fp32_is_the_rate_of_the_ordinary_units() -> None:
    assert peak_flops("NVIDIA A100-SXM4-40GB", "fp32") == 19.5e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") == 66.9e12
    assert peak_flops("NVIDIA GeForce RTX 4090", "fp32") == 82.6e12


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cpu",
        "NVIDIA H100",
        "NVIDIA A100",
        "nvidia h200",
        "NVIDIA H200 ",
        "NVIDIA GeForce RTX 3080",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A100-SXM-64GB",
        "AMD Instinct MI250X/MI250",
    ],
)
def test_a_name_that_is_not_listed_has_no_peak(name: str) -> None:
    assert [peak_flops(name, dtype) for dtype in ("bf16", "fp16", "tf32", "fp32")] == [None] * 4


# Units (SMs, CUs), the clock in MHz at which the maker states his figure, and the 16-bit operations of a unit per
# clock with fp32 accumulation: 2 x multiply-adds of its tensor cores. Same white papers, other tables: a figure
# with sparsity, or with fp16 accumulation, would be off by 2.
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


@pytest.mark.parametrize("name", UNITS)
def test_a_peak_is_units_times_clock_times_operations(name: str) -> None:
    units, megahertz, operations = UNITS[name]
    assert peak_flops(name, "fp16") == pytest.approx(units * megahertz * 1e6 * operations, rel=0.015)


@pytest.mark.parametrize("name", PEAKS)
def test_the_formats_of_a_gpu_fit_together_and_have_a_source(name: str) -> None:
    peak = PEAKS[name]
    assert peak.fp16 is not None
    assert peak.bf16 in (None, peak.fp16)
    if peak.tf32 is not None:  # half the rate, at twice the width; datasheets round it
        assert peak.tf32 == pytest.approx(peak.fp16 / 2, rel=0.025)
    assert ", 20" in peak.source
    assert peak.source.split()[0] == ("AMD" if name.startswith("AMD") else "NVIDIA")
