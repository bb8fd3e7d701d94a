#!/usr/bin/env bash
# One job of several processes, a process for each GPU, started by torchrun.
#   bash scripts/torchrun.sh PROCESSES COMMAND [ARGUMENTS OF seqlit ...]
#   bash scripts/torchrun.sh 2 fit --config configs/sasrec_cce/online_retail.yaml --config configs/trainer/ddp.yaml
# On several machines, at the same time and in the same folder of a shared disk, with NODE_RANK 0, 1, ...:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=<name of the machine with NODE_RANK 0> bash scripts/torchrun.sh 8 fit --config ...
set -euo pipefail

if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "torchrun.sh: first the number of processes of this machine, then a command of seqlit, got: $*" >&2
  exit 2
fi
processes=$1
shift
nodes=${NNODES:-1}

if [ "$nodes" -eq 1 ]; then
  meeting=(--standalone) # at a free port
else
  meeting=(--nnodes "$nodes" --node-rank "${NODE_RANK:?0 on the first machine}"
    --master-addr "${MASTER_ADDR:?name of the first machine}" --master-port "${MASTER_PORT:-29500}")
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$here/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # of each process

# exec: a signal that ends the job reaches torchrun, which hands it on.
exec torchrun "${meeting[@]}" --nproc-per-node "$processes" --no-python \
  seqlit "$@" --trainer.devices "$processes" --trainer.num_nodes "$nodes"
