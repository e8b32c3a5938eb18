"""What a run may do without: the command line's library, and W&B where tracking is off."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.runs import ROOT

RUN = """
import sys
sys.modules["tyro"] = sys.modules["wandb"] = None  # an import of either now fails
from pathlib import Path
import torch
from tests.helpers.runs import tiny_config
from train.main import run
from train.processes.group import ProcessGroup
run(tiny_config(Path(sys.argv[1]), Path(sys.argv[2]), steps=2), ProcessGroup(0, 1, torch.device("cpu")))
assert "torch._dynamo" not in sys.modules, "an eager run loads no compiler, which takes a second"
import benchmarks.bench_saves, train.presets
"""


EARLY = """
import os, sys
import model.generate, train.main, train.preflight, train.validate
print([name for name in ("torch._dynamo", "torch._inductor.config") if name in sys.modules])
print("TORCHINDUCTOR_CACHE_DIR" in os.environ)
"""


def test_no_command_loads_the_compiler_before_its_process_has_a_device_and_a_cache() -> None:
    """Dynamo and Inductor take the number of workers and the folder of the cache when they are loaded."""
    env = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", EARLY], cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout == "[]\nFalse\n", done.stderr


def test_a_run_without_a_command_line_needs_neither_tyro_nor_wandb_nor_the_compiler(
    tiny_data: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", RUN, str(tiny_data), str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "done at step 2" in done.stdout
