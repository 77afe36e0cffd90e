#!/usr/bin/env bash
# What launch/tpu_pod.sh does on each host of a pod; it is copied there with the source.
#
# usage: launch/tpu_host.sh setup | run VERB ARGS... | stop
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
pid_file=$home/.running
program=${MLLM_ALIGN_PROGRAM:-$home/.venv/bin/mllm-align}

# The image's own Python may be older than we need; uv brings one.
setup() {
    python3 -m pip install --quiet --user uv
    cd "$home"
    python3 -m uv venv --quiet --python 3.12 .venv
    python3 -m uv pip install --quiet --python .venv/bin/python '.[tpu]'
    echo "$(hostname) has mllm-align $("$program" --version) and these:"
    python3 -m uv pip list --python .venv/bin/python | grep -E '^(jax|jaxlib|libtpu|flax) '
}

# Ends what runs here, if anything does: after a lost connection the program goes on, and holds the TPU.
stop() {
    local pid i
    [[ -f $pid_file ]] || return 0
    pid=$(<"$pid_file")
    # A process that only inherited the number after a reboot is not ours.
    if kill -0 "$pid" 2>/dev/null && tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF -- "$program"; then
        kill -TERM "$pid"
        for ((i = 0; i < 300; i++)); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 1
        done
        kill -KILL "$pid" 2>/dev/null || true
    fi
    rm -f "$pid_file"
}

# The last line says the exit status, for launch/tpu_pod.sh: ssh gives back that of one host only.
run() {
    local status=0
    stop
    cd "$home"
    "$program" "$@" </dev/null &
    echo $! >"$pid_file"
    wait $! || status=$?
    rm -f "$pid_file"
    echo "mllm-align on $(hostname) ended: $status"
    return "$status"
}

usage="usage: launch/tpu_host.sh setup | run VERB ARGS... | stop"
case " $* " in
    *' -h '* | *' --help '* | *' --help-all '*) # before what runs here is stopped
        [[ ${1-} != run ]] || shift
        case ${1-} in '' | -* | setup | stop) echo "$usage"; exit 0 ;; *) exec "$program" "$@" ;; esac
        ;;
esac
case ${1-} in
    setup | stop) (($# == 1)) || { echo "tpu_host.sh: error: $1 takes no words" >&2; exit 2; }; "$1" ;;
    run) "$@"; exit ;; # exit: the file may have changed meanwhile
    *) echo "$usage" >&2; exit 2 ;;
esac
