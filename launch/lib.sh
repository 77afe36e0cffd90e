# shellcheck shell=bash
# What the launchers share; sourced, never run.

# die TEXT: a mistake of the caller, one line, exit status 2 as the program itself has it.
die() {
    printf '%s: error: %s\n' "${0##*/}" "$1" >&2
    exit 2
}

say() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }

# need_bash MAJOR MINOR
need_bash() {
    ((BASH_VERSINFO[0] > $1 || (BASH_VERSINFO[0] == $1 && BASH_VERSINFO[1] >= $2))) \
        || die "bash $1.$2 or newer is needed, this is $BASH_VERSION"
}

# usage: the comment at the top of the launcher, without its first line.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# help_for OWN WORD...: where a word asks for help, print it and exit. The help is the launcher's; after --, or
# behind a first word that is no verb of the launcher (OWN, a|b), it is the program's.
help_for() {
    local own=$1 before=()
    shift
    while (($# > 0)) && [[ $1 != -- ]]; do
        before+=("$1")
        shift
    done
    (($# == 0)) || shift
    ! asks_help "$@" || program_help "$@"
    asks_help "${before[@]}" || return 0
    if [[ ${before[0]} =~ ^[a-z]+$ && ! ${before[0]} =~ ^($own)$ ]]; then program_help "${before[@]}"; fi
    usage
    exit 0
}

asks_help() {
    local word
    for word in "$@"; do
        case $word in -h | --help | --help-all) return 0 ;; esac
    done
    return 1
}

# program_help WORD...: the program's help for its words; those of train need no verb.
program_help() {
    local program=${MLLM_ALIGN_PROGRAM:-mllm-align}
    command -v "$program" >/dev/null \
        || die "no program '$program', whose help this is; activate its environment or set MLLM_ALIGN_PROGRAM"
    [[ $1 != -* ]] || set -- train "$@"
    exec "$program" "$@"
}

# need_value OPTION COUNT: COUNT is how many words are left, the option itself included.
need_value() { (($2 >= 2)) || die "$1 needs a value"; }

# need_number WHAT VALUE LEAST
need_number() {
    # Seven digits at most: more would overflow, and a leading 0 would be read as octal.
    if ! [[ $2 =~ ^(0|[1-9][0-9]{0,6})$ ]] || (($2 < $3)); then
        die "$1 is '$2'; it must be a whole number from $3"
    fi
}

# need_name WHAT VALUE: a name as Kubernetes and Google Cloud take it, short enough to get suffixes.
need_name() {
    [[ $2 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] \
        || die "$1 is '$2'; it must be a-z, 0-9 and -, start with a letter, and have 40 characters at most"
}

# shown WORD...: the words as one line that a shell reads back as the same words.
shown() {
    local word line=''
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}

# verdict STATUS...: one exit status for all processes, given in the order in which they ended. "Do not retry"
# (2, 3) outweighs the failures that it causes elsewhere, a failure outweighs "saved, run me again" (75).
verdict() {
    local status first=0 seen=" $* "
    for status in 2 3; do
        [[ $seen != *" $status "* ]] || { echo "$status"; return; }
    done
    for status in "$@"; do
        case $status in
            0) ;;
            75) ((first)) || first=75 ;;
            *) echo "$status"; return ;;
        esac
    done
    echo "$first"
}
