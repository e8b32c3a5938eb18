"""Answer on one GPU, in 8 minutes, what a machine without one cannot: is it right there, and how fast is it?

    make gpu-check OUT=gpu-check                                       # the Python that has torch: PYTHON=python3
    python3 benchmarks/gpu_check.py --out gpu-check --wheels wheels    # first install the wheels of a folder
    python3 benchmarks/gpu_check.py --out /tmp/check --tiny            # every part at tiny sizes on a CPU

The parts run in the order of their worth, each in a process of its own with a time limit. gpu-check.json and
gpu-check.md are written anew after every row, so an end at any moment leaves what was measured until then;
gpu-check.log has what the parts print. Only torch, numpy, tiktoken and huggingface_hub are needed, and pytest for the
tests marked `gpu`. Exit status: 0 if every part was done, 1 if one failed or was cut off.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import InputError, one_line_errors
from common.files import write_atomically, write_json_atomically

ROOT = Path(__file__).resolve().parents[1]
ROW = "row: "  # how a part's line with a row begins
LAST_SECONDS = 5.0  # of the whole, in which no part begins


@dataclass
class Part:
    """A part and what it found. `state`: waiting, running, done, skipped, failed or cut off."""

    name: str
    question: str
    limit_seconds: float
    state: str = "waiting"
    reason: str | None = None
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def parts() -> list[Part]:
    """Return the parts in the order of their worth."""
    return [
        Part("rates", "Which versions and device, and what are its ceilings?", 60),
        Part("tests", "Do the tests marked gpu pass?", 150),
        Part("steps", "GPT-2 small's step: our tokens/s against the usual loop's?", 180),
        Part("attention", "Which attention kernel is fastest at 64 x 12 x 1,024 x 64?", 60),
        Part("loss", "Which size of chunks is fastest for the head and its loss?", 90),
        Part("fp8", "What do products in FP8 bring?", 120),
        Part("memory", "Is the predicted memory what the allocator hands out?", 90),
        Part("trace", "Where does a step's time go?", 60),
        Part("roofline", "How long must it take at least?", 60),
        Part("saves", "What does a checkpoint cost?", 60),
    ]


Report = Callable[[], None]


def run_part(part: Part, command: list[str], env: dict[str, str], limit: float, log: IO[str], report: Report) -> None:
    """Run a part's command for at most `limit` seconds, and add each line of JSON that it prints to its rows."""
    began = time.monotonic()
    part.state = "running"
    report()
    is_over = threading.Event()
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:

        def end() -> None:
            is_over.set()
            os.killpg(process.pid, signal.SIGKILL)  # the part's own children too

        timer = threading.Timer(limit, end)
        timer.start()
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            if (row := row_of(line)) is None:
                last = line.strip() or last
                log.write(line)
                continue
            part.rows.append(row)
            part.seconds = round(time.monotonic() - began, 1)
            report()
        status = process.wait()
        timer.cancel()
    part.seconds = round(time.monotonic() - began, 1)
    if is_over.is_set():
        part.state, part.reason = "cut off", f"after its {limit:.0f} s"
    elif status != 0:
        part.state, part.reason = "failed", f"exit status {status}: {last}"
    else:
        part.state = "done"
    report()


def row_of(line: str) -> dict[str, Any] | None:
    """Return the row on a line of a part, or in pytest's report of one test; None for any other line."""
    if line.startswith(ROW):
        row: dict[str, Any] = json.loads(line.removeprefix(ROW))
        return row
    outcome = re.match(r"tests/gpu/(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL)(?: \((.*)\))?", line)
    if outcome is None:
        return None
    return {"test": outcome[1], "outcome": outcome[2].lower()} | ({"reason": outcome[3]} if outcome[3] else {})


def command_of(part: Part, *, is_tiny: bool) -> list[str]:
    if part.name != "tests":
        return [sys.executable, "benchmarks/gpu_parts.py", part.name, *(["--tiny"] if is_tiny else [])]
    # The machine may have other versions of the tools: their warnings are no errors here.
    options = ["-o", "addopts=", "-W", "default", "-p", "no:cacheprovider", "-v", "--tb=short"]
    files = [f"tests/gpu/test_{name}.py" for name in ("runs", "parts", "kernels")]  # in the order of their worth
    return [sys.executable, "-m", "pytest", *files, "-m", "gpu", *options]


def environment(*, is_tiny: bool, site: Path | None) -> dict[str, str]:
    """Return the environment of the parts. Tiny ones see no GPU, and their skipped tests fail no CI."""
    env = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "250", "GPU_TESTS": "tiny" if is_tiny else "cuda"}
    if is_tiny:
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        env.pop("CI", None)
    if site is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [env.get("PYTHONPATH")])])
    return env


def install(wheels: Path, site: Path) -> None:
    """Install every wheel of a folder into `site`, without a network. Raise InputError if that fails."""
    names = sorted(map(str, wheels.glob("*.whl")))
    if not names:
        raise InputError(f"--wheels {wheels}: there is no wheel in it; fill it with pip download")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    done = subprocess.run([*command, *names], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InputError(f"--wheels {wheels}: pip failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")


def write(out: Path, found: list[Part], header: dict[str, Any]) -> None:
    """Write both reports."""
    write_json_atomically(out / "gpu-check.json", header | {"parts": [asdict(part) for part in found]})
    write_atomically(out / "gpu-check.md", page(found, header))


def page(found: list[Part], header: dict[str, Any]) -> str:
    """Return the report as Markdown: a section and a table for each part."""
    lines = ["# GPU check", "", ", ".join(f"{name} {value}" for name, value in header.items())]
    for part in found:
        reason = "" if part.reason is None else f" ({part.reason})"
        lines += ["", f"## {part.question}", "", f"`{part.name}`: {part.state}{reason}, {part.seconds:.1f} s"]
        if part.rows:
            columns = list(dict.fromkeys(name for row in part.rows for name in row))
            lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in part.rows]
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    return "" if value is None else str(value).replace("|", "\\|")


def parse(args: list[str] | None) -> argparse.Namespace:
    """Parse the flags by the standard library, since the machine may lack tyro."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports; made if missing")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for the parts, without a network")
    parser.add_argument("--minutes", type=float, default=8.0, help="what all parts may take together (8)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts alone")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU: a test of the script itself")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> None:
    with one_line_errors("gpu_check"):
        options = parse(args)
        found = parts()
        names = [part.name for part in found]
        if options.only and (unknown := [name for name in options.only if name not in names]):
            raise InputError(f"--only {unknown[0]}: there are {', '.join(names)}")
        found = [part for part in found if not options.only or part.name in options.only]
        began = time.monotonic()
        options.out.mkdir(parents=True, exist_ok=True)
        header = {"began": time.strftime("%Y-%m-%d %H:%M:%S"), "minutes": options.minutes, "tiny": options.tiny}
        site = Path(tempfile.mkdtemp(prefix="gpu-check-")) if options.wheels else None
        try:
            if site is not None:
                install(options.wheels, site)
            env = environment(is_tiny=options.tiny, site=site)
            with (options.out / "gpu-check.log").open("w", encoding="utf-8") as log:
                for part in found:
                    left = 60 * options.minutes - (time.monotonic() - began) - LAST_SECONDS
                    check(part, min(part.limit_seconds, left), env, log, lambda: write(options.out, found, header))
        finally:
            if site is not None:
                shutil.rmtree(site)
        print((options.out / "gpu-check.md").read_text(encoding="utf-8"))
        if not all(part.state in ("done", "skipped") for part in found):
            sys.exit(1)


def check(part: Part, limit: float, env: dict[str, str], log: IO[str], report: Report) -> None:
    """Run a part if there is time for it, and report what came of it."""
    if limit <= 0:
        part.state, part.reason = "cut off", "the minutes were over before it began"
        report()
        return
    print(f"{part.name} ... ", end="", flush=True)
    run_part(part, command_of(part, is_tiny=env["GPU_TESTS"] == "tiny"), env, limit, log, report)
    if part.reason is not None and part.reason.endswith("No module named pytest"):
        part.state = "skipped"
        report()
    print(f"{part.state}, {part.seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
