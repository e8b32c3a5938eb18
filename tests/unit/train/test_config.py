"""The command line: the configuration it gives, and the faults it refuses, all at once."""

import subprocess
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from tests.helpers.names import REFUSED
from tests.helpers.runs import called, tiny_flags
from train.command_line import parse
from train.config import Config
from train.config_checks import settings_without_effect
from train.main import main, run
from train.presets import PRESETS
from train.processes.group import ProcessGroup


def parsed(*args: str) -> Config:
    return parse(args, PRESETS)


def refusal(*args: str) -> str:
    with pytest.raises(InputError) as caught:
        parsed(*args)
    return str(caught.value)


def test_no_preset_is_gpt2_small_as_published() -> None:
    config = parsed()
    assert config.preset == "gpt2-small"
    assert config.directory == Path("runs/gpt2-small")
    assert (config.train.batch_tokens, config.train.steps, config.sequences_per_step) == (524_288, 19_073, 512)
    assert (config.optim.lr_peak, config.optim.warmup_steps, config.optim.lr_final) == (6e-4, 700, 0.0)
    assert (config.optim.beta1, config.optim.beta2, config.optim.weight_decay) == (0.9, 0.95, 0.1)
    assert config.optim.clip_norm == 1.0
    assert config.train.dtype == "bf16" and config.train.compile
    assert config.data.dir == Path("data/fineweb_edu_10B")


def test_flags_override_the_preset_under_the_names_that_scripts_rely_on() -> None:
    config = parsed("shakespeare-char-cpu", "--model.width", "64", "--train.compile", "--optim.clip-norm", "None")
    assert (config.model.width, config.train.compile, config.optim.clip_norm) == (64, True, None)
    assert config.model.num_layers == 4
    assert config.model.context_len == config.train.seq_len == 64
    args = "--run-dir a --seed 2 --no-resume --data.dir d --model.num-layers 3 --model.num-heads 2 --model.width 8"
    args += " --train.seq-len 16 --train.steps 5 --train.batch-tokens 64 --train.micro-batch 2 --train.dtype fp32"
    args += " --train.no-compile --optim.name adamw --optim.lr-peak 1e-3 --optim.schedule constant"
    args += " --optim.warmup-steps 1 --validate.every 3 --validate.tokens 100 --save.every 2 --save.keep 1"
    config = parsed(*args.split(), "--parallel.mode", "ddp", "--track.every", "4", "--track.wandb", "offline")
    assert not config.resume and config.train.steps == 5 and config.parallel.mode == "ddp"


def test_tokens_in_place_of_steps() -> None:
    assert parsed("--train.tokens", "1000000000").train.steps == 1907
    assert "give one" in refusal("--train.tokens", "1000000000", "--train.steps", "5")
    assert "less than one step" in refusal("--train.tokens", "1000")


def test_typos_get_suggestions_and_sizes_of_the_data_have_no_flag() -> None:
    text = refusal("--model.vocab-size", "100")
    assert text.startswith("unknown '--model.vocab-size'") and "did you mean --model.vocab-size" not in text
    assert "did you mean gpt2-small?" in refusal("gpt2-smal")
    assert "unknown '--train.batch-token' (did you mean --train.batch-tokens?)" in refusal("--train.batch-token", "1")
    assert "unknown 'extra'" in refusal("gpt2-small", "extra")


def test_all_faults_are_reported_at_once_with_value_rule_and_flag() -> None:
    text = refusal(
        *("--train.batch-tokens", "500000", "--model.num-heads", "7", "--optim.lr-peak", "-1"),
        *("--optim.beta2", "1.0", "--save.keep", "0", "--optim.warmup-steps", "-5", "--train.loss-chunk-tokens", "0"),
    )
    for line in (
        "7 faults",
        "--train.batch-tokens 500000 is not divisible by --train.seq-len 1024; try 499712 or 500736",
        "--model.width 768 is not divisible by --model.num-heads 7; try --model.width 770",
        "--optim.lr-peak -1.0 must be more than 0",
        "--optim.beta2 1.0 must lie in [0, 1)",
        "--save.keep 0 must be at least 1",
        "--train.loss-chunk-tokens 0 must be at least 1",
        "--optim.warmup-steps -5 must not be negative",
    ):
        assert line in text
    text = refusal("--optim.average-fraction", "0", "--optim.average-decay", "1")
    assert "average-fraction 0.0 must lie in (0, 1]" in text and "average-decay 1.0 must lie in [0, 1)" in text
    text = refusal("--optim.lr-final", "nan", "--optim.lr-peak", "inf")
    assert "lr-final nan must be a finite" in text and "lr-peak inf must be a finite" in text


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_does_not_print_is_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(["--run-dir", f"runs/{name}"], PRESETS)
    line = f"--run-dir {f'runs/{name}'!r}: it has characters that do not print; give a name without them"
    assert str(caught.value) == line and line.isprintable()


def test_dry_run_warns_of_epochs_and_a_mode_that_does_not_fit_is_refused(tmp_path: Path, tiny_data: Path) -> None:
    args = ["shakespeare-char-cpu", "--data.dir", str(tiny_data), "--run-dir", str(tmp_path / "run")]
    assert "85.33 epochs  WARNING: more than one epoch" in command(*args, "--dry-run").stdout
    for extra in ([], ["--dry-run"]):
        done = command(*args, "--parallel.mode", "ddp", *extra)
        assert done.returncode == 2 and "--parallel.mode ddp needs several processes" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--trace 30000:30001", "--trace 30000:30001 has no effect: the run has 19073 steps"),
        ("--trace 1:2 --trace-ranks 3 7", "--trace-ranks 3 7: there are only ranks 0 to 1"),
        ("--trace-ranks 1", "--trace-ranks has no effect without --trace"),
        ("--track.wandb disabled --track.tags a b", "have no effect with --track.wandb disabled"),
        ("--sample.every None --sample.tokens 5", "have no effect with --sample.every None"),
        ("--validate.hellaswag-every 5", "have no effect without --validate.hellaswag"),
        ("--validate.hellaswag-items 5", "have no effect without --validate.hellaswag"),
        ("--validate.hellaswag x --validate.hellaswag-every None", "no effect with --validate.hellaswag-every None"),
        ("--optim.warmdown-fraction 0.5", "has no effect with --optim.schedule cosine"),
        ("--optim.average-fraction 1e-5", "--optim.average-fraction 1e-05 has no effect: it is of one step's weights"),
        (
            "--optim.name muon --optim.momentum 0.85 --optim.momentum-warmup-steps 9",
            "--optim.momentum-warmup-steps has no effect with --optim.momentum 0.85",
        ),
        ("--optim.momentum 0.9", "--optim.momentum and --optim.momentum-warmup-steps have no effect without"),
        ("--optim.schedule constant --optim.lr-final 1e-5 --optim.warmup-steps 0", "--optim.lr-final"),
        ("--optim.average-decay 0.9", "--optim.average-decay 0.9 has no effect without --optim.average-fraction"),
        ("--train.dtype tf32", "--train.dtype tf32 has no effect on a CPU"),
        ("--train.loss-chunk-tokens 99", "--train.loss-chunk-tokens 99 has no effect with --train.loss plain"),
        ("--train.attention-backend cudnn --model.attention naive", "no effect with --model.attention naive"),
        ("--preflight --dry-run", "--preflight has no effect with --dry-run"),
    ],
)
def test_every_setting_without_effect_is_named(flags: str, message: str) -> None:
    (line,) = settings_without_effect(parsed(*flags.split()), "cpu", 2, "ddp")
    assert message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optim.name muon --model.kind heads", "--model.kind heads does not have; use --optim.name adamw"),
        ("--optim.head-lr 1e-3", "--optim.head-lr 0.001: with --model.tie the head is the embedding"),
        ("--optim.embedding-lr 0", "--optim.embedding-lr 0.0 must be more than 0"),
        ("--optim.vector-lr inf", "--optim.vector-lr inf must be a finite number"),
        ("--optim.momentum 1", "--optim.momentum 1.0 must lie in [0, 1)"),
        ("--optim.momentum-warmup-steps -1", "--optim.momentum-warmup-steps -1 must not be negative"),
    ],
)
def test_what_muon_cannot_be_is_refused(flags: str, message: str) -> None:
    assert message in refusal(*flags.split())
    assert parsed("--optim.name", "muon", "--model.no-tie", "--optim.head-lr", "1e-3").optim.head_lr == 1e-3


def test_a_window_and_dropout_out_of_range_are_refused() -> None:
    text = refusal("shakespeare-char-cpu", "--model.window", "65", "--model.dropout", "1")
    assert "--model.window 65 must lie between 1 and --train.seq-len 64" in text
    assert "--model.dropout 1.0 must lie in [0, 1)" in text
    config = parsed("shakespeare-char-cpu", "--train.seq-len", "2048", "--train.batch-tokens", "2048")
    assert config.model.window is None and config.model.dropout == 0
    assert parsed("shakespeare-char-cpu", "--model.window", "64").model.window == 64


def test_switches_are_flags() -> None:
    config = parsed(
        *("--model.position-embedding", "rope", "--model.norm", "rmsnorm", "--model.mlp", "swiglu", "--model.no-tie"),
        *("--model.no-bias", "--model.qk-norm", "--model.logit-softcap", "30", "--model.value-residual"),
        *("--model.zero-init-projections", "--model.attention", "naive", "--model.mlp-width", "1024"),
    )
    model = config.model
    assert (model.position_embedding, model.norm, model.mlp, model.attention) == ("rope", "rmsnorm", "swiglu", "naive")
    assert (model.tie, model.bias, model.qk_norm, model.value_residual) == (False, False, True, True)
    assert (model.zero_init_projections, model.logit_softcap, model.resolved_mlp_width) == (True, 30.0, 1024)
    text = refusal("--model.norm", "none", "--model.norm-place", "post", "--model.num-heads", "7")
    assert text.startswith("2 faults:") and "--model.norm-place post says where norms stand" in text


def command(*args: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run `python train/main.py ARGS`; tests/e2e/test_commands.py starts a real one."""
    return called(main, *args, **env)


def test_dry_run_prints_the_card_without_data_or_traces(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = command("--dry-run", "--run-dir", str(run_dir), "--data.dir", str(tmp_path / "none"), WORLD_SIZE="8")
    assert done.returncode == 0, done.stderr
    assert "124,439,808 parameters (+36,096 vocabulary padding)" in done.stdout
    assert "524,288 tokens = 8 processes x 64 (micro-batch auto) sequences x 1024" in done.stdout
    assert "19,073 steps = 9,999,745,024 tokens" in done.stdout
    assert "not there yet" in done.stdout
    assert not run_dir.exists()


def test_dry_run_refuses_what_the_run_would(tmp_path: Path, tiny_data: Path) -> None:
    run_dir = tmp_path / "run"
    args = [*tiny_flags(tiny_data, run_dir), "--train.steps", "12", "--sample.every", "None"]
    run(parsed(*args), ProcessGroup(0, 1, torch.device("cpu")))
    files = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for flags, message in (
        (["--seed", "3"], "is another run: --seed 3 (was 1337)"),
        (["--no-resume"], "holds checkpoints; drop --no-resume"),
        (["--from-checkpoint", "runs/nope"], "no such run directory or checkpoint"),
        (["--data.skip-sequences", "3", "1000"], "--data.skip-sequences 1000: the training split has 562 sequences"),
        (["--train.seq-len", "20480", "--train.batch-tokens", "245760"], "less than one sequence"),
    ):
        elsewhere = [] if flags[0] in ("--seed", "--no-resume") else ["--run-dir", str(tmp_path / "new")]
        done = command(*args, "--dry-run", *flags, *elsewhere)
        assert done.returncode == 2 and message in done.stderr, (flags, done.stdout, done.stderr)
    refused = command(*args, "--no-resume")
    assert refused.returncode == 2 and "drop --no-resume" in refused.stderr
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == files
    assert not (tmp_path / "new").exists()


def test_ranks_other_than_the_first_are_silent() -> None:
    assert command("--data.dir", "nowhere", "--dry-run", RANK="1", WORLD_SIZE="2").stdout == ""
    done = command("--optim.lr-pek", "1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert command("gpt3", RANK="1", WORLD_SIZE="2").stderr == ""
