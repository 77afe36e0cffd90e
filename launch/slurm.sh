#!/usr/bin/env bash
# A job on hosts with GPUs under Slurm.
#
# usage: launch/slurm.sh --nodes N --gpus-per-node G --time T [options] -- VERB ARGS...
#
#   --time T           limit of one stay on the hosts, e.g. 4:00:00 or 2-00:00:00
#   --partition P, --account A, --qos Q, --name NAME (default mllm-align)
#   --cpus-per-gpu C   default 8
#   --grace SECONDS    before the limit, for saving (default 300)
#   --retries R        restarts after failures on the same hosts (default 3); 75 does not count
#   --logs FOLDER      default "." ; one file, NAME-JOB.log, that a requeued job goes on with
#   --dry-run          print the batch script and the command, submit nothing
#
# Environment: MLLM_ALIGN_PROGRAM, the program to run (default mllm-align, as PATH has it when this is called).
#
# One task for each GPU: that is how JAX reads Slurm's variables (task i of a node takes GPU i), so every task
# must see all GPUs of its node: --gres, never --gpus-per-task or a binding.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/lib.sh
. "$root/launch/lib.sh"
need_bash 4 4
help_for '' "$@"

nodes='' gpus='' limit='' name=mllm-align cpus=8 grace=300 retries=3 logs=. dry=0
more=()
while (($# > 0)); do
    case $1 in
        --nodes) need_value "$1" $#; nodes=$2; shift 2 ;;
        --gpus-per-node) need_value "$1" $#; gpus=$2; shift 2 ;;
        --time) need_value "$1" $#; limit=$2; shift 2 ;;
        --partition | --account | --qos)
            need_value "$1" $#
            [[ $2 =~ ^[A-Za-z0-9_,.-]+$ ]] || die "$1 is '$2'; it must be a name"
            more+=("$1=$2")
            shift 2
            ;;
        --name) need_value "$1" $#; name=$2; shift 2 ;;
        --cpus-per-gpu) need_value "$1" $#; cpus=$2; shift 2 ;;
        --grace) need_value "$1" $#; grace=$2; shift 2 ;;
        --retries) need_value "$1" $#; retries=$2; shift 2 ;;
        --logs) need_value "$1" $#; logs=$2; shift 2 ;;
        --dry-run) dry=1; shift ;;
        --) shift; break ;;
        *) die "unknown option '$1'; launch/slurm.sh --help lists them" ;;
    esac
done
need_number --nodes "$nodes" 1
need_number --gpus-per-node "$gpus" 1
need_number --cpus-per-gpu "$cpus" 1
need_number --grace "$grace" 1
need_number --retries "$retries" 0
need_name --name "$name"
[[ $limit =~ ^(([0-9]+)-)?([0-9]{1,6}):([0-9]{2}):([0-9]{2})$ ]] \
    || die "--time is '$limit'; it must look like 4:00:00 or 2-00:00:00"
hours=$((10#0${BASH_REMATCH[2]} * 24 + 10#${BASH_REMATCH[3]}))
whole=$(((hours * 60 + 10#${BASH_REMATCH[4]}) * 60 + 10#${BASH_REMATCH[5]}))
# Slurm may send the signal a minute early; a job that is told to stop as it starts would never get on.
((whole >= 2 * grace + 60)) \
    || die "--time $limit leaves too little beside --grace $grace; give more time or less grace"
[[ $logs != *[[:space:][:cntrl:]]* ]] || die "--logs is '$logs'; it must not have spaces"
(($# > 0)) || die "what shall be run? give -- VERB ARGS..."
program=${MLLM_ALIGN_PROGRAM:-mllm-align}
if ((!dry)); then
    command -v sbatch >/dev/null || die "no program 'sbatch'; this must run where jobs are submitted"
    program=$(command -v "$program") || die "no program '$program'; activate its environment or set MLLM_ALIGN_PROGRAM"
    [[ -d $logs ]] || die "--logs is '$logs', which is no folder"
fi

script=$(
    printf '#!/usr/bin/env bash\n'
    printf '#SBATCH %s\n' "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gres=gpu:$gpus" \
        "--cpus-per-task=$cpus" "--time=$limit" ${more[@]+"${more[@]}"} --requeue --open-mode=append \
        "--output=$logs/%x-%j.log" "--signal=TERM@$grace"
    cat <<END
# SIGTERM, $grace seconds before the limit, goes to the tasks alone (no "B:"): they save and give 75, and this
# script is still there to put the job back into the queue. When the job is cancelled or preempted, this script
# gets the signal too and ends: a cancelled job stays cancelled, a preempted one is put back by Slurm itself.
attempt=0
while :; do
    status=0
    # A task that ends does not end the others at once: they still save, or notice the loss by themselves.
    srun --kill-on-bad-exit=0 --wait=$grace --cpus-per-task=$cpus $(shown "$program" "$@") || status=\$?
    case \$status in
        75) echo "saved; back into the queue"; scontrol requeue "\$SLURM_JOB_ID"; exit 75 ;;
        0 | 2 | 3) exit "\$status" ;;
    esac
    ((attempt < $retries)) || exit "\$status"
    attempt=\$((attempt + 1))
    echo "exit status \$status; restart \$attempt of $retries"
done
END
)

if ((dry)); then
    printf '%s\n' "$script" "# submitted with: sbatch"
else
    sbatch <<<"$script"
fi
