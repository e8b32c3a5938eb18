"""Peak dense FLOP/s of GPUs by device name and number format, and memory bandwidths, from their makers' datasheets.

The figures are for matrix products with fp32 accumulation and without sparsity, since that is how training computes.
Three traps:

- From Hopper on, NVIDIA's datasheets quote twice the dense rate ("with sparsity"). It is halved here.
- GeForce cards multiply 16-bit numbers at half speed when they accumulate in fp32. The lower figure is listed.
- An MI250X appears as two devices in PyTorch. Half of the card's figure is listed.

Names must equal those of torch.cuda.get_device_name(). A prefix would match an RTX 3090 Ti to a 3090, or a MIG slice to
a whole A100. A GPU that is not listed has no MFU, which is better than a wrong one.
"""

from dataclasses import dataclass
from typing import Literal

DType = Literal["bf16", "fp16", "tf32", "fp32"]


@dataclass(frozen=True)
class Peak:
    """Dense FLOP/s of one device; None if it has no such units or its maker gives no figure.

    bf16, fp16 and tf32 are figures of the matrix units ("tensor cores"), fp32 of the ordinary units. `source` is the
    datasheet's title and year.
    """

    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float | None
    source: str


H100_PAPER = "NVIDIA H100 Tensor Core GPU Architecture V1.04, 2023"
RTX_50_PAPER = "NVIDIA RTX Blackwell GPU Architecture V1.1, 2025"
RTX_PRO_PAPER = "NVIDIA RTX PRO Blackwell GPU Architecture, 2025"
# These are left out because one name stands for cards of different speed, or because no figure was found: GeForce RTX
# 3080 (10 and 12 GB), AMD Instinct MI250X/MI250, RTX PRO 6000 Blackwell Server Edition, MIG slices, laptop GPUs.
PEAKS = {
    "Tesla V100-SXM2-16GB": Peak(None, 125e12, None, 15.7e12, "NVIDIA V100 Tensor Core GPU datasheet, 2020"),
    "Tesla V100-PCIE-16GB": Peak(None, 112e12, None, 14e12, "NVIDIA V100 Tensor Core GPU datasheet, 2020"),
    "Tesla V100S-PCIE-32GB": Peak(None, 130e12, None, 16.4e12, "NVIDIA V100 Tensor Core GPU datasheet, 2020"),
    "Tesla T4": Peak(None, 65e12, None, 8.1e12, "NVIDIA T4 Tensor Core GPU datasheet, 2019"),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 312e12, 156e12, 19.5e12, "NVIDIA A100 Tensor Core GPU datasheet, 2021"),
    "NVIDIA A30": Peak(165e12, 165e12, 82e12, 10.3e12, "NVIDIA A30 Tensor Core GPU datasheet, 2022"),
    "NVIDIA A40": Peak(149.7e12, 149.7e12, 74.8e12, 37.4e12, "NVIDIA A40 datasheet, 2021"),
    "NVIDIA A10": Peak(125e12, 125e12, 62.5e12, 31.2e12, "NVIDIA A10 Tensor Core GPU datasheet, 2021"),
    "NVIDIA A10G": Peak(70e12, 70e12, 35e12, 35e12, "NVIDIA A10G for AWS datasheet, 2022"),
    "NVIDIA RTX A6000": Peak(154.8e12, 154.8e12, 77.4e12, 38.7e12, "NVIDIA Ampere GA102 GPU Architecture V2.0, 2021"),
    "NVIDIA GeForce RTX 3090": Peak(71e12, 71e12, 35.6e12, 35.6e12, "NVIDIA Ampere GA102 GPU Architecture V2.0, 2021"),
    "NVIDIA GeForce RTX 3090 Ti": Peak(80e12, 80e12, 40e12, 40e12, "NVIDIA Ada GPU Architecture V2, 2022"),
    "NVIDIA GeForce RTX 4080": Peak(97.5e12, 97.5e12, 48.7e12, 48.7e12, "NVIDIA Ada GPU Architecture V2, 2022"),
    "NVIDIA GeForce RTX 4090": Peak(165.2e12, 165.2e12, 82.6e12, 82.6e12, "NVIDIA Ada GPU Architecture V2, 2022"),
    "NVIDIA RTX 6000 Ada Generation": Peak(
        364.2e12, 364.2e12, 182.1e12, 91.1e12, "NVIDIA Ada Lovelace Professional GPU Architecture, 2023"
    ),
    "NVIDIA L4": Peak(121e12, 121e12, 60e12, 30.3e12, "NVIDIA L4 Tensor Core GPU datasheet, 2023 (sparse 242, 120)"),
    "NVIDIA L40": Peak(181.05e12, 181.05e12, 90.5e12, 90.5e12, "NVIDIA L40 datasheet, 2022"),
    "NVIDIA L40S": Peak(362.05e12, 362.05e12, 183e12, 91.6e12, "NVIDIA L40S datasheet, 2023"),
    # Three products use a GH100 with 132 units, so they share one figure. The datasheets round it: 1,979 TFLOP/s with
    # sparsity for the H200, 990 without for the GH200.
    "NVIDIA H100 80GB HBM3": Peak(989.4e12, 989.4e12, 494.7e12, 66.9e12, H100_PAPER),
    "NVIDIA H100 PCIe": Peak(756e12, 756e12, 378e12, 51.2e12, H100_PAPER),
    "NVIDIA H100 NVL": Peak(
        835.5e12, 835.5e12, 417.5e12, 60e12, "NVIDIA H100 Tensor Core GPU datasheet, 2024 (sparse 1,671, 835)"
    ),
    "NVIDIA H200": Peak(
        989.4e12, 989.4e12, 494.7e12, 66.9e12, "NVIDIA H200 Tensor Core GPU datasheet, 2024 (as H100 SXM)"
    ),
    "NVIDIA H200 NVL": Peak(
        835.5e12, 835.5e12, 417.5e12, 60e12, "NVIDIA H200 Tensor Core GPU datasheet, 2024 (sparse 1,671, 835)"
    ),
    "NVIDIA GH200 480GB": Peak(
        989.4e12, 989.4e12, 494.7e12, 66.9e12, "NVIDIA GH200 Grace Hopper Superchip datasheet, 2023 (as H100 SXM)"
    ),
    "NVIDIA B200": Peak(
        2.25e15, 2.25e15, 1.1e15, 75e12, "NVIDIA Blackwell datasheet, HGX B200, 2025 (sparse 4,500, 2,200)"
    ),
    "NVIDIA GB200": Peak(
        2.5e15, 2.5e15, 1.25e15, 80e12, "NVIDIA Blackwell datasheet, GB200 NVL72, 2025 (sparse 5,000, 2,500)"
    ),
    "NVIDIA B300 SXM6 AC": Peak(
        2.25e15, 2.25e15, 1.1e15, 75e12, "NVIDIA Blackwell Ultra datasheet, HGX B300, 2025 (sparse 4,500, 2,200)"
    ),
    "NVIDIA GB300": Peak(
        2.5e15, 2.5e15, 1.25e15, 80e12, "NVIDIA Blackwell Ultra datasheet, GB300 NVL72, 2025 (sparse 5,000, 2,500)"
    ),
    "NVIDIA GeForce RTX 5080": Peak(112.6e12, 112.6e12, 56.3e12, 56.3e12, RTX_50_PAPER),
    "NVIDIA GeForce RTX 5090": Peak(209.5e12, 209.5e12, 104.8e12, 104.8e12, RTX_50_PAPER),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": Peak(503.8e12, 503.8e12, None, 125e12, RTX_PRO_PAPER),
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": Peak(438.9e12, 438.9e12, None, 110e12, RTX_PRO_PAPER),
    "AMD Instinct MI210": Peak(181e12, 181e12, None, 22.6e12, "AMD Instinct MI210 data sheet, 2022"),
    "AMD Instinct MI250X": Peak(
        191.5e12, 191.5e12, None, 23.95e12, "AMD Instinct MI250X data sheet, 2021 (383.0 and 47.9 for its two dies)"
    ),
    "AMD Instinct MI300A": Peak(980.6e12, 980.6e12, 490.3e12, 122.6e12, "AMD Instinct MI300A data sheet, 2023"),
    "AMD Instinct MI300X": Peak(1307.4e12, 1307.4e12, 653.7e12, 163.4e12, "AMD Instinct MI300X data sheet, 2023"),
    "AMD Instinct MI325X": Peak(1307.4e12, 1307.4e12, 653.7e12, 163.4e12, "AMD Instinct MI325X data sheet, 2024"),
    "AMD Instinct MI350X": Peak(2306.9e12, 2306.9e12, None, 144.2e12, "AMD Instinct MI350X data sheet, 2025"),
    "AMD Instinct MI355X": Peak(2516.6e12, 2516.6e12, None, 157.3e12, "AMD Instinct MI355X data sheet, 2025"),
}
# Other names for the same chip at the same speed.
PEAKS |= {
    "Tesla V100-SXM2-32GB": PEAKS["Tesla V100-SXM2-16GB"],
    "Tesla V100-SXM3-32GB": PEAKS["Tesla V100-SXM2-16GB"],
    "Tesla V100-PCIE-32GB": PEAKS["Tesla V100-PCIE-16GB"],
    "NVIDIA A100-SXM4-80GB": PEAKS["NVIDIA A100-SXM4-40GB"],
    "NVIDIA A100-PCIE-40GB": PEAKS["NVIDIA A100-SXM4-40GB"],
    "NVIDIA A100 80GB PCIe": PEAKS["NVIDIA A100-SXM4-40GB"],
    "NVIDIA GH200 144G HBM3e": PEAKS["NVIDIA GH200 480GB"],
}


# Bytes per second between a GPU and its memory, and the datasheet; for the cards that model/cost.py names.
BANDWIDTHS = {
    "NVIDIA GeForce RTX 4090": (1.008e12, "NVIDIA Ada GPU Architecture V2, 2022"),
    "NVIDIA GeForce RTX 5090": (1.792e12, RTX_50_PAPER),
    "NVIDIA L4": (0.300e12, "NVIDIA L4 Tensor Core GPU datasheet, 2023"),
    "NVIDIA L40S": (0.864e12, "NVIDIA L40S datasheet, 2023"),
    "NVIDIA A100-SXM4-40GB": (1.555e12, "NVIDIA A100 Tensor Core GPU datasheet, 2021"),
    "NVIDIA A100-SXM4-80GB": (2.039e12, "NVIDIA A100 Tensor Core GPU datasheet, 2021"),
    "NVIDIA H100 80GB HBM3": (3.35e12, "NVIDIA H100 Tensor Core GPU datasheet, 2024"),
    "NVIDIA H200": (4.8e12, "NVIDIA H200 Tensor Core GPU datasheet, 2024"),
    "NVIDIA B200": (7.7e12, "NVIDIA Blackwell datasheet, HGX B200, 2025"),
    "AMD Instinct MI300X": (5.3e12, "AMD Instinct MI300X data sheet, 2023"),
}


def peak_flops(device_name: str, dtype: DType) -> float | None:
    """Return a device's dense FLOP/s by its name in torch; None if it is unknown or has no units for `dtype`."""
    peak: float | None = getattr(PEAKS.get(device_name), dtype, None)
    return peak
