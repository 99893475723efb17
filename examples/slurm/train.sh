#!/usr/bin/env bash
# Trains a recipe on one or more nodes of 8 GPUs, and resumes by itself after a time limit or a pre-emption:
#
#     sbatch --nodes 1 examples/slurm/train.sh pra-l-256 /shared/runs/l --data imagenet-tar:/data/ILSVRC2012_img_train.tar
#     sbatch --nodes 2 examples/slurm/train.sh pra-l-256 /shared/runs/l --data imagenet-tar:/data/ILSVRC2012_img_train.tar
#
# The first two words are the recipe and the run's folder, on a disk that all nodes see; the rest goes to `pra train`.
# A run that was begun on one node may resume on two, and back. Put your cluster's partition and account below.

#SBATCH --job-name=pra
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Ten minutes before the limit, SLURM tells all processes to finish their step, save and end.
#SBATCH --signal=TERM@600

set -uo pipefail
recipe=${1:?which recipe?}
run=${2:?which folder is the run?}
shift 2

# A checkpoint newer than this file, by the clock of the same disk, means that the job made progress.
mkdir -p "$(dirname "$run")"
mark=$(mktemp "$(dirname "$run")/.begun.XXXXXX")
trap 'rm -f "$mark"' EXIT
trap : TERM # the processes get the signal too; this script waits for their end

# torchrun restarts lost processes; if torchrun ends on any node, the job ends.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 # seconds that torchrun gives the processes to save
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m pra train "$recipe" --run-dir "$run" "$@"
code=$?

# Stopped before the end but with progress: queue again. A job that cannot start at all is not queued again.
if [ "$code" -ne 0 ] && [ -n "$(find "$run/checkpoints" -maxdepth 1 -name 'step-*' -newer "$mark" 2>/dev/null)" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
