#!/usr/bin/env bash
# One machine with GPUs: runs, and runs again after exit code 75 (stopped, everything saved).
#
#   pip install 'main-jax[gpu]'                 from a checkout: pip install -e '.[gpu]'
#   bash scripts/launch/multi_gpu.sh            Ctrl-C or SIGTERM: saves and ends; the same command continues
#
# One process drives all GPUs that it sees; there is nothing to set up. A process for each GPU computes the
# same; it serves to rehearse a run over several machines, and where one process cannot feed eight GPUs:
#   main-jax launch --num-processes 8 --gpus-per-process 1 -- run configs/llama-2-7b-8xh100.yaml
set -uo pipefail

# 1. EDIT: where to run: which GPUs, and the folder of the results, which is also where a run continues.
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1,2,3,4,5,6,7}
OUTPUT_DIR=runs/llama-2-7b

# 2. EDIT: what to run. MODEL is a hub name or a folder. A gated model wants `hf auth login` or HF_TOKEN;
#    without a connection: `hf download meta-llama/Llama-2-7b-hf --local-dir DIR` before, and DIR here.
CONFIG=configs/llama-2-7b-8xh100.yaml
MODEL=meta-llama/Llama-2-7b-hf
SEED_PATH=data/seed.jsonl
RESPONSES_PATH=data/responses.parquet

# ------------------------------------------------------------------------------ nothing to edit below

# The run is in the background, so that bash hears a signal at once and passes it on.
child='' asked=''
trap 'asked=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
while :; do
    main-jax run "$CONFIG" --output_dir "$OUTPUT_DIR" --model_name_or_path "$MODEL" \
        --data.seed_path "$SEED_PATH" --data.responses_path "$RESPONSES_PATH" &
    child=$!
    wait "$child"
    while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, and the run is still saving
        wait "$child"
    done
    wait "$child"
    code=$?
    if [ "$code" -ne 75 ] || [ -n "$asked" ]; then
        exit "$code"
    fi
    echo "multi_gpu.sh: stopped with everything saved; continuing" >&2
    sleep "${PAUSE:-5}"
done
