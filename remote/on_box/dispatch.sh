# shellcheck shell=sh
# Finds our folder on a box, and then runs the verb. It runs as `sh -c THIS rlhf-box ROOT... -- VERB [ARGUMENT...]`, so that one
# round trip is enough and the laptop need not remember the folder. Its verbs, answers and exit codes: PROTOCOL.md.
found='' marked='' first=''
while [ $# -gt 0 ]; do
    root=$1
    shift
    [ "$root" != -- ] || break
    # shellcheck disable=SC2016 # the word itself is meant
    case $root in '$HOME'*) root=$HOME${root#'$HOME'} ;; esac
    first=${first:-$root}
    [ -f "$root/.rlhf-box" ] || continue
    marked=${marked:-$root}
    [ -n "$found" ] || [ ! -f "$root/deployed" ] || found=$root
done
verb=$1
shift
if [ "$verb" = root ]; then
    [ -z "${found:-$marked}" ] || exec echo root "${found:-$marked}"
    exec echo would "$first"
fi
code=''
[ -z "$found" ] || code=$(sed -n 's/^code //p' "$found/deployed")
if [ -z "$code" ] || [ ! -f "$found/code/$code/remote/on_box/supervisor.sh" ]; then
    echo not_deployed
    exit 3
fi
if [ "${1-}" = - ]; then # for follow and cancel: the run in the slot, else the run that was started last
    shift
    # shellcheck disable=SC2012 # names of runs are plain, and only `ls` sorts by time everywhere
    { read -r run <"$found/slot/run"; } 2>/dev/null || run=$(cd "$found/runs" && ls -t -- */job/started 2>/dev/null | sed -n '1s|/.*||p')
    set -- "$run" "$@"
    [ -n "$run" ] || {
        echo 'error: there is no run' >&2
        exit 2
    }
    [ "$verb" != cancel ] || echo "run $run"
fi
if [ "$verb" = cancel ] && [ "${2-}" = - ]; then # the grace that the job was started with
    { read -r grace <"$found/runs/$1/job/grace"; } 2>/dev/null || grace=60
    set -- "$1" "$grace"
fi
[ "$verb" = where ] || exec sh "$found/code/$code/remote/on_box/supervisor.sh" "$verb" "$found" "$@"
printf 'root %s\n' "$found"
cat "$found/deployed"
for input in "$found"/inputs/*; do
    case $input in *'*' | *.partial | *.temp) ;; *) echo "input ${input##*/}" ;; esac
done
{ read -r run <"$found/slot/run"; } 2>/dev/null && echo "slot $run"
exit 0
