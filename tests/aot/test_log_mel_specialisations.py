"""What the log-mel launchers ask the compiler for: loads of 16 bytes, whatever the clips' lengths."""

from __future__ import annotations

import os
import re

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not specialised", allow_module_level=True)
pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from ast_fast.audio_report import AudioReport
from ast_fast.data import Clip, Collate
from ast_fast.inference.engine import collate_windows
from ast_fast.inference.reader import Window
from ast_fast.kernels import _aot, _tuned, log_mel
from ast_fast.ops.log_mel import log_mel_op
from ast_fast.reference.mel import mel_tables

pytestmark = pytest.mark.aot
ARCHES = (80, 90)
SETTING = (16000.0, 128.0, 25.0, 10.0, 20.0, 0.0, 0.97, 1.0, 1.2e-7)  # of the registered op
KERNELS = (log_mel._spectrum_kernel, log_mel._mel_kernel)


class PretendDriver:
    """As much of a driver as a launch asks before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def request(fn, signature, constants, attrs, warps, stages):
    """One specialisation as something that can be compared."""
    return (
        fn.fn.__name__,
        tuple(sorted((name, str(kind)) for name, kind in signature.items())),
        tuple(sorted((path, str(value)) for path, value in constants.items())),
        tuple(sorted((path, str(value)) for path, value in attrs.items() if value)),
        warps,
        stages,
    )


@pytest.fixture
def recorder(monkeypatch):
    """A function that pretends to be a GPU of some architecture and returns the list of requests."""

    def start(arch: int) -> list:
        requests: list = []
        monkeypatch.setattr(triton.runtime.driver, "_active", PretendDriver(arch))
        monkeypatch.setattr(_tuned, "capability", lambda device: arch)

        def record(self, key, signature, device, constexprs, options, attrs, warmup):
            found = request(
                self, signature, constexprs, attrs, options.num_warps, options.num_stages
            )
            requests.append(found)

        for fn in KERNELS:
            fn.device_caches.clear()
            monkeypatch.setattr(type(fn), "_do_compile", record)
        return requests

    yield start
    for fn in KERNELS:
        fn.device_caches.clear()


def launch(wave, lengths=None):
    """Features as AST takes them."""
    frames = 1 + (wave.shape[1] - 400) // 160
    return log_mel.forward(wave, lengths, mel_tables(16000), frames, 0.0, 0.5, torch.float32)


def clip(samples, dtype):
    return Clip(torch.ones(samples).to(dtype), (0,), 0, AudioReport())


def from_the_feeder(sizes, dtype):
    batch = Collate(2)([clip(samples, dtype) for samples in sizes])
    return batch.wave, batch.lengths


def from_the_engine(sizes, dtype):
    batch = collate_windows([Window(0, clip(samples, dtype), None) for samples in sizes])
    return batch.wave, batch.lengths


def as_handed_over(sizes, dtype):
    return torch.zeros(len(sizes), max(sizes), dtype=dtype), torch.tensor(sizes)


def gate(arch):
    """The kernels of the compile gate as requests, with the alignment of each argument."""
    found = set()
    for case in log_mel.aot_cases(arch):
        source = _aot.source(case)
        constants = {(case.fn.arg_names.index(k),): v for k, v in case.constexprs.items()}
        found.add(
            request(
                case.fn, source.signature, constants, source.attrs, case.num_warps, case.num_stages
            )
        )
    return found


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
@pytest.mark.parametrize("make", [from_the_feeder, from_the_engine, as_handed_over])
def test_clips_of_any_length_ask_for_what_the_gate_compiled_and_for_one_form(
    recorder, arch, dtype, make
):
    requests = recorder(arch)
    for sizes in ([160480], [160480, 31999, 401], [160007, 160000], [160000] * 3, [400, 16000]):
        launch(*make(sizes, dtype))
    assert len(set(requests)) == 2, "one of each kernel"
    missing = set(requests) - gate(arch)
    assert not missing, missing.pop()


@pytest.mark.parametrize("make", [from_the_feeder, from_the_engine])
def test_batches_as_we_make_them_are_not_copied(recorder, monkeypatch, make):
    recorder(90)
    seen = []

    def forward(wave, *_):
        seen.append((wave.data_ptr(), wave.stride()))
        return torch.empty(1)

    monkeypatch.setattr(log_mel, "forward", forward)
    for sizes in ([160480, 31999], [160480], [401]):
        wave, lengths = make(sizes, torch.int16)
        assert wave.shape == (len(sizes), max(sizes))
        assert log_mel.aligned_rows(wave).data_ptr() == wave.data_ptr()
        seen.clear()
        log_mel_op.body(wave, lengths, SETTING, 8, 0.0, 0.5, torch.float32, "triton")
        assert seen == [(wave.data_ptr(), wave.stride())]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 103),
        lambda: torch.randn(6, 103).t(),
        lambda: torch.randn(3, 1)[:, :0],
        lambda: torch.randn(2, 112)[:, 3:],
        lambda: torch.randn(1, 104)[:, 1:],
        lambda: torch.randn(1, 103),
        lambda: torch.randn(1, 103).expand(3, 103),
        lambda: torch.randn(4, 206)[:, ::2],
    ],
)
def test_rows_that_do_not_fit_are_copied_to_where_they_do(make):
    wave = make()
    found = log_mel.aligned_rows(wave)
    assert torch.equal(found, wave)
    assert found.stride(0) % 16 == 0 and found.data_ptr() % 16 == 0
    assert found.shape[1] <= 1 or found.stride(1) == 1


def test_samples_are_loaded_16_bytes_at_a_time():
    (case,) = [case for case in log_mel.aot_cases(90) if case.name == "log_mel-power-i16"]
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    target = GPUTarget("cuda", 90, 32)
    ptx = triton.compile(_aot.source(case), target=target, options=options).asm["ptx"]
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
    assert not re.search(r"ld\.global\S*\.[bus]16\b", ptx), "one sample at a time"
