#!/usr/bin/env bash
# Train GPT-2 small, 124M parameters, on 10B tokens of FineWeb-Edu (preset gpt2-small).
#
#   sbatch --account A --partition P slurm/gpt2_small.sh
#   sbatch --account A --nodes 4 slurm/gpt2_small.sh --optim.lr-peak 1e-3 --run-dir runs/hot
#
# 8.5e18 FLOPs: 0.75 hours on 8 H100 at 40 % of their peak. Flags before the script are sbatch's and override those
# here; arguments after the script are train/main.py's. The job comes back after preemption, at its time limit and after
# a crash (docs/cluster.md).
#SBATCH --job-name=gpt2-small
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --gres=gpu:8 --cpus-per-task=32
#SBATCH --time=12:00:00 --signal=B:USR1@300
#SBATCH --requeue --open-mode=append --output=%x-%j.log

body=${SLURM_SUBMIT_DIR:-.}/slurm/body.sh # this script runs from a copy elsewhere
[ -r "$body" ] || { echo "slurm: $body is not there: submit from the root of the checkout" >&2 && exit 2; }
# shellcheck source=slurm/body.sh
. "$body"
train gpt2-small "$@"
