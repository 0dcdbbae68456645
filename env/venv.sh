#!/bin/sh
# Makes .venv in this checkout from the lock; does nothing if it is there and whole. `make` calls it.
#
#     sh env/venv.sh                    PYTHON=/path/to/python3.12 sh env/venv.sh
#
# Stamps are written last: a set-up that was killed at any moment is never taken for a whole one, and the next call makes
# it from scratch. Outside the checkout nothing is written but the caches of pip and uv.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
unset PYTHONHOME PYTHONPATH
export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export DS_BUILD_OPS=0 # DeepSpeed's C++ operators are compiled when they are asked for; on a CPU nothing here asks

lock=env/pins/cpu.txt
log=.venv/setup.log
needed_kb=3000000
python_version='import sys; print("%d.%d" % sys.version_info[:2])'
torch=$(sed -n 's/^torch==\([^ #;]*\).*/\1/p' env/pins/cpu.in)
# Elsewhere than on Linux the only build is the CPU's. On Linux the bare version would also take CUDA's, gigabytes of it.
[ "$(uname -s)" != Linux ] || torch=$torch+cpu

say() { printf '%s\n' "$*" >&2; }

fail() { # WHAT WHY HINT
    printf 'error: %s\n  why: %s\n\nhint: %s\n' "$1" "$2" "$3" >&2
    exit 3
}

# What .venv was made of. A change of the project's own file only needs `link`; any other change, a new .venv.
packages_key() { echo "torch $torch, python $1, $(cat "$lock" env/venv.sh env/install_locked.sh | cksum)"; }
project_key() { echo "$(cksum <pyproject.toml) $(pwd -P)"; }

packages_whole() {
    version=$(.venv/bin/python -I -S -c "$python_version" 2>/dev/null) || return 1
    [ -z "${PYTHON:-}" ] || [ "$version" = "$("$PYTHON" -I -S -c "$python_version" 2>/dev/null)" ] || return 1
    [ "$(cat .venv/packages.stamp 2>/dev/null)" = "$(packages_key "$version")" ]
}
project_linked() { [ "$(cat .venv/project.stamp 2>/dev/null)" = "$(project_key)" ]; }
stamp() {
    printf '%s\n' "$2" >".venv/$1.new"
    mv ".venv/$1.new" ".venv/$1.stamp"
}

pick_python() { # sets python and version
    seen='' without_venv=''
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11 python3.10; fi
    for python in "$@"; do
        version=$("$python" -c "$python_version" 2>/dev/null) || continue
        seen="$seen${seen:+, }$python is $version"
        { [ "${version%%.*}" -eq 3 ] && [ "${version#*.}" -ge 10 ]; } || continue
        "$python" -c 'import ensurepip, venv' 2>/dev/null && return
        [ -n "$without_venv" ] || case $python in
            python3 | */python3) without_venv="$python" package=python3-venv ;;
            *) without_venv="$python" package=python$version-venv ;;
        esac
    done
    [ -z "$without_venv" ] || fail "$without_venv cannot make a virtual environment" \
        "its modules venv and ensurepip are a package of their own on Debian and Ubuntu" "sudo apt-get install $package"
    fail "no Python 3.10 or newer${PYTHON:+ at PYTHON=$PYTHON}" "${seen:-no command of $* runs}" \
        "sudo apt-get install python3 python3-venv   (Debian 12, Ubuntu 22.04 or newer), or PYTHON=/path/to/python3.12"
}

stage() { # NAME HINT COMMAND...
    name=$1 hint=$2 started=$(date +%s)
    shift 2
    printf '  %-58s ' "$name" >&2
    if "$@" >>"$log" 2>&1; then
        say "$(($(date +%s) - started)) s"
    else
        say "failed"
        fail "cannot set up .venv: $name" "the last lines of $log:
$(tail -n 10 "$log" | sed 's/^/    /')" "$hint"
    fi
}
pip() { .venv/bin/python -m pip "$@"; }

install_packages() {
    pick_python
    rm -f .venv/packages.stamp
    rm -rf .venv
    mkdir .venv
    free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -ge "$needed_kb" ] || fail "the disk is too full to set up .venv" \
        "$((free_kb / 1000)) MB are free at $PWD, $((needed_kb / 1000)) MB are needed" "make room, or move the checkout"
    say "setting up .venv with $(command -v "$python") ($version); the next time this is skipped"
    network="is there a network? pip takes an index, a proxy and a certificate from PIP_INDEX_URL, HTTPS_PROXY and PIP_CERT"
    stage "virtual environment" "try another one: PYTHON=/path/to/python3.12" "$python" -m venv .venv
    # torch comes without its dependencies, which the lock holds. A dead index costs two attempts; --timeout is for silence
    # on the line, not for the whole download, so a slow line is not cut.
    stage "PyTorch $torch (about 200 MB)" "$network; PyTorch's CPU builds, for this Python too, must be at \
download.pytorch.org or at PIP_FIND_LINKS" pip install --no-deps --retries 1 --timeout 30 \
        --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch"
    # DeepSpeed is built here, by the setuptools of the lock and with PyTorch in sight, so it comes after all others.
    sed '/^deepspeed==/,/# via/d' "$lock" >.venv/wheels.txt
    stage "all else that is locked (about 300 MB)" "$network" \
        sh env/install_locked.sh .venv/bin/python .venv/wheels.txt
    stage "DeepSpeed" "$network" \
        pip install --no-deps --require-hashes --no-build-isolation --requirement "$lock"
    stage "does PyTorch start?" "another Python may fit better: PYTHON=/path/to/python3.12" \
        .venv/bin/python -c 'import torch; torch.ones(2, 2) @ torch.ones(2, 2)'
    rm -rf .venv/uv
    stamp packages "$(packages_key "$version")"
}

link() {
    # A killed attempt may leave a half-written install, without the RECORD that pip wants before it replaces one.
    rm -rf .venv/lib/python*/site-packages/*rlhf_box*
    stage "this checkout" "pyproject.toml may be wrong" pip install --no-deps --no-build-isolation --editable .
    stage "do the packages fit each other?" "pyproject.toml asks for what the lock has not: make lock" pip check
    stamp project "$(project_key)"
}

if packages_whole && project_linked; then exit 0; fi
# The lock is inherited by pip, so that an orphan of a killed set-up is waited for too. Without flock (macOS): no lock.
if command -v flock >/dev/null; then
    exec 9>.venv.lock
    flock -n 9 || { say "another set-up of this checkout is running; waiting for it" && flock 9; }
fi
packages_whole || install_packages
project_linked || link
