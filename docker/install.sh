# shellcheck shell=sh disable=SC2153 # variables of the flavour
# What the RUN lines of docker/Dockerfile do, sourced by them: `. /build/install.sh; apt_install python3.10`. Not with `&&`: a
# shell does not stop at an error inside a function that stands before one.
#
# Behind a TLS-intercepting proxy: the build secret `ca_bundle` (a PEM file) is used where it is mounted and stays in no layer;
# proxies are Docker's own build arguments HTTP_PROXY, HTTPS_PROXY and NO_PROXY.
set -eu
wanted_archs=${CUDA_ARCHS-default} # `default`: the flavour's; empty: no operators
# shellcheck disable=SC1090,SC1091
. "/build/$FLAVOUR.env"
[ "$wanted_archs" = default ] || CUDA_ARCHS=$wanted_archs
python=python$PYTHON
without_own_base="leave BASE_IMAGE out: flavour $FLAVOUR has one"
set -a # what the mirror's file says reaches pip
# shellcheck disable=SC1090,SC1091
. "/build/$MIRROR.env"
set +a
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore DEBIAN_FRONTEND=noninteractive
ca_bundle=/run/secrets/ca_bundle
[ ! -s $ca_bundle ] || export PIP_CERT=$ca_bundle SSL_CERT_FILE=$ca_bundle REQUESTS_CA_BUNDLE=$ca_bundle

refuse() { # WHAT HINT
    printf 'error: %s: %s\n' "$1" "$2" >&2
    exit 3
}

check_base() { # before minutes are spent
    [ "$(uname -m)" = x86_64 ] || refuse "this machine is $(uname -m), and this image is made for x86_64 alone" "build with --platform linux/amd64"
    command -v apt-get >/dev/null || refuse "BASE_IMAGE is not Debian or Ubuntu (no apt-get)" "$without_own_base"
    command -v "$python" >/dev/null || grep -qs "^VERSION_ID=\"$UBUNTU\"" /etc/os-release ||
        refuse "BASE_IMAGE has no Python $PYTHON, and is not Ubuntu $UBUNTU, which could install it" "$without_own_base"
}

check_nvcc() {
    [ -n "$CUDA_ARCHS" ] || return 0
    release=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
    [ "$release" = "$CUDA" ] || refuse "BUILD_IMAGE has nvcc ${release:-not at all}, and $CUDA compiles DeepSpeed's operators" \
        "leave BUILD_IMAGE out, or set CUDA_ARCHS= (empty) for no operators"
}

check_cudart() { # TORCH: what DeepSpeed's operators are linked to, and PyTorch's own wheel carries under another name
    case $1 in torch-cu118) [ -n "$CUDA_ARCHS" ] || return 0 ;; *) return 0 ;; esac
    [ -n "$(find / -xdev -name libcudart.so.11.0 -print -quit 2>/dev/null)" ] ||
        refuse "BASE_IMAGE has no libcudart.so.11.0, which DeepSpeed's operators need" \
            "leave BASE_IMAGE out, or set CUDA_ARCHS= (empty) for no operators"
}

apt_install() { # PACKAGE...; from the distribution's own list alone: NVIDIA's is slow to reach from some places, and not needed
    # Ubuntu 24.04 has its list in the newer form, which apt knows by the file's name.
    list=/etc/apt/sources.list.d/ubuntu.sources
    [ -s "$list" ] || list=/etc/apt/sources.list
    own_list=/tmp/${list##*/}
    # As root: apt's own user may not read the build's secret.
    cat >/tmp/apt.conf <<EOF
Dir::Etc::SourceList "$own_list";
Dir::Etc::SourceParts "/dev/null";
Acquire::Retries "3";
APT::Sandbox::User "root";
EOF
    [ ! -s $ca_bundle ] || echo "Acquire::https::CAInfo \"$ca_bundle\";" >>/tmp/apt.conf
    sed "s#https\{0,1\}://[a-z.]*\.ubuntu\.com/ubuntu/\{0,1\}#${APT_MIRROR:-&}#" "$list" >"$own_list"
    export APT_CONFIG=/tmp/apt.conf
    # A source that does not answer is named after some seconds, not after minutes.
    apt-get -qq update --error-on=any -o Acquire::http::Timeout=7 -o Acquire::https::Timeout=7 -o Acquire::Retries=1 ||
        refuse "apt cannot reach its packages" "set APT_MIRROR in env/mirrors/$MIRROR.env, or choose another MIRROR, or HTTP_PROXY"
    apt-get -qq install --yes --no-install-recommends "$@" >/dev/null
    rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log /tmp/apt.conf "$own_list"
}

python_for() { # packages|operators: Python and venv, where they are not there; Python.h and a compiler, if something is to be compiled
    missing=''
    command -v "$python" >/dev/null || missing=$python
    "$python" -c 'import ensurepip' 2>/dev/null || missing="$missing $python-venv"
    compiler=''
    [ "$1" != operators ] || [ -z "$CUDA_ARCHS" ] || compiler=g++
    [ "$1" != packages ] || [ "$COMPILER" = no ] || compiler=gcc
    if [ -n "$compiler" ]; then
        [ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null)/Python.h" ] || missing="$missing $python-dev"
        command -v "$compiler" >/dev/null || missing="$missing $compiler libc6-dev"
    fi
    # shellcheck disable=SC2086
    [ -z "$missing" ] || apt_install $missing
}

# For env/install_locked.sh: the image's Python writes no bytecode when it runs.
export UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy

pip() { /opt/venv/bin/python -m pip "$@"; }

locked() { sed -n "/^$1==/,/# via/p" "/build/$FLAVOUR.txt"; } # NAME: its lines of the lock

check_sources() { # a package index, or a host of PyTorch's wheels, that does not answer is named within 15 s, not after pip's retries
    another="choose another MIRROR (a file of env/mirrors), or set HTTPS_PROXY, or CA_BUNDLE for a proxy that looks into TLS"
    timeout 15 /opt/venv/bin/python -m pip index versions pip --retries 1 --timeout 5 >/tmp/answer 2>&1 || {
        tail -n 3 /tmp/answer >&2
        refuse "no answer from ${PIP_INDEX_URL:-the package index of pip}" "$another"
    }
    wheel=$(sed -n 's/^torch @ \([^ ]*\).*/\1/p' /tmp/torch.txt)
    [ -n "$wheel" ] || return 0
    timeout 15 "$python" -c '
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=10)
except urllib.error.HTTPError:
    pass # an answer, also from a host that allows no HEAD; what it means is for pip to say
' "$wheel" 2>/tmp/answer || {
        tail -n 1 /tmp/answer >&2
        refuse "no answer from $wheel" "$another"
    }
}

install_torch() { # LOCK
    "$python" -m venv /opt/venv
    # shellcheck source=env/torch_wheel.sh
    . /build/torch_wheel.sh
    torch_requirement "$1" "$WHEEL" >/tmp/torch.txt
    check_sources
    pip install --no-deps --require-hashes --requirement /build/pip.txt
    sh /build/env/install_locked.sh /opt/venv/bin/python /tmp/torch.txt --download-first --timeout 60 --retries 5
    rm -rf /opt/venv/uv # in the layer that has it
}

install_packages() {
    sed '/^deepspeed==/,/# via/d' "/build/$FLAVOUR.txt" >/tmp/wheels.txt
    sh /build/env/install_locked.sh /opt/venv/bin/python /tmp/wheels.txt
    rm -rf /opt/venv/uv
}

compile_deepspeed() { # into a wheel in /wheels
    # shellcheck source=env/cuda.sh
    . /build/cuda.sh
    locked deepspeed >/tmp/deepspeed.txt
    pip download --quiet --no-deps --require-hashes --no-build-isolation --no-binary deepspeed --dest /tmp/sdist --requirement /tmp/deepspeed.txt
    tar -C /tmp/sdist -xzf /tmp/sdist/deepspeed-*.tar.gz
    export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
    if [ -n "$CUDA_ARCHS" ]; then # for cuda, though no GPU is here to be found: operators work only under the accelerator they were built for
        builder=$(echo /tmp/sdist/deepspeed-*/op_builder/builder.py)
        # DeepSpeed compiles cpu_adam for the CPU it is built on, and another one ends with SIGILL. x86-64-v3 is AVX2 and FMA: any
        # server of the last ten years; env/limits.toml has its flags for the check at start.
        sed -i "s/-march=native/-march=x86-64-v3/; s/-D__AVX512__/-D__AVX256__/; s/return '-D__SCALAR__'/return '-D__AVX256__'/" "$builder"
        if grep -E 'march=native|__AVX512__|__SCALAR__' "$builder" || ! grep -q 'march=x86-64-v3' "$builder"; then
            refuse "DeepSpeed's op_builder/builder.py is not what docker/install.sh knows" "adapt its sed line to this version"
        fi
        export DS_ACCELERATOR=cuda DS_BUILD_FUSED_ADAM=1 DS_BUILD_CPU_ADAM=1 TORCH_CUDA_ARCH_LIST="$CUDA_ARCHS"
        command -v objdump >/dev/null || refuse "BUILD_IMAGE has no objdump, which looks for instructions of this machine's CPU alone" "install binutils in it"
    fi
    pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /tmp/sdist/deepspeed-*/
    "$python" -m zipfile -e /wheels/deepspeed-*.whl /tmp/unpacked # its operators
    for library in /tmp/unpacked/deepspeed/ops/adam/cpu_adam_op*.so; do
        # zmm: the registers of AVX-512, which x86-64-v3 has not.
        [ ! -e "$library" ] || ! objdump -d "$library" | grep -q -m 1 '%zmm' || refuse "cpu_adam was compiled for this machine's CPU alone" "see compile_deepspeed"
    done
    rm -rf /tmp/sdist /tmp/unpacked
}
