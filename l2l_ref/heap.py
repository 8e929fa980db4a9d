"""The C library's heap: what is freed stays with the process, ready for the next step."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_BLOCK = 32 << 20  # bytes; glibc takes no higher threshold


def keep_freed_memory() -> bool:
    """Tell glibc not to give freed memory back to the system; whether that could be done.

    Every step of a network frees tensors of some megabytes and asks for the same ones again. Memory
    that comes anew from the system is cleared page by page at first touch, which costs a network
    of convolutions as much time as its arithmetic.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library
        return False
    kept = mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK) and kept)
