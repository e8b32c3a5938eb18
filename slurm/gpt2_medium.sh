#!/usr/bin/env bash
# Train GPT-2 medium, 355M parameters, on 31B tokens of FineWeb-Edu (preset gpt2-medium).
#
#   sbatch --account A --partition P slurm/gpt2_medium.sh
#   sbatch --account A --nodes 4 slurm/gpt2_medium.sh --optim.lr-peak 4e-4 --run-dir runs/medium-hot
#
# 7.6e19 FLOPs: 6.7 hours on 8 H100 at 40 % of their peak. slurm/gpt2_small.sh explains the flags.
#SBATCH --job-name=gpt2-medium
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --gres=gpu:8 --cpus-per-task=32
#SBATCH --time=24:00:00 --signal=B:USR1@300
#SBATCH --requeue --open-mode=append --output=%x-%j.log

body=${SLURM_SUBMIT_DIR:-.}/slurm/body.sh # this script runs from a copy elsewhere
[ -r "$body" ] || { echo "slurm: $body is not there: submit from the root of the checkout" >&2 && exit 2; }
# shellcheck source=slurm/body.sh
. "$body"
train gpt2-medium "$@"
