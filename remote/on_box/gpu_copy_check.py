"""A check of copies between GPUs: copy a pattern from each GPU to each other, and compare it.

It runs on the box as a part of probe.sh, with any Python from 3.6 on, and needs only the driver's
library. Some drivers offer peer access that delivers zeros (RTX 4090, NVIDIA/nccl-tests#117), which
training would not notice.

PROTOCOL.md describes the output. Indexes are nvidia-smi's, with CUDA_DEVICE_ORDER=PCI_BUS_ID as
probe.sh sets it.
"""

import ctypes
import sys
from typing import Any, List  # noqa: UP035 (as it must be in 3.6)

SIZE = 1 << 20  # bytes; as much as one of NCCL's buffers
ALREADY = 704  # CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED


class Failed(Exception):
    pass


def say(key: str, *fields: object) -> None:
    # One write for each line, immediately, so that no result is lost when the time is over.
    sys.stdout.write("{}\t{}\n".format(key, "|".join(map(str, fields))))
    sys.stdout.flush()


class Cuda:
    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")

    def __call__(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise Failed(f"{name} {code}")


def pattern(source: int, target: int) -> bytes:
    """Make the bytes to copy: without zeros, and different for each pair of GPUs.

    So bytes that an earlier copy left behind do not look right.
    """
    period = bytes(bytearray(1 + (index * 7 + source * 31 + target * 101) % 255 for index in range(255)))
    return (period * (SIZE // len(period) + 1))[:SIZE]


class CudaDevice:
    """One card with its primary context and one buffer."""

    def __init__(self, cuda: Cuda, index: int) -> None:
        self.cuda, self.index = cuda, index
        self.device, self.context, self.buffer = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
        cuda("cuDeviceGet", ctypes.byref(self.device), ctypes.c_int(index))
        cuda("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), self.device)
        self.enter()
        cuda("cuMemAlloc_v2", ctypes.byref(self.buffer), ctypes.c_size_t(SIZE))

    def enter(self) -> None:
        self.cuda("cuCtxSetCurrent", self.context)

    def reaches(self, other: "CudaDevice") -> int:
        can = ctypes.c_int()
        self.cuda("cuDeviceCanAccessPeer", ctypes.byref(can), self.device, other.device)
        return int(bool(can.value))


def copied_right(cuda: Cuda, source: CudaDevice, target: CudaDevice, access: int) -> bool:
    if access:
        source.enter()
        try:
            cuda("cuCtxEnablePeerAccess", target.context, ctypes.c_uint(0))
        except Failed as failed:
            if not str(failed).endswith(f" {ALREADY}"):
                raise
    sent, received = pattern(source.index, target.index), ctypes.create_string_buffer(SIZE)
    target.enter()
    cuda("cuMemsetD8_v2", target.buffer, ctypes.c_ubyte(0), ctypes.c_size_t(SIZE))
    cuda("cuCtxSynchronize")
    source.enter()
    cuda("cuMemcpyHtoD_v2", source.buffer, sent, ctypes.c_size_t(SIZE))
    cuda("cuMemcpyPeer", target.buffer, target.context, source.buffer, source.context, ctypes.c_size_t(SIZE))
    cuda("cuCtxSynchronize")
    target.enter()
    cuda("cuCtxSynchronize")
    cuda("cuMemcpyDtoH_v2", received, target.buffer, ctypes.c_size_t(SIZE))
    return received.raw == sent


def try_pair(cuda: Cuda, source: CudaDevice, target: CudaDevice) -> None:
    access: Any = ""
    try:
        access = source.reaches(target)
        result = "right" if copied_right(cuda, source, target, access) else "wrong"
    except (Failed, AttributeError) as failed:
        result = f"failed {failed}"
    say("peer", source.index, target.index, access, result)


def main() -> None:
    try:
        cuda = Cuda()
        cuda("cuInit", ctypes.c_uint(0))
        count = ctypes.c_int()
        cuda("cuDeviceGetCount", ctypes.byref(count))
        if count.value < 2:
            say("peers", f"{count.value} cards")
            return
        cards: List[CudaDevice] = []  # noqa: UP006 (3.6 has no list[Card])
        # A context takes some tenths of a second: pairs are tried as soon as both cards have
        # theirs.
        for index in range(count.value):
            card = CudaDevice(cuda, index)
            for other in cards:
                try_pair(cuda, other, card)
                try_pair(cuda, card, other)
            cards.append(card)
    except OSError:
        say("peers", "no libcuda.so.1")
    except (Failed, AttributeError) as failed:
        say("peers", f"failed {failed}")


main()
