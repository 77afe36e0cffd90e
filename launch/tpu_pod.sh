#!/usr/bin/env bash
# A Cloud TPU VM pod, or several slices, through queued resources of Google Cloud.
#
# usage: launch/tpu_pod.sh create NAME --zone ZONE --type TYPE [options]   ask for the TPUs, wait for them
#        launch/tpu_pod.sh setup  NAME --zone ZONE [options]               install HEAD on all hosts
#        launch/tpu_pod.sh run    NAME --zone ZONE [options] -- VERB ARGS  the same mllm-align on all hosts
#        launch/tpu_pod.sh exec   NAME --zone ZONE [options] -- COMMAND    any shell command on all hosts
#        launch/tpu_pod.sh stop   NAME --zone ZONE [options]               SIGTERM: the job saves and ends
#        launch/tpu_pod.sh status NAME --zone ZONE [options]
#        launch/tpu_pod.sh delete NAME --zone ZONE [options]
#
#   --project PROJECT      default: gcloud's own
#   --internal-ip          hosts have no outside addresses; reach them from the same network
#   --dry-run              print every command and run none
#   of create, and of run --recreate:
#   --type TYPE            v4-32, v5litepod-16, v5p-32, v6e-16, ...
#   --runtime-version V    default: the one for TYPE
#   --node-count N         slices (default 1)
#   --spot | --reserved    default: on demand
#   --service-account A    who the hosts are, for reading buckets
#   --wait-minutes M       how long to wait for the TPUs (default 720)
#   of setup, and of run --recreate:
#   --prepare COMMAND      run on each host after the installation, e.g. to mount a bucket
#   of run:
#   --retries N            restarts after failures (default 5); those after exit status 75 do not count
#   --recreate             when the TPUs were taken away: delete, create, set up, go on
#
# run restarts the job on exit status 75 and on failures, never on 2 (bad input) and 3 (not finite). The log of
# each run is kept in NAME.log in the current folder.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/lib.sh
. "$root/launch/lib.sh"
need_bash 4 4
# What follows `exec NAME ... --` is a shell's command, and its --help that command's.
[[ ${1-} == exec && " $* " == *" -- "* ]] || help_for 'create|setup|run|exec|stop|status|delete' "$@"

verb=${1-} name=${2-}
case $verb in
    create | setup | run | exec | stop | status | delete) ;;
    *) die "the first word is '$verb'; it must be create, setup, run, exec, stop, status or delete" ;;
esac
need_name NAME "$name"
shift 2
zone='' type='' version='' slices=1 spot=0 reserved=0 account='' minutes=720 retries=5 recreate=0 prepare='' dry=0
pause=${TPU_POD_PAUSE:-30} # seconds between two looks
all=() ssh=(--node=all --worker=all --batch-size=all) # by default gcloud reaches 64 hosts at once; a job needs all
network=()
while (($# > 0)); do
    case $1 in
        --zone) need_value "$1" $#; zone=$2; shift 2 ;;
        --project) need_value "$1" $#; all+=("--project=$2"); shift 2 ;;
        --internal-ip) ssh+=(--internal-ip); network+=(--internal-ips); shift ;;
        --type) need_value "$1" $#; type=$2; shift 2 ;;
        --runtime-version) need_value "$1" $#; version=$2; shift 2 ;;
        --node-count) need_value "$1" $#; slices=$2; shift 2 ;;
        --spot) spot=1; shift ;;
        --reserved) reserved=1; shift ;;
        --service-account) need_value "$1" $#; account=$2; shift 2 ;;
        --wait-minutes) need_value "$1" $#; minutes=$2; shift 2 ;;
        --retries) need_value "$1" $#; retries=$2; shift 2 ;;
        --recreate) recreate=1; shift ;;
        --prepare) need_value "$1" $#; prepare=$2; shift 2 ;;
        --dry-run) dry=1; shift ;;
        --) shift; break ;;
        *) die "unknown option '$1'; launch/tpu_pod.sh --help lists them" ;;
    esac
done
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone is '$zone'; it must look like us-east5-b"
all=("--zone=$zone" ${all[@]+"${all[@]}"})
need_number --node-count "$slices" 1
need_number --wait-minutes "$minutes" 1
need_number --retries "$retries" 0
((spot + reserved < 2)) || die "--spot and --reserved exclude each other"
if [[ $verb == run || $verb == exec ]]; then
    (($# > 0)) || die "$verb needs -- and what to run"
elif (($# > 0)); then
    die "$verb takes no words after --"
fi
if [[ $verb == create ]] || ((recreate)); then
    [[ -n $version ]] || case $type in
        v4-*) version=tpu-ubuntu2204-base ;;
        v5litepod-*) version=v2-alpha-tpuv5-lite ;;
        v5p-*) version=v2-alpha-tpuv5 ;;
        v6e-*) version=v2-alpha-tpuv6e ;;
    esac
    [[ $type =~ ^v[0-9]+[a-z]*-[1-9][0-9]*$ ]] || die "--type is '$type'; it must look like v5litepod-16"
    [[ -n $version ]] || die "no runtime version is known for $type; give --runtime-version"
fi
((dry)) || command -v gcloud >/dev/null || die "no program 'gcloud'; install the Google Cloud CLI"

# Every command goes through here, so that --dry-run shows them all.
do_it() {
    if ((dry)); then shown "$@"; else "$@"; fi
}
tpus() { do_it gcloud compute tpus queued-resources "$@" "${all[@]}"; }
everywhere() { tpus ssh "$name" "${ssh[@]}" "--command=$1"; }
state() { gcloud compute tpus queued-resources describe "$name" "${all[@]}" '--format=value(state.state)'; }

create() {
    local words=("--accelerator-type=$type" "--runtime-version=$version" ${network[@]+"${network[@]}"})
    if ((slices == 1)); then
        words+=("--node-id=$name")
    else
        words+=("--node-count=$slices" "--node-prefix=$name")
    fi
    ((!spot)) || words+=(--spot)
    ((!reserved)) || words+=(--reserved)
    [[ -z $account ]] || words+=("--service-account=$account" --scopes=cloud-platform)
    tpus create "$name" "${words[@]}"
    if ((dry)); then
        echo "# then wait, $minutes minutes at most, until this says ACTIVE:"
        tpus describe "$name" '--format=value(state.state)'
        return
    fi
    local now='' deadline=$((SECONDS + 60 * minutes))
    until [[ $now == ACTIVE ]]; do
        ((SECONDS < deadline)) || { say "not ACTIVE after $minutes minutes; it stays in the queue"; exit 1; }
        sleep "$pause"
        now=$(state) || now=unknown # a query may fail now and then
        say "$name is $now"
        [[ $now != FAILED && $now != SUSPENDED ]] || { say "delete it and create it again"; exit 1; }
    done
}

setup() {
    local folder=. archive
    ((dry)) || folder=$(mktemp -d)
    archive=$folder/mllm-align.tar.gz
    do_it git -C "$root" archive --format=tar.gz -o "$archive" HEAD
    tpus scp "$archive" "$name:mllm-align.tar.gz" "${ssh[@]}"
    # What runs there is ended first: its files are about to be replaced.
    everywhere 'set -e; [ ! -d mllm-align ] || bash mllm-align/launch/tpu_host.sh stop; rm -rf mllm-align; '\
'mkdir mllm-align; tar -xzf mllm-align.tar.gz -C mllm-align; bash mllm-align/launch/tpu_host.sh setup'
    ((dry)) || rm -r "$folder"
    [[ -z $prepare ]] || everywhere "$prepare"
}

# run_once WORD...: the exit status of the whole job, from the line that each host ends with.
run_once() {
    local command status=0 statuses
    command="bash mllm-align/launch/tpu_host.sh run $(shown "$@")"
    if ((dry)); then
        everywhere "$command"
        return
    fi
    everywhere "$command" 2>&1 | tee "$name.log" || status=${PIPESTATUS[0]}
    statuses=$(sed -nE 's/.*mllm-align on [^ ]+ ended: ([0-9]+)\r?$/\1/p' "$name.log")
    # gcloud's own status counts where no host tells of a failure: it may not have reached one.
    [[ $statuses == *[1-9]* ]] || statuses+=" $status"
    # shellcheck disable=SC2086 # one word for each status
    return "$(verdict $statuses)"
}

run() {
    local status=0 failures=0 now
    if ((dry)); then
        run_once "$@"
        if ((recreate)); then
            echo "# and each time the TPUs were taken away:"
            delete
            create
            setup
        fi
        return
    fi
    trap 'say "interrupted; the hosts may go on: launch/tpu_pod.sh stop $name ..."; exit 130' INT
    while :; do
        status=0
        run_once "$@" || status=$?
        case $status in
            0) break ;;
            2) say "bad input; mend what the line above says"; break ;;
            3) say "loss or gradients are not finite; see docs/running/one-gpu.md"; break ;;
            75) say "saved and ended on request; starting again" ;;
            *)
                ((failures += 1))
                ((failures <= retries)) || { say "exit status $status; no restart after $retries"; break; }
                say "exit status $status; restart $failures of $retries"
                ;;
        esac
        sleep "$pause" # a host that is being taken away is still ACTIVE for a moment
        now=$(state) || now=unknown
        [[ $now == ACTIVE || $now == unknown ]] && continue
        ((recreate)) || { say "$name is $now; run with --recreate, or delete and create it"; break; }
        say "$name is $now; it is deleted and created again"
        delete
        create
        setup
    done
    return "$status"
}

delete() { tpus delete "$name" --force --quiet; }

case $verb in
    exec) everywhere "$*" ;;
    stop) everywhere 'bash mllm-align/launch/tpu_host.sh stop' ;;
    status) tpus describe "$name" ;;
    run) run "$@"; exit ;; # exit: the file may have changed meanwhile
    *) "$verb" ;;
esac
