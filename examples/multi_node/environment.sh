#!/usr/bin/env bash
# What torchrun.sh and slurm.sh set on every node before training; sourced, not run. A value that is set already stays.

# Grow memory segments in place: models near the size of the GPU otherwise end in fragments (torch >= 2.9; before that
# the name was PYTORCH_CUDA_ALLOC_CONF).
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# One hardware queue: Megatron relies on its order to start a collective before the product that hides it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# NCCL: say what goes wrong. Where it picks the wrong network, name the right one: NCCL_SOCKET_IFNAME=eth0 for its
# bootstrap, NCCL_IB_HCA=mlx5 for InfiniBand.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

# A store of its own for every restart: with the shared one that torchrun (2.11) keeps, a process that was started again
# may look for the others where they were before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
