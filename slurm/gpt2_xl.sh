#!/usr/bin/env bash
# Train GPT-2 XL, 1558M parameters, on 34B tokens of FineWeb-Edu (preset gpt2-xl).
#
#   sbatch --account A --partition P slurm/gpt2_xl.sh
#   sbatch --account A --nodes 8 slurm/gpt2_xl.sh --run-dir runs/xl-8-nodes
#
# 3.5e20 FLOPs: 30 hours on 8 H100 at 40 % of their peak, so 7.5 hours on the 4 nodes here at the same use. Weights,
# gradients and optimizer take 25 GB of each GPU. slurm/gpt2_small.sh explains the flags.
#SBATCH --job-name=gpt2-xl
#SBATCH --nodes=4 --ntasks-per-node=1
#SBATCH --gres=gpu:8 --cpus-per-task=32
#SBATCH --time=24:00:00 --signal=B:USR1@300
#SBATCH --requeue --open-mode=append --output=%x-%j.log

body=${SLURM_SUBMIT_DIR:-.}/slurm/body.sh # this script runs from a copy elsewhere
[ -r "$body" ] || { echo "slurm: $body is not there: submit from the root of the checkout" >&2 && exit 2; }
# shellcheck source=slurm/body.sh
. "$body"
train gpt2-xl "$@"
