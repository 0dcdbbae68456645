# shellcheck shell=sh
# Sourced by remote/on_box/supervisor.sh and remote/on_box/environment.sh with `cache` set, ROOT/cache of the box: what libraries keep for later lies
# there, so that the user's home stays as it was and a purge takes all of it.
# shellcheck disable=SC2154 # cache
HF_HOME=$cache/huggingface RLHF_CACHE=$cache/rlhf-box XDG_CACHE_HOME=$cache PIP_CACHE_DIR=$cache/pip TMPDIR=$cache/tmp
TRITON_CACHE_DIR=$cache/triton TORCH_EXTENSIONS_DIR=$cache/torch_extensions CUDA_CACHE_PATH=$cache/cuda
export HF_HOME RLHF_CACHE XDG_CACHE_HOME PIP_CACHE_DIR TMPDIR TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR CUDA_CACHE_PATH
