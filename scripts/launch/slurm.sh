#!/bin/bash
# SLURM, nodes with GPUs. From the checkout's root:   sbatch scripts/launch/slurm.sh
#
# Before, on the login node (compute nodes often have no way to the internet):
#   python -m venv .venv && .venv/bin/pip install -e '.[gpu]'
#   .venv/bin/hf download meta-llama/Llama-2-7b-hf --local-dir models/Llama-2-7b-hf
#
# 1. EDIT: where to run. Whole nodes, and as many tasks on each as it has GPUs: JAX, which reads SLURM's
#    variables, gives task i of a node the node's GPU i. --gpus-per-task would hide the others and break that.
#SBATCH --job-name=main-jax
#SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --gres=gpu:8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#
# Not to edit. SIGTERM to the tasks (not to this script) before the time is up: long enough to write one
# checkpoint; it may come 60 s earlier. Before a preemption SLURM sends its own, with the cluster's GraceTime.
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=main-jax-%j.log
set -uo pipefail

# 2. EDIT: what to run. Everything is on a file system that all nodes see; with models fetched before, the
#    hub need not be asked.
source .venv/bin/activate
export HF_HUB_OFFLINE=1
CONFIG=configs/llama-2-7b-8xh100.yaml
MODEL=models/Llama-2-7b-hf
SEED_PATH=data/seed.jsonl
RESPONSES_PATH=data/responses.parquet
OUTPUT_DIR=runs/llama-2-7b

# ------------------------------------------------------------------------------ nothing to edit below

# SIGTERM to this script itself comes when the job is ended (scancel, or SLURM requeues it by itself):
# then it is not ours to queue it again. The trap runs once srun has ended.
ended=''
trap 'ended=yes' TERM

# Tasks leave one after the other once all is saved: the first must not have the others killed.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    main-jax run "$CONFIG" --output_dir "$OUTPUT_DIR" --model_name_or_path "$MODEL" \
    --data.seed_path "$SEED_PATH" --data.responses_path "$RESPONSES_PATH"
code=$?

if [ "$code" -eq 75 ] && [ -z "$ended" ]; then
    echo "slurm.sh: stopped with everything saved; queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
