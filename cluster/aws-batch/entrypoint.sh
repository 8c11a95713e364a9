#!/usr/bin/env bash
# Runs on every node of an AWS Batch job, multi-node or single: Ray's head and the merge on the main
# node, a Ray worker on each other one.
#
#     DELLA_CONFIG    the text of the YAML
#     DELLA_OUT       where to write, such as s3://BUCKET/merged/70b
#     DELLA_DEVICE    cpu (default) or cuda
#     DELLA_THREADS, DELLA_MEMORY    of one actor: 4, 8GiB
#     RAY_AUTH_TOKEN  a secret, the same on all nodes
set -euo pipefail

: "${DELLA_CONFIG:?}" "${DELLA_OUT:?}" "${RAY_AUTH_TOKEN:?}"
export RAY_AUTH_MODE=token
device=${DELLA_DEVICE:-cpu}
threads=${DELLA_THREADS:-4}
memory=${DELLA_MEMORY:-8GiB}
nodes=${AWS_BATCH_JOB_NUM_NODES:-1}
cpus=$(nproc)
if [ "$device" = cuda ]; then
    gpus=$(nvidia-smi --list-gpus | wc -l)
    workers=$((nodes * gpus))
else
    gpus=0
    workers=$((nodes * (cpus / threads)))
fi

# Actors return digests, never tensors: the object store stays all but empty.
ray_start=(ray start "--num-cpus=$cpus" "--num-gpus=$gpus" --object-store-memory=268435456
    --disable-usage-stats --block)

wait_for_head() {
    local tries
    for ((tries = ${DELLA_TRIES:-60}; tries > 0; tries--)); do
        ray status --address="$1" > /dev/null 2>&1 && return
        sleep 5
    done
    echo "entrypoint.sh: no Ray answers at $1." >&2
    exit 1
}

if [ "${AWS_BATCH_JOB_NODE_INDEX:-0}" != "${AWS_BATCH_JOB_MAIN_NODE_INDEX:-0}" ]; then
    head=$AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS:6379
    wait_for_head "$head"
    # Batch stops this node when the main node has ended; Ray drains on SIGTERM.
    exec "${ray_start[@]}" --address="$head"
fi

config=$(mktemp --suffix=.yaml)
printf '%s\n' "$DELLA_CONFIG" > "$config"

# shellcheck disable=SC2329 # the trap calls it
clean_up() {
    jobs -p | xargs --no-run-if-empty kill -TERM 2> /dev/null || true
    wait
    rm -f "$config"
}
trap clean_up EXIT

"${ray_start[@]}" --head --port=6379 --include-dashboard=false &
wait_for_head "127.0.0.1:6379"

# Before the merge starts, lest a signal ends this script in between. A trapped signal ends `wait`
# early, without the status of what it waited for: wait again.
interrupted=true
trap 'interrupted=true; kill -TERM "$!" 2> /dev/null' TERM INT
della-dist merge "$config" "$DELLA_OUT" --engine ray --address auto --device "$device" \
    --workers "$workers" --threads "$threads" --memory "$memory" --json &
merge=$!
status=0
while $interrupted; do
    interrupted=false
    status=0
    wait "$merge" || status=$?
done
exit "$status"
