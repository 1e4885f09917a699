"""StreamingLogMel: chunked equals offline for every chunking, with bounded memory and latency."""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ast_fast import LogMel, StreamingLogMel, cpp, use_backend
from ast_fast.config import LogMelConfig

RATES = (8000, 16000, 22050, 44100, 48000)
# the defaults, few bins, other windows, no pre-emphasis, and a hop longer than the window
CONFIGS = (
    {},
    {"num_mel_bins": 40, "mean": 0.0, "std": 0.5},
    {"window_ms": 32.0, "hop_ms": 8.0, "preemphasis": 0.0},
    {"window_ms": 10.0, "hop_ms": 10.0, "remove_dc": False},
    {"window_ms": 10.0, "hop_ms": 27.0, "num_mel_bins": 24},
    {"window": "povey", "n_fft": 1024, "window_samples": 600, "hop_samples": 250},
    {"mel_scale": "slaney", "mel_norm": "slaney", "power": 1, "output": "db", "preemphasis": 0.0},
)
# plain PyTorch's matrix product rounds by the number of rows; of values up to about 3
REFERENCE_ATOL = 2 * 2.0**-22

needs_cpp = pytest.mark.skipif(not cpp.available(), reason="the C++ extension is not built")


pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape, seed=0, dtype=torch.float32):
    wave = 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.int16:
        return (wave * 32768).round().clamp(-32768, 32767).to(dtype)
    return wave


def offline(wave, config):
    rows = wave if wave.dim() == 2 else wave[None]
    frames = LogMel(config.replace(num_frames=None))(rows)
    return frames if wave.dim() == 2 else frames[0]


def stream(wave, sizes, config, on_push=lambda frames, stream: None):
    """The frames of a waveform pushed in chunks of these sizes, over and over."""
    live = StreamingLogMel(config)
    parts, position, turn = [], 0, 0
    while position < wave.shape[-1]:
        size = sizes[turn % len(sizes)]
        turn += 1
        parts.append(live.push(wave[..., position : position + size]))
        position += size
        on_push(parts[-1], live)
    return torch.cat(parts, -2) if parts else offline(wave, config)


chunkings = st.lists(
    st.one_of(st.just(0), st.just(1), st.integers(2, 700), st.integers(700, 9000)),
    min_size=1,
    max_size=12,
).filter(lambda sizes: sum(sizes) > 0)


@needs_cpp
@given(
    sizes=chunkings,
    num_samples=st.integers(0, 6000),
    rate=st.sampled_from(RATES),
    changes=st.sampled_from(CONFIGS),
    dtype=st.sampled_from([torch.float32, torch.int16]),
    streams=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 99),
)
def test_every_chunking_gives_the_offline_frames_bit_by_bit(
    sizes, num_samples, rate, changes, dtype, streams, seed
):
    config = LogMelConfig(sample_rate_hz=rate, **changes)
    shape = (num_samples,) if streams is None else (streams, num_samples)
    wave = noise(*shape, seed=seed, dtype=dtype)
    with use_backend("cpp"):
        assert torch.equal(stream(wave, sizes, config), offline(wave, config))


@given(sizes=chunkings, num_samples=st.integers(0, 4000), seed=st.integers(0, 99))
def test_plain_pytorch_agrees_within_its_own_rounding(sizes, num_samples, seed):
    config = LogMelConfig()
    wave = noise(num_samples, seed=seed)
    with use_backend("reference"):
        found, expected = stream(wave, sizes, config), offline(wave, config)
    torch.testing.assert_close(found, expected, rtol=0, atol=REFERENCE_ATOL)


@needs_cpp
@pytest.mark.parametrize("rate", RATES)
def test_sample_by_sample_each_frame_comes_with_its_last_sample(rate):
    config = LogMelConfig(sample_rate_hz=rate)
    window, hop = rate // 40, rate // 100
    wave, counts = noise(window + 6 * hop + 3, seed=rate), []
    found = stream(wave, [1], config, lambda frames, _: counts.append(frames.shape[0]))
    assert torch.equal(found, offline(wave, config))
    ends = [index + 1 for index, count in enumerate(counts) if count]
    assert ends == [window + frame * hop for frame in range(7)] and max(counts) == 1


@pytest.mark.parametrize("changes", CONFIGS)
def test_less_than_a_window_is_kept_however_long_the_stream(changes):
    config = LogMelConfig(**changes)
    window = config.window_samples or int(16 * config.window_ms)
    kept = []

    def look(_, live):
        tail = live.state()["tail"]
        assert live._tail.untyped_storage().nbytes() == tail.numel() * 4
        kept.append(live.pending_samples)

    stream(noise(40_000), [1, 333, 5000, 160], config, look)
    assert max(kept) < window and max(kept) > 0


def test_a_chunk_is_not_kept_alive_and_may_be_overwritten():
    live, config = StreamingLogMel(), LogMelConfig()
    wave, buffer = noise(3000), torch.empty(1000)
    parts = []
    for start in (0, 1000, 2000):
        buffer.copy_(wave[start : start + 1000])
        parts.append(live.push(buffer))
        buffer.fill_(9.0)
    assert torch.equal(torch.cat(parts), stream(wave, [1000], config))
    chunk = noise(50)
    alive = weakref.ref(chunk)
    live.push(chunk)
    del chunk
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_the_frames_that_hold_it(backend, bad):
    config = LogMelConfig()
    clean = noise(6000)
    wave = clean.clone()
    wave[2500] = bad
    with use_backend(backend):
        found, expected = (stream(x, [37, 900, 1], config) for x in (wave, clean))
    starts = 160 * torch.arange(len(found))
    hit = (starts <= 2500) & (starts + 400 > 2500)
    assert int(hit.sum()) in (2, 3)
    assert found[hit].isnan().any(1).all()
    assert torch.equal(found[~hit], expected[~hit])


def test_reset_begins_another_stream_of_any_shape_and_dtype():
    live, config = StreamingLogMel(), LogMelConfig()
    live.push(noise(2, 555))
    assert (live.num_samples, live.num_frames, live.pending_samples) == (555, 1, 395)
    live.reset()
    assert (live.num_samples, live.num_frames, live.pending_samples) == (0, 0, 0)
    wave = noise(1000, dtype=torch.int16)
    assert torch.equal(live.push(wave), offline(wave, config))


@pytest.mark.parametrize("changes", CONFIGS)
def test_a_saved_state_goes_on_elsewhere(changes, tmp_path):
    wave, config = noise(2, 5000), LogMelConfig(**changes)
    first, second = StreamingLogMel(config), StreamingLogMel(config)
    before = first.push(wave[:, :2345])
    torch.save(first.state(), tmp_path / "state.pt")
    first.push(wave[:, 2345:])  # what was saved is not shared with the stream
    second.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    after = second.push(wave[:, 2345:])
    torch.testing.assert_close(torch.cat((before, after), 1), offline(wave, config))
    assert second.num_frames == first.num_frames and second.num_samples == 5000
    with pytest.raises(ValueError, match=r"num_mel_bins=\d+: expected num_mel_bins=31"):
        StreamingLogMel(config, num_mel_bins=31).load_state(first.state())


def test_arrays_are_taken_read_only_ones_too():
    wave = noise(1000, dtype=torch.int16)
    received = np.frombuffer(wave.numpy().tobytes(), np.int16)
    assert not received.flags.writeable
    assert torch.equal(StreamingLogMel().push(received), offline(wave, LogMelConfig()))
    reversed_wave = wave.numpy()[::-1]
    assert torch.equal(StreamingLogMel().push(reversed_wave), offline(wave.flip(0), LogMelConfig()))


def test_frames_of_a_number_are_refused_and_the_configs_number_is_dropped():
    with pytest.raises(ValueError, match="num_frames=100: a stream has no fixed number"):
        StreamingLogMel(num_frames=100)
    live = StreamingLogMel(LogMelConfig(num_frames=3))
    assert live.config.num_frames is None
    assert live.push(noise(16000)).shape == (98, 128)


def test_out_dtype_holds_for_empty_results_too():
    live = StreamingLogMel()
    first, second = (live.push(noise(300), torch.bfloat16) for _ in range(2))
    assert first.shape == (0, 128) and second.shape == (2, 128)
    assert first.dtype == second.dtype == torch.bfloat16


def test_no_gradient_flows_and_none_is_held():
    chunk = noise(1000).requires_grad_()
    live = StreamingLogMel()
    assert not live.push(chunk).requires_grad and not live._tail.requires_grad


@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        (torch.zeros(9), torch.zeros(9).short(), TypeError, "torch.int16: expected torch.float32"),
        (torch.zeros(9), torch.zeros(1, 9), ValueError, r"\(1, 9\): expected \[N\] as before"),
        (torch.zeros(1, 9), torch.zeros(9), ValueError, r"\(9,\): expected \[1, N\] as before"),
        (torch.zeros(2, 9), torch.zeros(3, 9), ValueError, r"\(3, 9\): expected \[2, N\] as bef"),
        (torch.zeros(9), torch.zeros(9, device="meta"), ValueError, "on meta: expected cpu"),
        (torch.zeros(9), torch.zeros(()), ValueError, r"\(\): expected \[N\] or \[B, N\]"),
        (torch.zeros(9), torch.zeros(9).double(), TypeError, "torch.float64: expected float32"),
        (torch.zeros(9), np.zeros(9), TypeError, "torch.float64: expected float32"),
        (torch.zeros(9), [0.0], TypeError, "list: expected a tensor or a NumPy array"),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused_and_changes_nothing(first, second, error, message):
    live = StreamingLogMel()
    live.push(first)
    with pytest.raises(error, match=message):
        live.push(second)
    assert live.num_samples == live.pending_samples == 9
    live.push(first)


def test_settings_that_do_not_fit_are_refused_at_once():
    with pytest.raises(ValueError, match="high_freq_hz=9000"):
        StreamingLogMel(high_freq_hz=9000.0)
    with pytest.raises(ValueError, match=r"hop_ms=0\.01"):
        StreamingLogMel(hop_ms=0.01)
    with pytest.raises(ValueError, match="padding='reflect': frames centred on hops need"):
        StreamingLogMel(LogMelConfig.mel_spectrogram())
    with pytest.raises(ValueError, match="top_db=80: the loudest value"):
        StreamingLogMel(output="db", top_db=80.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_triton_gives_the_offline_frames_bit_by_bit_on_a_gpu(dtype):
    wave = noise(3, 48000, dtype=dtype).cuda()
    for sizes in ([1, 160, 161, 7], [401], [4000, 33], [20000]):
        assert torch.equal(stream(wave, sizes, LogMelConfig()), offline(wave, LogMelConfig())), (
            sizes
        )
