#!/bin/sh
# A container's health, asked for by gRPC with `loscar status`: a server answers; a worker is a member of the run at one
# of its servers. usage: loscar-health server|worker
# LOSCAR_PROBE holds the options of a client of the server, for TLS; a worker uses its own, LOSCAR_SECURITY.
set -uf

# shellcheck disable=SC2086  # options are split on purpose
case ${1:-} in
server)
    exec loscar status --json --server "${LOSCAR_SERVER:-127.0.0.1:50051}" ${LOSCAR_PROBE:-} >/dev/null
    ;;
worker)
    for server in $(echo "${LOSCAR_SERVERS:-127.0.0.1:50051}" | tr ',;' '  '); do
        loscar status --json --server "$server" ${LOSCAR_SECURITY:-} | python3 -c '
import json, sys
sys.exit(sys.argv[1] not in [member["name"] for member in json.loads(sys.stdin.read() or "{}").get("members", [])])
' "${LOSCAR_NAME:-$(hostname)}" && exit 0
    done
    exit 1
    ;;
*)
    echo "usage: loscar-health server|worker" >&2
    exit 2
    ;;
esac
