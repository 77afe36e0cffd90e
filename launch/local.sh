#!/usr/bin/env bash
# Runs one job as N processes on this machine: to try several processes before renting several hosts.
#
# usage: launch/local.sh N [--devices D] [--grace SECONDS] [--dry-run] -- VERB ARGS...
#
#   N            processes
#   --devices D  fake CPU devices that each process has (default 1)
#   --grace S    once a process has failed, the others have S seconds to end by themselves (default 120)
#   --dry-run    print the commands and stop
#
# Environment: MLLM_ALIGN_PROGRAM, the program to run (default mllm-align); JAX_PLATFORMS (default cpu).
#
# Each line of output starts with its process's number. SIGTERM and SIGINT go to all processes. Exit status:
# 0 if all gave 0; 75 if all gave 0 or 75; 2 or 3 if one gave that; otherwise that of the first to fail.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "$0")/lib.sh"
need_bash 4 4
help_for '' "$@"

(($# > 0)) || die "how many processes? (launch/local.sh --help)"
count=$1 devices=1 grace=120 dry=0
shift
need_number "the number of processes" "$count" 1
while (($# > 0)); do
    case $1 in
        --devices) need_value "$1" $#; devices=$2; shift 2 ;;
        --grace) need_value "$1" $#; grace=$2; shift 2 ;;
        --dry-run) dry=1; shift ;;
        --) shift; break ;;
        *) die "unknown option '$1'; the program's own words come after --" ;;
    esac
done
need_number --devices "$devices" 1
need_number --grace "$grace" 1
(($# > 0)) || die "what shall be run? give -- VERB ARGS..."
program=${MLLM_ALIGN_PROGRAM:-mllm-align}
((dry)) || command -v "$program" >/dev/null \
    || die "no program '$program'; activate its environment or set MLLM_ALIGN_PROGRAM"

# A port below those that the system gives out by itself, on which nothing answers.
free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 12000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    echo "$port"
}

settings=(
    "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}"
    "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    "JAX_COORDINATOR_ADDRESS=127.0.0.1:$(free_port)"
    "JAX_NUM_PROCESSES=$count"
)
if ((dry)); then
    for ((i = 0; i < count; i++)); do
        shown env "${settings[@]}" "JAX_PROCESS_ID=$i" "$program" "$@"
    done
    exit 0
fi

set -m # a process group for each, so that Ctrl-C reaches them through us alone, and a kill takes children along
alive=() readers=() statuses=() deadline=''

signal_all() {
    local pid
    for pid in "${alive[@]}"; do
        kill -s "$1" -- "$2$pid" 2>/dev/null || true
    done
}
trap 'signal_all TERM ""' TERM
trap 'signal_all INT ""' INT

for ((i = 0; i < count; i++)); do
    # Only the end of the process ends its readers: what it says while it stops is still wanted.
    exec {out}> >(trap '' TERM INT HUP; exec sed -u "s/^/[$i] /")
    readers+=($!)
    exec {err}> >(trap '' TERM INT HUP; exec sed -u "s/^/[$i] /" >&2)
    readers+=($!)
    env "${settings[@]}" "JAX_PROCESS_ID=$i" "$program" "$@" </dev/null >&"$out" 2>&"$err" {out}>&- {err}>&- &
    alive[i]=$!
    exec {out}>&- {err}>&-
done

# Asked one by one: `wait -n` loses a process that ends while bash reports that another was killed.
exec {never}<> <(:) # nothing is ever read here: a short rest without a process, cut short by no signal
{ # in braces, so that bash has read it all before: the file may change while the job runs
    while ((${#alive[@]} > 0)); do
        read -r -t 0.05 -u "$never" || true
        for i in "${!alive[@]}"; do
            pid=${alive[i]} status=0
            kill -0 "$pid" 2>/dev/null && continue
            wait "$pid" 2>/dev/null || status=$?
            kill -KILL -- "-$pid" 2>/dev/null || true # children that it left behind
            unset "alive[i]"
            statuses+=("$status")
            ((status != 0)) || continue
            say "process $i ended with exit status $status"
            deadline=${deadline:-$((SECONDS + grace + 1))} # SECONDS has lost a part of one
        done
        if [[ -n $deadline ]] && ((${#alive[@]} > 0 && SECONDS >= deadline)); then
            say "processes still running $grace s after another failed are killed"
            signal_all KILL -
            deadline=$((SECONDS + grace + 1))
        fi
    done
    for ((i = 0; i < 250; i++)); do # the readers end with the last line, at once; five seconds at most
        kill -0 "${readers[@]}" 2>/dev/null || break
        sleep 0.02
    done
    exit "$(verdict "${statuses[@]}")"
}
