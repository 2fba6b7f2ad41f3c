#!/usr/bin/env bash
# A Cloud TPU slice (v4, v5e, v5p, v6e), driven from your own machine: asks for it, installs, runs one command
# on all its workers until the run is done, and asks for a new slice when this one is taken away.
#
#   ssh-add ~/.ssh/google_compute_engine        once; gcloud reaches several workers through the ssh agent
#   bash scripts/launch/tpu_pod.sh              from the checkout's root; it may be stopped and called again
#   bash scripts/launch/tpu_pod.sh fetch        results.json and the final model, to runs/
#   bash scripts/launch/tpu_pod.sh delete       gives the slice back; until then it costs
set -uo pipefail

# 1. EDIT: where to run.
PROJECT=my-project
ZONE=us-east5-a
NAME=main-7b
TYPE=v5p-16                # 8 chips of v5p, 2 workers; v5litepod-32 is 32 chips of v5e, 8 workers
RUNTIME=v2-alpha-tpuv5     # v5e: v2-alpha-tpuv5-lite; v6e: v2-alpha-tpuv6e; v4: tpu-ubuntu2204-base
CAPACITY=--spot            # or --reserved; empty: on demand

# 2. EDIT: what to run. All workers must see OUTPUT_DIR and the data, so they are in a bucket (of the same
#    region, to which the slice's service account may write). MODEL is a hub name, which each worker fetches
#    (HF_TOKEN in your shell is passed on), or a folder gs://..., which is copied to each worker's disk.
CONFIG=configs/llama-2-7b-v5p.yaml
MODEL=meta-llama/Llama-2-7b-hf
SEED_PATH=gs://my-bucket/main/data/seed.jsonl
RESPONSES_PATH=gs://my-bucket/main/data/responses.parquet
OUTPUT_DIR=gs://my-bucket/main/runs/llama-2-7b

# ------------------------------------------------------------------------------ nothing to edit below

tpus() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }
on_all_workers() { tpus tpu-vm ssh "$NAME" --worker=all --command="$1"; }
request() { tpus queued-resources describe "$NAME" --format='value(state.state)' 2>/dev/null; }
ready() { [ "$(tpus tpu-vm describe "$NAME" --format='value(state)' 2>/dev/null)" = READY ]; }
pause() { sleep "${PAUSE:-60}"; }

# Returns when there is a slice. A request serves for one slice: after a preemption it is SUSPENDED.
create() {
    while :; do
        case $(request) in
        ACTIVE) ready && return ;;
        '')
            tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
                --runtime-version="$RUNTIME" ${CAPACITY:+"$CAPACITY"} || [ -n "$(request)" ] || exit
            ;;
        SUSPENDED | FAILED) tpus queued-resources delete "$NAME" --force --quiet || exit ;;
        esac
        pause
    done
}

# This checkout, its configs and what follows, on every worker.
install() {
    local files code
    files=$(mktemp -d)
    cp -r "$(dirname "$CONFIG")" "$files/configs"
    HF_TOKEN=${HF_TOKEN:-}
    export HF_TOKEN
    declare -p MODEL SEED_PATH RESPONSES_PATH OUTPUT_DIR HF_TOKEN >"$files/settings.sh"
    echo "CONFIG=configs/$(basename "$CONFIG")" >>"$files/settings.sh"
    cat >"$files/install.sh" <<'END'
set -e
source settings.sh
if kill -0 "$(cat pid 2>/dev/null)" 2>/dev/null; then exit; fi # the run is on: leave its program alone
python3 -m pip install --quiet --user uv # the slices' own Python is 3.10
[ -d main-jax ] || python3 -m uv venv --quiet --python 3.12 main-jax
wheel=$(ls -t "$PWD"/main_jax-*.whl | head -n 1)
python3 -m uv pip install --quiet --python main-jax/bin/python \
    --reinstall-package main-jax "${wheel}[tpu]" gcsfs
case $MODEL in gs://*)
    [ -d model ] || main-jax/bin/python -c \
        'import gcsfs, sys; gcsfs.GCSFileSystem().get(*sys.argv[1:], recursive=True)' "${MODEL%/}/" model.new/
    [ -d model ] || mv model.new model
    ;;
esac
END
    cat >"$files/main.sh" <<'END'
source settings.sh
case $MODEL in gs://*) MODEL=model ;; esac
main-jax/bin/main-jax run "$CONFIG" --output_dir "$OUTPUT_DIR" \
    --model_name_or_path "$MODEL" --data.seed_path "$SEED_PATH" \
    --data.responses_path "$RESPONSES_PATH" --distributed auto
echo $? >"code-$1"
END
    # gcloud repeats a command where the connection broke. So: start the run unless it is there, and follow
    # it. If it has ended without an exit code, the machine was shut down under it.
    cat >"$files/follow.sh" <<'END'
if [ ! -e "code-$1" ] && ! kill -0 "$(cat pid 2>/dev/null)" 2>/dev/null; then
    : >log # it must be there before tail looks
    nohup bash -c "$(cat main.sh)" main.sh "$1" >log 2>&1 </dev/null &
    echo $! >pid
fi
tail -n +1 -f --pid="$(cat pid)" log
exit "$(cat "code-$1" 2>/dev/null || echo 75)"
END
    python3 -m pip wheel --quiet --no-deps --wheel-dir "$files" . &&
        tpus tpu-vm scp --recurse "$files"/* "$NAME:" --worker=all && on_all_workers 'bash install.sh'
    code=$?
    rm -r "$files"
    return "$code"
}

# Until it is done. What gcloud returns is the exit code of the first worker that has one; 255 is ssh's own.
run() {
    local attempt code
    attempt=$(date +%s)
    while :; do
        create
        install && on_all_workers "bash follow.sh $attempt"
        code=$?
        [ "$code" -ne 0 ] || break
        echo "tpu_pod.sh: exit code $code; is the slice still there?" >&2
        pause # until a preemption shows
        case $code in
        75) attempt=$((attempt + 1)) ;; # stopped, everything saved: the same command once more
        255) ;;                         # no connection: look again
        *) ready && exit "$code" ;;
        esac
    done
}

case ${1:-run} in
run) run ;;
fetch)
    here=runs/$(basename "$OUTPUT_DIR")
    mkdir -p "$here"
    gcloud storage cp --recursive "$OUTPUT_DIR/results.json" "$OUTPUT_DIR/hf" "$here/"
    ;;
delete) tpus queued-resources delete "$NAME" --force --quiet ;;
*)
    echo "usage: tpu_pod.sh [fetch | delete]" >&2
    exit 2
    ;;
esac
