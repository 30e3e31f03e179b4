#!/usr/bin/env bash
# Fine-tune on several nodes: start the same line on each of them, in any order, within ten minutes.
#
#   NNODES=2 MASTER_ADDR=node0 bash examples/multi_node/torchrun.sh CONFIG.yaml [key=value ...]
#
# NNODES        how many nodes
# MASTER_ADDR   host name or address of one of them, the same on all; MASTER_PORT (29500) must be free there
# GPUS_PER_NODE processes on this node (default: its GPUs, or 1)
# JOB_ID        any word, the same on all nodes; another for another run that shares MASTER_ADDR (default: finetune)
# MAX_RESTARTS  how often all processes are started again after one has died (default: 3)
# LOG_DIR       each process's output: LOG_DIR/<job and attempt>/<rank on this node>/std{out,err}.log (default: logs)
# LOCAL_ADDR    this node's address, where others cannot resolve its host name (default: the host name)
#
# Each start goes on from the newest complete checkpoint under `save`, which must be on a file system that all nodes
# share, as `load` and the token files must.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${NNODES:?set it to the number of nodes}" "${MASTER_ADDR:?set it to the host name of one node}"
[ $# -ge 1 ] || { echo "usage: NNODES=N MASTER_ADDR=HOST bash $0 CONFIG.yaml [key=value ...]" >&2; exit 2; }
# shellcheck source=examples/multi_node/environment.sh
source "$here/environment.sh"

python=${PYTHON:-python}
if [ -z "${GPUS_PER_NODE:-}" ]; then
    GPUS_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
    [ "$GPUS_PER_NODE" -gt 0 ] || GPUS_PER_NODE=1
fi
address=()
[ -z "${LOCAL_ADDR:-}" ] || address=(--local-addr "$LOCAL_ADDR")

# torchrun passes a SIGTERM on, but kills its processes half a minute later, and a large model's step takes longer. So it
# runs in a session of its own, where it gets none, and the signal goes to its processes alone: they finish the step,
# save it, and end.
setsid "$python" -m torch.distributed.run \
    --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id "${JOB_ID:-finetune}" \
    "${address[@]}" --max-restarts "${MAX_RESTARTS:-3}" \
    --log-dir "${LOG_DIR:-logs}" --tee 3 --local-ranks-filter 0 \
    "$here/../../tools/finetune.py" "$@" &
launcher=$!
trap 'pkill -TERM -P "$launcher"' TERM INT
status=129
while [ "$status" -gt 128 ]; do # a signal ends the waiting, not the launcher
    status=0
    wait "$launcher" || status=$?
done
exit "$status"
