# shellcheck shell=sh
# The CUDA environment, for the image and for a bare box alike; sourced. Without CUDA it changes nothing.
#
# PyTorch's wheels bring cuBLAS, cuDNN and NCCL themselves. CUDA_HOME is what DeepSpeed looks for when it compiles (nvcc), and
# lib64 (conda: lib) holds libcudart.so.11.0, which DeepSpeed's operators are linked to and PyTorch's cu118 wheel carries under another name.
# /usr/local/cuda is left alone: it may be another version, whose nvcc DeepSpeed refuses. Name it in CUDA_HOME to have it.
for cuda_home in "${CUDA_HOME:-}" "${CONDA_PREFIX:-}" /usr/local/cuda-11.8; do
    cuda_lib="$cuda_home/lib64"
    [ -e "$cuda_lib/libcudart.so.11.0" ] || [ ! -e "$cuda_home/lib/libcudart.so.11.0" ] || cuda_lib="$cuda_home/lib"
    if [ -n "$cuda_home" ] && { [ -x "$cuda_home/bin/nvcc" ] || [ -e "$cuda_lib/libcudart.so.11.0" ]; }; then
        export CUDA_HOME="$cuda_home" PATH="$cuda_home/bin:$PATH" LD_LIBRARY_PATH="$cuda_lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        break
    fi
done
unset cuda_home cuda_lib
