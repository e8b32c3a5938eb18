#!/usr/bin/env bash
# Train a grid of runs: each run is a task of an array, with its own run directory and its own node.
#
#   sbatch --account A --partition P --array=0-3%2 slurm/sweep.sh gpt2-small --grid optim.lr-peak=6e-4,1e-3 seed=1,2
#   sbatch --account A --array=0-2 slurm/sweep.sh gpt2-small --grid seed=1,2,3 -- --train.steps 2000 --run-dir runs/seeds
#
# `python3 launch/grid.py` with the same arguments lists the runs. %2 lets two of them train at a time. Flags after --
# are train/main.py's. Each task comes back like any job (docs/cluster.md), and the same sbatch trains what is not done.
#SBATCH --job-name=sweep
#SBATCH --array=0
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --gres=gpu:8 --cpus-per-task=32
#SBATCH --time=12:00:00 --signal=B:USR1@300
#SBATCH --requeue --open-mode=append --output=%x-%A_%a.log

body=${SLURM_SUBMIT_DIR:-.}/slurm/body.sh # this script runs from a copy elsewhere
[ -r "$body" ] || { echo "slurm: $body is not there: submit from the root of the checkout" >&2 && exit 2; }
# shellcheck source=slurm/body.sh
. "$body"
sweep "$@"
