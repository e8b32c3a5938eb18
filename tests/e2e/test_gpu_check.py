"""benchmarks/gpu_check.py: every part at tiny sizes, and what a part that hangs, fails or prints leaves behind."""

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_check, gpu_parts
from benchmarks.gpu_check import Part
from tests.helpers.runs import ROOT


@pytest.mark.long(reason="36 s of one core: eight parts that each import torch; the parts below are quick")
def test_every_part_runs_at_tiny_sizes_without_tyro(tmp_path: Path) -> None:
    """With tyro and wandb hidden, since the machine that has the GPU may lack them."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("tyro", "wandb"):
        (hidden / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name} is hidden')\n", encoding="utf-8")
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", str(tmp_path / "out"), "--tiny"]
    env = os.environ | {"PYTHONPATH": str(hidden), "CI": "true"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    log = (tmp_path / "out" / "gpu-check.log").read_text(encoding="utf-8")
    assert done.returncode == 0, (done.stdout, done.stderr, log[-5000:])
    report = json.loads((tmp_path / "out" / "gpu-check.json").read_text(encoding="utf-8"))
    rows = {part["name"]: part["rows"] for part in report["parts"]}
    assert {part["state"] for part in report["parts"]} == {"done"}
    assert {"torch", "device", "copy, TB/s read and written"} <= {row["what"] for row in rows["rates"]}
    outcomes = [row["outcome"] for row in rows["tests"]]
    assert set(outcomes) == {"passed", "skipped"} and outcomes.count("passed") >= 12
    assert all(row["reason"] for row in rows["tests"] if row["outcome"] == "skipped")
    assert [row["micro-batch"] for row in rows["steps"]] == [16, 64]
    assert all(row["our tokens/s"] > 0 and row["the usual loop's"] > 0 for row in rows["steps"])
    assert [row["backend"] for row in rows["attention"]] == ["flash", "math"]
    assert [row["loss"] for row in rows["loss"]] == ["plain", "chunks of 16", "chunks of 32"]
    assert len(rows["memory"]) == 3 and all(row["predicted, GB"] > 0 for row in rows["memory"])
    kinds = {row["kernels"] for row in rows["trace"]}
    assert {"all", "attention", "matrix products", "norms", "optimizer", "loss"} <= kinds
    assert any("::" in kind for kind in kinds)
    assert rows["saves"][0]["value"] > 0 and rows["saves"][1]["median"] > 0
    page = (tmp_path / "out" / "gpu-check.md").read_text(encoding="utf-8")
    assert all(f"## {part.question}" in page for part in gpu_check.parts()) and "waiting" not in page


def run_code(code: str, tmp_path: Path, limit: float) -> tuple[Part, list[Part]]:
    """Run code as a part; return the part, and the states that were reported on the way."""
    part, reported = Part("rates", "?", 60), list[Part]()

    def report() -> None:
        gpu_check.write(tmp_path, [part], {"tiny": True})
        read = json.loads((tmp_path / "gpu-check.json").read_text(encoding="utf-8"))["parts"][0]
        reported.append(Part(**read))

    command = [sys.executable, "-u", "-c", code]
    gpu_check.run_part(part, command, dict(os.environ), limit, io.StringIO(), report)
    return part, reported


def test_a_part_that_hangs_is_cut_off_with_its_children_and_leaves_its_rows(tmp_path: Path) -> None:
    """The child holds the pipe open: it must go too, or the script would wait for it."""
    code = (
        "import subprocess, time\nprint('row: {\"row\": 1}')\nprint('{no row}')\nprint('a line of the log')\n"
        "subprocess.Popen(['sleep', '60'])\ntime.sleep(60)"
    )
    began = time.monotonic()
    part, reported = run_code(code, tmp_path, limit=4)
    assert time.monotonic() - began < 30
    assert (part.state, part.reason, part.rows) == ("cut off", "after its 4 s", [{"row": 1}])
    assert [(each.state, len(each.rows)) for each in reported] == [("running", 0), ("running", 1), ("cut off", 1)]
    page = (tmp_path / "gpu-check.md").read_text(encoding="utf-8")
    assert "`rates`: cut off (after its 4 s)" in page and "| 1 |" in page


def test_a_part_that_fails_says_why(tmp_path: Path) -> None:
    part, _ = run_code("print('row: {\"row\": 1}')\nraise ValueError('no such kernel')", tmp_path, limit=60)
    assert (part.state, part.rows) == ("failed", [{"row": 1}])
    assert part.reason == "exit status 1: ValueError: no such kernel"


def test_pytests_lines_are_rows() -> None:
    line = "tests/gpu/test_runs.py::test_x[{'a': 1}] FAILED                          [ 12%]\n"
    assert gpu_check.row_of(line) == {"test": "test_runs.py::test_x[{'a': 1}]", "outcome": "failed"}
    skipped = gpu_check.row_of("tests/gpu/test_runs.py::test_y SKIPPED (no GPU)     [ 20%]\n")
    assert skipped == {"test": "test_runs.py::test_y", "outcome": "skipped", "reason": "no GPU"}
    assert gpu_check.row_of("step       1  loss   5.5437\n") is None


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x64", "attention"),
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128>", "matrix products"),
        ("triton_red_fused__log_softmax_nll_loss_forward_0", "loss"),
        ("triton_per_fused__to_copy_add_native_layer_norm_2", "norms"),
        ("triton_poi_fused__to_copy_addmm_gelu_3", "other kernels of the compiler"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
    ],
)
def test_kernels_are_sorted_by_their_names(kernel: str, kind: str) -> None:
    assert gpu_parts.kind_of(kernel) == kind


def test_the_time_of_all_parts_is_bounded(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", str(tmp_path), "--tiny", "--minutes", "0.01"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    report = json.loads((tmp_path / "gpu-check.json").read_text(encoding="utf-8"))
    assert done.returncode == 1 and {part["state"] for part in report["parts"]} == {"cut off"}


def test_wheels_are_installed_for_the_parts(tmp_path: Path) -> None:
    """A wheel of one module, made by hand; a folder without wheels is one line."""
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", str(out), "--wheels", str(wheels)]
    done = subprocess.run([*command, "--tiny"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "there is no wheel in it" in done.stderr and done.stderr.count("\n") == 1
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "WORD = 'here'\n")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        tags = "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("carried-1.0.dist-info/WHEEL", tags)
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    gpu_check.install(wheels, tmp_path / "site")
    env = gpu_check.environment(is_tiny=True, site=tmp_path / "site")
    code = [sys.executable, "-c", "import carried; print(carried.WORD)"]
    assert subprocess.run(code, env=env, capture_output=True, text=True, check=True).stdout == "here\n"
