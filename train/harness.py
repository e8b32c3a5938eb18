"""Run EleutherAI's lm-evaluation-harness on our own model. Needs lm-eval: pip install -e '.[eval]'.

    python train/harness.py runs/NAME --tasks hellaswag
    python train/harness.py runs/NAME@500 --tasks lambada_openai,piqa --num_fewshot 0 --batch_size 16 --limit 100
    python train/harness.py runs/NAME --tasks mine --include_path tasks --output_path results
    torchrun --local-addr=127.0.0.1 --nproc_per_node=8 train/harness.py runs/NAME --tasks hellaswag

All flags are those of `lm_eval run`, except --dtype: fp32 (the default) or bf16. Tasks come from the Hub, or from your
own folder with --include_path. The numbers are those of `--model hf` on the folder that model/hf_bridge.py exports, for
any architecture and tokenizer that we have. The smallest task needs as many documents as there are processes.

The harness's HellaSwag rewrites the text and divides a loss by the ending's characters. OpenAI's GPT-2 small has 0.2892
and 0.3114 there (published with build-nanogpt, not measured here). train/validate.py has the completion style.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.processes import parent_watch

parent_watch.remember()

from common.errors import InputError, first_line, one_line_errors
from train.processes.group import open_process_group

USAGE = f"usage: train/harness.py MODEL [--dtype fp32|bf16] --tasks TASK [lm-eval's flags]\n\n{__doc__}"
BATCH_SIZE = "8"  # lm-eval's own is 1
TIMEOUT_SECONDS = 3600.0  # how much longer one process's share may take than another's


def command_line(args: Sequence[str]) -> list[str]:
    """Return lm-eval's command line for ours. Model arguments are JSON, since a path may hold commas."""
    model, *rest = args
    dtype = "fp32"
    words = [word for flag in rest for word in (flag.split("=", 1) if flag.startswith("--dtype=") else [flag])]
    if "--dtype" in words:
        position = words.index("--dtype")
        dtype = words[position + 1] if position + 1 < len(words) else ""
        rest = [*words[:position], *words[position + 2 :]]
    if not any(flag.split("=")[0] in ("--batch_size", "-b", "--config", "-C") for flag in rest):
        rest += ["--batch_size", BATCH_SIZE]
    model_args = json.dumps({"path": model, "dtype": dtype})
    return ["lm_eval", "run", "--model", "gpt-ladder", "--model_args", model_args, *rest]


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors("harness"):
        arguments = list(sys.argv[1:] if args is None else args)
        wants_help = not arguments or bool({"-h", "--help"} & set(arguments))
        if wants_help:
            print(USAGE)
        elif arguments[0].startswith("-"):
            raise InputError(f"{arguments[0]}: the model comes first: train/harness.py MODEL --tasks ...")
        try:
            from lm_eval._cli import HarnessCLI
        except ImportError as error:
            if wants_help:
                print("Its flags cannot be listed: it is not installed.")
                return
            raise InputError("the harness needs lm-eval: pip install -e '.[eval]'") from error
        own_argv = sys.argv
        try:
            sys.argv = ["lm_eval", "run", "--help"] if wants_help else command_line(arguments)
            parser = HarnessCLI()
            options = parser.parse_args()
            from train.evals import harness_model

            with open_process_group(TIMEOUT_SECONDS, Path(tempfile.gettempdir()), program="harness") as group:
                harness_model.use(group)
                if not any(flag.split("=")[0] == "--device" for flag in arguments):
                    options.device = str(group.device)  # lm-eval's default is a GPU, even without one
                try:
                    parser.execute(options)
                except InputError as error:
                    if not group.is_main:  # only this process may have it, in its share of the requests
                        print(f"harness: rank {group.rank}: {error}", file=sys.stderr)
                    raise
                except OSError as error:  # of lm-eval's downloads and output files
                    raise InputError(f"lm-eval: {error}") from error
                except ValueError as error:
                    if not str(error).startswith("Tasks not found"):
                        raise
                    raise InputError(f"lm-eval: {first_line(error)}") from error
                group.barrier()  # launchers kill the rest when the first process exits
        finally:
            sys.argv = own_argv


if __name__ == "__main__":
    main()
