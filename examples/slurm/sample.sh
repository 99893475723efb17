#!/usr/bin/env bash
# 50,000 images of a run by 8 GPUs, and their figures. Killed on the way, the same command makes what is missing:
#
#     sbatch examples/slurm/sample.sh /shared/runs/l /shared/l-50k.npz /data/VIRTUAL_imagenet256_labeled.npz

#SBATCH --job-name=pra-sample
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
run=${1:?which run?}
images=${2:?which FILE.npz is to be written?}
reference=${3:?which reference, a data source or FILE.npz?}

[ -e "$images" ] || srun --kill-on-bad-exit=1 torchrun --nproc-per-node 8 -m pra -- sample "$run" --num 50000 --out "$images"
srun --kill-on-bad-exit=1 torchrun --nproc-per-node 8 -m pra eval "$images" --reference "$reference" --out "${images%.npz}.json"
