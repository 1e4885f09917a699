"""Device tables of the log-mel kernels, derived once per setting and device.

DC removal, pre-emphasis, window and DFT are linear in a frame, so they fold into one real operator
G [window, 2 * bins], built in float64: spectrum = frame @ G, real and imaginary parts side by side.
Only bins that some filter uses are kept, and G is padded with zeros to whole tiles.

G is stored scaled by a power of two that puts its largest entry in [2^12, 2^13), and cut into a
coarse piece on a grid of 2^5, at most 2^8 steps, and remainders: two float16 remainders (30 bits in
all) or one float32. Products of coarse pieces are integers small enough for float32 sums of a whole
window to be exact, in any order and with any rounding; see log_mel.py. Windows of more than 1024
samples with little taper are scaled to half of that, or their sums would not be.

A mel filter is a short run of bins: filters are stored as first bin and weights, and once more
transposed, as first filter and weights of each bin, for the gradient.
"""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles of the kernels divide these.
BIN_PADDING = 64
SAMPLE_PADDING = 32
_LARGEST_EXPONENT = 12
_COARSE_STEP = 32.0
# a sample has up to 2^7 coarse steps, and float32 holds integers up to 2^24
_MOST_STEPS = 2.0**17


class LogMelTables(Protocol):
    """The settings a backend is given; see `ast_fast.reference.mel.MelTables`."""

    window_samples: int
    hop_samples: int
    n_fft: int
    num_mel_bins: int
    preemphasis: float
    remove_dc: bool
    log_floor: float
    window: Tensor  # [window_samples] float64
    filters: Tensor  # [F, n_fft // 2 + 1] float64
    magnitude: bool
    log_offset: float


class Operator(NamedTuple):
    """What the kernels read."""

    # coarse, fine and finest piece of G * 2^k, or coarse and the rest in float32
    half_pieces: Tensor  # [3, K, 2 * N] float16
    single_pieces: Tensor  # [2, K, 2 * N] float32
    unscale: float  # 2^-k
    dense: Tensor  # [K, 2 * N] float32, G itself
    first_bin: Tensor  # [F] int32
    bin_weights: Tensor  # [taps, F] float32
    first_mel: Tensor  # [N] int32
    mel_weights: Tensor  # [taps, N] float32


_cache: weakref.WeakKeyDictionary[LogMelTables, dict[torch.device, Operator]] = (
    weakref.WeakKeyDictionary()
)


def operator(tables: LogMelTables, device: torch.device) -> Operator:
    """The tables of one setting on `device`, built on first use and kept while `tables` lives."""
    per_device = _cache.setdefault(tables, {})
    if device not in per_device:
        parts = (
            part.to(device) if isinstance(part, Tensor) else part for part in build_operator(tables)
        )
        per_device[device] = Operator(*parts)
    return per_device[device]


def fold(tables: LogMelTables) -> Tensor:  # [window, n_fft // 2 + 1] complex128
    """DC removal, pre-emphasis, window and DFT as one operator on raw frames."""
    win, n_fft = tables.window_samples, tables.n_fft
    frame = torch.eye(win, dtype=torch.float64)
    if tables.remove_dc:
        frame = frame - 1.0 / win
    if tables.preemphasis:
        previous = torch.cat((frame[:, :1], frame[:, :-1]), dim=1)
        frame = frame - tables.preemphasis * previous
    return torch.fft.rfft(frame * tables.window.to(torch.float64), n=n_fft)


def used_bins(filters: Tensor) -> tuple[int, int]:
    """First and one past the last DFT bin with weight in any filter; (0, 1) if there is none."""
    used = torch.nonzero(filters.abs().sum(0)).flatten().tolist()
    return (used[0], used[-1] + 1) if used else (0, 1)


def runs(matrix: Tensor) -> tuple[Tensor, Tensor]:  # [rows] int32, [taps, rows] float32
    """Each row as its first nonzero column and the weights from there on; empty rows are zero."""
    width = matrix.shape[1]
    nonzero = matrix != 0
    first = torch.where(nonzero.any(1), nonzero.int().argmax(1), 0)
    last = torch.where(nonzero.any(1), width - 1 - nonzero.flip(1).int().argmax(1), 0)
    taps = int((last - first).max()) + 1
    # a run may not leave the row: its first column moves back, its weights do not
    first = first.clamp(max=width - taps)
    columns = first[:, None] + torch.arange(taps)
    return first.to(torch.int32), matrix.gather(1, columns).t().to(torch.float32).contiguous()


def _coarse_steps(dense: Tensor, exponent: int) -> Tensor:
    return torch.round(dense * (2.0**exponent / _COARSE_STEP))


def build_operator(tables: LogMelTables) -> Operator:
    """The tables of one setting, on the CPU."""
    filters = tables.filters.to("cpu", torch.float64)
    first, last = used_bins(filters)
    folded = torch.view_as_real(fold(tables)[:, first:last]).flatten(1)  # [win, 2 * bins]
    rows = -(-tables.window_samples // SAMPLE_PADDING) * SAMPLE_PADDING
    cols = -(-(last - first) // BIN_PADDING) * BIN_PADDING
    dense = torch.zeros(rows, 2 * cols, dtype=torch.float64)
    dense[: folded.shape[0], : folded.shape[1]] = folded
    exponent = _LARGEST_EXPONENT - math.floor(math.log2(dense.abs().max().item() or 1.0))
    # sums over a long window with little taper would leave the exact integers
    while _coarse_steps(dense, exponent).abs().sum(0).max() > _MOST_STEPS:
        exponent -= 1
    scaled = dense * 2.0**exponent
    coarse = _coarse_steps(dense, exponent) * _COARSE_STEP
    fine = (scaled - coarse).to(torch.float16)
    finest = (scaled - coarse - fine.to(torch.float64)).to(torch.float16)
    padded = torch.zeros(tables.num_mel_bins, cols, dtype=torch.float64)
    padded[:, : last - first] = filters[:, first:last]
    return Operator(
        torch.stack((coarse.to(torch.float16), fine, finest)),
        torch.stack((coarse, scaled - coarse)).to(torch.float32),
        2.0**-exponent,
        dense.to(torch.float32),
        *runs(padded),
        *runs(padded.t()),
    )


@triton.jit
def frame_count(lengths_ptr, clip, num_samples, num_frames, WIN: tl.constexpr, HOP: tl.constexpr):
    """Frames of a clip that hold signal: whole windows within its length."""
    length = tl.full([], 0, tl.int64) + num_samples
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + clip).to(tl.int64), length)
    count = tl.where(length < WIN, 0, 1 + (length - WIN) // HOP)
    return tl.minimum(count, num_frames)
