# shellcheck shell=sh
# What the RUN lines of docker/Dockerfile do, sourced by them: `. /build/install.sh; apt_install python3.10`. Not with `&&`: a
# shell does not stop at an error inside a function that stands before one.
#
# Behind a TLS-intercepting proxy: the build secret `ca_bundle` (a PEM file) is used where it is mounted and stays in no layer;
# proxies are Docker's own build arguments HTTP_PROXY, HTTPS_PROXY and NO_PROXY.
set -eu
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
    [ "$(uname -m)" = x86_64 ] || refuse "this machine is $(uname -m), and PyTorch has no cu118 wheels for it" "build with --platform linux/amd64"
    command -v apt-get >/dev/null || refuse "BASE_IMAGE is not Debian or Ubuntu (no apt-get)" "use nvidia/cuda:11.8.0-base-ubuntu22.04"
    command -v python3.10 >/dev/null || grep -qs '^VERSION_ID="22.04"' /etc/os-release ||
        refuse "BASE_IMAGE has no Python 3.10, and is not Ubuntu 22.04, which could install it" "use nvidia/cuda:11.8.0-base-ubuntu22.04"
}

check_nvcc() { # CUDA_ARCHS
    [ -n "$1" ] || return 0
    release=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
    [ "$release" = 11.8 ] || refuse "BUILD_IMAGE has nvcc ${release:-not at all}, and 11.8 compiles DeepSpeed's operators" \
        "use nvidia/cuda:11.8.0-devel-ubuntu22.04, or CUDA_ARCHS= (empty) for no operators"
}

check_cudart() { # TORCH CUDA_ARCHS: what DeepSpeed's operators are linked to, and PyTorch's own wheel carries under another name
    case $1 in torch-cu*) [ -n "$2" ] || return 0 ;; *) return 0 ;; esac
    [ -n "$(find / -xdev -name libcudart.so.11.0 -print -quit 2>/dev/null)" ] ||
        refuse "BASE_IMAGE has no libcudart.so.11.0, which DeepSpeed's operators need" \
            "use nvidia/cuda:11.8.0-base-ubuntu22.04, or CUDA_ARCHS= (empty) for no operators"
}

apt_install() { # PACKAGE...; from the distribution's own list alone: NVIDIA's is slow to reach from some places, and not needed
    # As root: apt's own user may not read the build's secret.
    cat >/tmp/apt.conf <<EOF
Dir::Etc::SourceList "/tmp/sources.list";
Dir::Etc::SourceParts "/dev/null";
Acquire::Retries "3";
APT::Sandbox::User "root";
EOF
    [ ! -s $ca_bundle ] || echo "Acquire::https::CAInfo \"$ca_bundle\";" >>/tmp/apt.conf
    sed "s#https\{0,1\}://[a-z.]*\.ubuntu\.com/ubuntu/\{0,1\}#${APT_MIRROR:-&}#" /etc/apt/sources.list >/tmp/sources.list
    export APT_CONFIG=/tmp/apt.conf
    apt-get -qq update
    apt-get -qq install --yes --no-install-recommends "$@" >/dev/null
    rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log /tmp/apt.conf /tmp/sources.list
}

python_for() { # packages, or: operators CUDA_ARCHS. Python 3.10 and venv, where they are not there; for operators Python.h and a compiler
    missing=''
    command -v python3.10 >/dev/null || missing=python3.10
    python3.10 -c 'import ensurepip' 2>/dev/null || missing="$missing python3.10-venv"
    if [ "$1" = operators ] && [ -n "$2" ]; then
        [ -e "$(python3.10 -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null)/Python.h" ] || missing="$missing python3.10-dev"
        command -v g++ >/dev/null || missing="$missing g++"
    fi
    # shellcheck disable=SC2086
    [ -z "$missing" ] || apt_install $missing
}

# For env/install_locked.sh: the image's Python writes no bytecode when it runs.
export UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy

pip() { /opt/venv/bin/python -m pip "$@"; }

locked() { sed -n "/^$1==/,/# via/p" /build/image.txt; } # NAME: its lines of the lock

install_torch() { # LOCK
    python3.10 -m venv /opt/venv
    pip install --no-deps --require-hashes --requirement /build/pip.txt
    # shellcheck source=env/torch_wheel.sh
    . /build/torch_wheel.sh
    torch_requirement "$1" >/tmp/torch.txt
    sh /build/env/install_locked.sh /opt/venv/bin/python /tmp/torch.txt --download-first --timeout 60 --retries 5
    rm -rf /opt/venv/uv # in the layer that has it
}

install_packages() {
    sed '/^deepspeed==/,/# via/d' /build/image.txt >/tmp/wheels.txt
    sh /build/env/install_locked.sh /opt/venv/bin/python /tmp/wheels.txt
    rm -rf /opt/venv/uv
}

compile_deepspeed() { # CUDA_ARCHS; empty: without operators. Into a wheel in /wheels
    # shellcheck source=env/cuda.sh
    . /build/cuda.sh
    locked deepspeed >/tmp/deepspeed.txt
    pip download --quiet --no-deps --require-hashes --no-build-isolation --no-binary deepspeed --dest /tmp/sdist --requirement /tmp/deepspeed.txt
    tar -C /tmp/sdist -xzf /tmp/sdist/deepspeed-*.tar.gz
    builder=$(echo /tmp/sdist/deepspeed-*/op_builder/builder.py)
    # DeepSpeed compiles cpu_adam for the CPU it is built on, and another one ends with SIGILL. x86-64-v3 is AVX2 and FMA: any
    # server of the last ten years; env/limits.toml has its flags for the check at start.
    sed -i "s/-march=native/-march=x86-64-v3/; s/-D__AVX512__/-D__AVX256__/; s/return '-D__SCALAR__'/return '-D__AVX256__'/" "$builder"
    if grep -E 'march=native|__AVX512__|__SCALAR__' "$builder" || ! grep -q 'march=x86-64-v3' "$builder"; then
        refuse "DeepSpeed's op_builder/builder.py is not what docker/install.sh knows" "adapt its sed line to this version"
    fi
    export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
    if [ -n "$1" ]; then # for cuda, though no GPU is here to be found: operators work only under the accelerator they were built for
        export DS_ACCELERATOR=cuda DS_BUILD_FUSED_ADAM=1 DS_BUILD_CPU_ADAM=1 TORCH_CUDA_ARCH_LIST="$1"
        command -v objdump >/dev/null || refuse "BUILD_IMAGE has no objdump, which looks for instructions of this machine's CPU alone" "install binutils in it"
    fi
    pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /tmp/sdist/deepspeed-*/
    python3.10 -m zipfile -e /wheels/deepspeed-*.whl /tmp/unpacked # its operators
    for library in /tmp/unpacked/deepspeed/ops/adam/cpu_adam_op*.so; do
        # zmm: the registers of AVX-512, which x86-64-v3 has not.
        [ ! -e "$library" ] || ! objdump -d "$library" | grep -q -m 1 '%zmm' || refuse "cpu_adam was compiled for this machine's CPU alone" "see compile_deepspeed"
    done
    rm -rf /tmp/sdist /tmp/unpacked
}
