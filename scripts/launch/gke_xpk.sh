#!/usr/bin/env bash
# GKE through xpk (pip install xpk), which writes and submits a JobSet like gke_jobset.yaml by itself.
#
#   docker build -f scripts/launch/Dockerfile -t IMAGE . && docker push IMAGE
#   bash scripts/launch/gke_xpk.sh              submit; xpk prints where the logs are
#   bash scripts/launch/gke_xpk.sh list         how it stands
#   bash scripts/launch/gke_xpk.sh delete       end it; what is saved stays in the bucket
set -euo pipefail

# 1. EDIT: where to run: a cluster with xpk (`xpk cluster create`), and a slice that it has.
PROJECT=my-project
ZONE=us-east5-a
CLUSTER=my-cluster
NAME=main-7b
TPU_TYPE=v5p-16 # 8 chips of v5p; v5litepod-32 is 32 of v5e
IMAGE=us-docker.pkg.dev/my-project/my-repository/main-jax:latest

# 2. EDIT: what to run. Each machine fetches a hub name by itself (HF_TOKEN in your shell is passed on and
#    stands in the workload's description); a model in a bucket is mounted by `xpk storage attach`.
CONFIG=configs/llama-2-7b-v5p.yaml
MODEL=meta-llama/Llama-2-7b-hf
SEED_PATH=gs://my-bucket/main/data/seed.jsonl
RESPONSES_PATH=gs://my-bucket/main/data/responses.parquet
OUTPUT_DIR=gs://my-bucket/main/runs/llama-2-7b

# ------------------------------------------------------------------------------ nothing to edit below

at=(--cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE")
case ${1:-run} in
run) ;;
list) exec xpk workload list "${at[@]}" ;;
delete) exec xpk workload delete --workload "$NAME" "${at[@]}" ;;
*)
    echo "usage: gke_xpk.sh [list | delete]" >&2
    exit 2
    ;;
esac

# exec: xpk passes SIGTERM to the process that it started. Of itself xpk restarts after 42 and 127 to 255
# (killed, a machine lost); 75 is added; after 1 and 2 the workload has failed.
# The long timeout: after a restart some machines come much later than others.
command="exec main-jax run $CONFIG --output_dir $OUTPUT_DIR --model_name_or_path $MODEL \
--data.seed_path $SEED_PATH --data.responses_path $RESPONSES_PATH --distributed auto \
--initialization-timeout 3600"

xpk workload create --workload "$NAME" "${at[@]}" --tpu-type "$TPU_TYPE" --num-slices 1 \
    --docker-image "$IMAGE" --max-restarts 100 --restart-on-exit-codes 75 \
    --termination-grace-period-seconds 600 --env "HF_TOKEN=${HF_TOKEN:-}" --command "$command"
