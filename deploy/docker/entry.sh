#!/bin/sh
# Entry point of both images: completes a command with what the environment says, and gives loscar this process's place,
# so that signals reach it. Read from the environment, all of them optional:
#   LOSCAR_SECURITY    options for TLS, split at spaces (server, worker)
#   LOSCAR_ARGS        further options, split at spaces (server, worker)
#   LOSCAR_SERVERS     a worker's servers, HOST:PORT[,HOST:PORT], with ; between those of several shards
#   LOSCAR_NAME        a worker's name; default: the host's name, which a container keeps when it is started again
#   LOSCAR_STATE_DIR   a worker saves its state here, and resumes from it
#   LOSCAR_MODEL_DIR   a worker saves the model here when it leaves
#   LOSCAR_LINK        a worker reaches its servers through an emulated link like this, one for each server
#   LOSCAR_OVERLAY_…   which of the files deploy/compose.*.yaml a worker was started with
set -euf

wrong_files() {
    echo "loscar: $1" >&2
    exit 3
}

case ${1:-} in
server)
    # shellcheck disable=SC2086  # these are split on purpose
    exec loscar "$@" ${LOSCAR_SECURITY:-} ${LOSCAR_ARGS:-}
    ;;
worker) shift ;;
*) exec loscar "$@" ;;
esac

# Compose itself puts any files together. Left alone, these would have servers that no worker can reach.
if [ -n "${LOSCAR_OVERLAY_SHARDS:-}" ] && [ -n "${LOSCAR_OVERLAY_STANDBY:-}" ]; then
    wrong_files "compose.shards.yaml and compose.standby.yaml do not go together"
fi
if [ -n "${LOSCAR_OVERLAY_TLS:-}" ]; then
    if [ -n "${LOSCAR_OVERLAY_SHARDS:-}" ] && [ -z "${LOSCAR_OVERLAY_SHARDS_TLS:-}" ]; then
        wrong_files "compose.tls.yaml and compose.shards.yaml need compose.shards.tls.yaml too"
    fi
    if [ -n "${LOSCAR_OVERLAY_STANDBY:-}" ] && [ -z "${LOSCAR_OVERLAY_STANDBY_TLS:-}" ]; then
        wrong_files "compose.tls.yaml and compose.standby.yaml need compose.standby.tls.yaml too"
    fi
fi

name=${LOSCAR_NAME:-$(hostname)}
servers=${LOSCAR_SERVERS:-}
if [ -n "${LOSCAR_LINK:-}" ] && [ -n "$servers" ]; then
    linked=
    port=50061
    for shard in $(echo "$servers" | tr ';' ' '); do
        addresses=
        for server in $(echo "$shard" | tr , ' '); do
            pipe=/tmp/link-$port
            rm -f "$pipe"
            mkfifo "$pipe"
            loscar link "$LOSCAR_LINK" --listen "127.0.0.1:$port" --to "$server" >"$pipe" &
            # It says one line when it listens; if it ends instead, this ends with its exit status.
            read -r line <"$pipe" || wait $!
            echo "$line"
            addresses=${addresses:+$addresses,}127.0.0.1:$port
            port=$((port + 1))
        done
        linked=${linked:+$linked;}$addresses
    done
    servers=$linked
fi
# shellcheck disable=SC2086
exec loscar worker --name "$name" ${servers:+--server "$servers"} \
    ${LOSCAR_STATE_DIR:+--state "$LOSCAR_STATE_DIR/$name.state"} \
    ${LOSCAR_MODEL_DIR:+--save-model "$LOSCAR_MODEL_DIR/$name.safetensors"} \
    "$@" ${LOSCAR_SECURITY:-} ${LOSCAR_ARGS:-}
