"""FLAC in C++: mono files of 16 bits, as data sets hold them, faster than libsndfile and to the same bits."""

from __future__ import annotations

import importlib

import numpy as np

HEAD_BYTES = 42  # up to the end of STREAMINFO


def stream_info(head: bytes) -> tuple[int, int, int] | None:
    """Rate, samples and most samples a frame of a file that `decode` may take, by its first bytes."""
    if len(head) < HEAD_BYTES or head[:4] != b"fLaC" or head[4] & 0x7F or head[5:8] != b"\0\0\x22":
        return None
    packed = int.from_bytes(head[18:26], "big")
    rate_hz, channels = packed >> 44, (packed >> 41 & 7) + 1
    bits, samples = (packed >> 36 & 31) + 1, packed & ((1 << 36) - 1)
    if channels != 1 or bits != 16 or not samples or not rate_hz:
        return None
    return rate_hz, samples, int.from_bytes(head[10:12], "big")


def decode(file: bytes) -> np.ndarray | None:
    """Samples [N] int16 of a whole file; None if it is damaged, of another kind, or holds more than that.

    Needs the extension. The caller bounds the samples that `stream_info` promises: they are allocated.
    """
    info = stream_info(file)
    begin = _after_metadata(file)
    if info is None or begin is None:
        return None
    _, samples, most = info
    out = np.empty(samples, np.int16)
    scratch = np.empty(most, np.int32)
    module = importlib.import_module("ast_fast._C")
    good = module.flac_decode(file, begin, out.ctypes.data, scratch.ctypes.data, samples, most)
    return out if good else None


def _after_metadata(file: bytes) -> int | None:
    """Where the first frame begins."""
    place = 4
    while place + 4 <= len(file):
        last, size = file[place] & 0x80, int.from_bytes(file[place + 1 : place + 4], "big")
        place += 4 + size
        if last:
            return place
    return None
