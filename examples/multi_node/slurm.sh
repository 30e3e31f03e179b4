#!/usr/bin/env bash
# Fine-tune on several nodes under Slurm, from the repository's root:
#
#   mkdir -p logs && sbatch --nodes 2 examples/multi_node/slurm.sh CONFIG.yaml [key=value ...]
#
# Slurm sends SIGTERM ten minutes before the time is up: the step that runs is finished and saved. To go on, submit the
# same line again; --dependency=singleton lines up several such jobs.
#SBATCH --job-name=finetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --output=logs/%x-%j.out
set -euo pipefail
root=${SLURM_SUBMIT_DIR:?start this with sbatch, in the root of the repository}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR NNODES="$SLURM_JOB_NUM_NODES" JOB_ID="$SLURM_JOB_ID" LOG_DIR="${LOG_DIR:-$root/logs/$SLURM_JOB_ID}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
export GPUS_PER_NODE="${GPUS_PER_NODE:-8}"

# One launcher a node, which starts a process for each of its GPUs. A node that is lost ends the job.
srun --kill-on-bad-exit=1 bash "$root/examples/multi_node/torchrun.sh" "$@"
