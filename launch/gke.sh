#!/usr/bin/env bash
# A job on Google Kubernetes Engine, as a JobSet of TPU slices or of hosts with GPUs.
#
# usage: launch/gke.sh tpu NAME --image I --accelerator A --topology T --bucket B [options] -- VERB ARGS...
#        launch/gke.sh gpu NAME --image I --accelerator A --hosts N    --bucket B [options] -- VERB ARGS...
#
#   --image I            built from launch/containers/
#   --accelerator A      as the nodes' labels have it: tpu-v5-lite-podslice, tpu-v6e-slice, nvidia-h100-80gb, ...
#   --topology T         chips of a TPU slice, e.g. 4x4 or 2x2x4; the number of hosts follows from it
#   --slices S           TPU slices (default 1)
#   --hosts N            hosts with GPUs
#   --per-host K         chips of a host (default 4) or its GPUs (default 8)
#   --bucket B           Cloud Storage bucket, seen by all hosts as /data (Cloud Storage FUSE)
#   --service-account A  Kubernetes service account that may read and write it (default "default")
#   --namespace N        default "default"
#   --spot               on Spot nodes
#   --max-restarts R     restarts after failures (default 20); those after exit status 75 do not count
#   --save-seconds S     time to save before a pod is killed (default 300; a Spot node leaves 25 at most)
#   --unprivileged       TPU pods without privileged mode (Autopilot insists)
#   --dry-run            print the YAML and stop
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/lib.sh
. "$root/launch/lib.sh"
need_bash 4 4
help_for 'tpu|gpu' "$@"

kind=${1-} name=${2-}
case $kind in
    tpu | gpu) ;;
    *) die "the first word is '$kind'; it must be tpu or gpu" ;;
esac
need_name NAME "$name"
shift 2
image='' accelerator='' topology='' slices=1 hosts='' per_host='' bucket='' account=default namespace=default
spot=0 restarts=20 seconds=300 privileged=true dry=0
while (($# > 0)); do
    case $1 in
        --image) need_value "$1" $#; image=$2; shift 2 ;;
        --accelerator) need_value "$1" $#; accelerator=$2; shift 2 ;;
        --topology) need_value "$1" $#; topology=$2; shift 2 ;;
        --slices) need_value "$1" $#; slices=$2; shift 2 ;;
        --hosts) need_value "$1" $#; hosts=$2; shift 2 ;;
        --per-host) need_value "$1" $#; per_host=$2; shift 2 ;;
        --bucket) need_value "$1" $#; bucket=$2; shift 2 ;;
        --service-account) need_value "$1" $#; account=$2; shift 2 ;;
        --namespace) need_value "$1" $#; namespace=$2; shift 2 ;;
        --spot) spot=1; shift ;;
        --max-restarts) need_value "$1" $#; restarts=$2; shift 2 ;;
        --save-seconds) need_value "$1" $#; seconds=$2; shift 2 ;;
        --unprivileged) privileged=false; shift ;;
        --dry-run) dry=1; shift ;;
        --) shift; break ;;
        *) die "unknown option '$1'; launch/gke.sh --help lists them" ;;
    esac
done
(($# > 0)) || die "what shall be run? give -- VERB ARGS..."
[[ $image =~ ^[a-z0-9][A-Za-z0-9._/:@-]*$ ]] || die "--image is '$image'; it must be the name of an image"
[[ $bucket =~ ^[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$ ]] \
    || die "--bucket is '$bucket'; it must be a bucket's name, without gs://"
need_name --namespace "$namespace"
need_name --service-account "$account"
need_number --max-restarts "$restarts" 0
need_number --save-seconds "$seconds" 1

if [[ $kind == tpu ]]; then
    [[ -z $hosts ]] || die "--hosts is for gpu; for tpu it follows from --topology"
    case $accelerator in
        tpu-v5-lite-podslice | tpu-v6e-slice) sides=2 example=4x4 ;;
        tpu-v4-podslice | tpu-v5p-slice | tpu7x) sides=3 example=2x2x4 ;;
        *)
            known='tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice or tpu7x'
            die "--accelerator is '$accelerator'; it must be $known"
            ;;
    esac
    [[ $topology =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){$((sides - 1))}$ ]] \
        || die "--topology is '$topology'; for $accelerator it must have $sides sides, as $example"
    need_number --slices "$slices" 1
    per_host=${per_host:-4}
    need_number --per-host "$per_host" 1
    chips=$((${topology//x/*}))
    ((chips % per_host == 0)) \
        || die "$topology has $chips chips, which $per_host for each host do not divide; give --per-host"
    hosts=$((chips / per_host))
else
    [[ -z $topology ]] || die "--topology is for tpu; for gpu give --hosts"
    ((slices == 1)) || die "--slices is for tpu; for gpu give --hosts"
    [[ $accelerator =~ ^nvidia-[a-z0-9-]+$ ]] \
        || die "--accelerator is '$accelerator'; it must look like nvidia-h100-80gb"
    need_number --hosts "$hosts" 1
    per_host=${per_host:-8}
    need_number --per-host "$per_host" 1
fi

# yaml_list WORD...: a list of quoted strings on one line. Kubernetes would expand $(NAME) in them.
yaml_list() {
    local word list=''
    for word in "$@"; do
        [[ $word != *[[:cntrl:]]* ]] || die "the program's words must not have control characters or line breaks"
        word=${word//\\/\\\\}
        word=${word//\"/\\\"}
        # shellcheck disable=SC2016 # not to be expanded, indeed
        word=${word//'$('/'$$('}
        list+=", \"$word\""
    done
    printf '[%s]' "${list:2}"
}

# fill TEMPLATE NAME=VALUE...: a line that is only a place without a value goes.
fill() {
    local line setting text=''
    while IFS= read -r line; do
        for setting in "${@:2}"; do
            [[ $line != *"\${${setting%%=*}}"* ]] || line=${line//"\${${setting%%=*}}"/"${setting#*=}"}
        done
        [[ -z ${line// /} ]] || text+=$line$'\n'
    done <"$1"
    printf '%s' "$text"
}

spot_selector=''
((!spot)) || spot_selector='cloud.google.com/gke-spot: "true"'
args=$(yaml_list "$@")
yaml=$(fill "$root/launch/gke/$kind.yaml" "NAME=$name" "NAMESPACE=$namespace" "MAX_RESTARTS=$restarts" \
    "SLICES=$slices" "HOSTS=$hosts" "PER_HOST=$per_host" "SERVICE_ACCOUNT=$account" "SAVE_SECONDS=$seconds" \
    "ACCELERATOR=$accelerator" "TOPOLOGY=$topology" "SPOT_SELECTOR=$spot_selector" "IMAGE=$image" \
    "PRIVILEGED=$privileged" "BUCKET=$bucket" "ARGS=$args")

if ((dry)); then
    printf '%s\n' "$yaml"
else
    command -v kubectl >/dev/null || die "no program 'kubectl'; install it and fetch the cluster's credentials"
    kubectl apply -f - <<<"$yaml"
fi
