#!/usr/bin/env bash
# A short run on one GPU of this machine that looks for NaN and says where the time goes.
#
# usage: launch/gpu.sh [--gpu I] [--profile N] [--dry-run] -- --model M --data D --out RUN [more of train]
#
#   --gpu I       which GPU (default 0)
#   --profile N   steps to profile (default 3; 0: none); the trace is in RUN/profile
#   --dry-run     print the command and stop (nvidia-smi is still asked, where there is one)
#
# Environment: MLLM_ALIGN_PROGRAM, the program to run (default mllm-align).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/lib.sh
. "$root/launch/lib.sh"
need_bash 4 4
help_for '' "$@"

gpu=0 steps=3 dry=0
while (($# > 0)); do
    case $1 in
        --gpu) need_value "$1" $#; gpu=$2; shift 2 ;;
        --profile) need_value "$1" $#; steps=$2; shift 2 ;;
        --dry-run) dry=1; shift ;;
        --) shift; break ;;
        *) die "unknown option '$1'; train's own options come after --" ;;
    esac
done
need_number --gpu "$gpu" 0
need_number --profile "$steps" 0
(($# > 0)) || die "give -- --model M --data D --out RUN"

# cuda, not gpu: without a GPU that JAX can use the program stops, rather than crawl on the CPU.
settings=("CUDA_VISIBLE_DEVICES=$gpu" JAX_PLATFORMS=cuda)
if command -v nvidia-smi >/dev/null; then
    line=$(nvidia-smi "--id=$gpu" --query-gpu=name,driver_version,memory.total,memory.free \
        --format=csv,noheader,nounits) || die "nvidia-smi shows no GPU $gpu: $line"
    IFS=',' read -r model driver total free <<<"${line//, /,}"
    [[ $driver =~ ^[0-9]+\. && $total$free =~ ^[0-9]+$ ]] || die "nvidia-smi says '$line', which is not understood"
    say "GPU $gpu: $model, driver $driver, $free of $total MiB free"
    major=${driver%%.*}
    ((major >= 580)) || die "driver $driver is too old for CUDA 13, which needs 580 or newer"
    # JAX takes three quarters of the whole memory at the start; where others hold some, that may not be there.
    if ((free * 100 < total * 78)) && [[ -z ${XLA_PYTHON_CLIENT_MEM_FRACTION-} ]]; then
        settings+=("XLA_PYTHON_CLIENT_MEM_FRACTION=0.$(printf %02d $((free * 95 / total)))")
    fi
elif ((!dry)); then
    die "no program 'nvidia-smi'; is the NVIDIA driver installed?"
fi

command=(env "${settings[@]}" "${MLLM_ALIGN_PROGRAM:-mllm-align}" train "$root/configs/debug.py" --debug-nans)
((steps == 0)) || command+=(--profile "$steps")
if ((dry)); then
    shown "${command[@]}" "$@"
else
    exec "${command[@]}" "$@"
fi
