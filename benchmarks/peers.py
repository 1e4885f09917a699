"""The peers: other implementations of the same computations, imported only when they are measured.

A peer whose package is absent is skipped by name, with the reason in its row. `Skipped` is raised
from inside a candidate's `prepare`, so that nothing here costs anything until it is asked for.
"""

from __future__ import annotations

import fnmatch
import importlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Skipped

# what --peers takes: names, or patterns such as sdpa*
PEERS = {
    "torch": "plain PyTorch ops, eager",
    "torch-compile": "the same under torch.compile",
    "sdpa": "F.scaled_dot_product_attention, PyTorch's own choice of backend",
    "sdpa-cudnn": "its cuDNN backend",
    "sdpa-cudnn-deterministic": "its cuDNN backend, asked for deterministic gradients",
    "one pass": "ours with deterministic=False",
    "sdpa-flash": "its FlashAttention backend",
    "sdpa-efficient": "its memory-efficient backend",
    "sdpa-math": "its unfused backend",
    "sdpa-mask": "F.scaled_dot_product_attention with a boolean mask",
    "unmasked": "ours over all pairs, where ours takes a mask",
    "flex": "FlexAttention under torch.compile with a block mask",
    "sdpa-padded": "packed clips padded to the longest, with a mask",
    "varlen": "torch.nn.attention.varlen.varlen_attn",
    "loop": "one call a clip",
    "all-tokens": "ours without patchout or token merging",
    "transformers": "transformers' AST with SDPA; for the front end its feature extractor",
    "native": "our own model of the same weights",
    "transformers-eager": "transformers' AST with eager attention",
    "transformers-compile": "transformers' AST with SDPA under torch.compile",
    "transformers-compile-frozen": "the same with Inductor's freezing, which packs weights on a CPU",
    "timm": "timm's transformer blocks in the original AST's forward",
    "eager": "our step without a CUDA graph",
    "regional": "our step with its blocks under torch.compile",
    "graph": "ours as a CUDA graph",
    "fp8": "ours with the blocks' products in FP8",
    "less memory": "our step, LayerNorms computed again in backward",
    "autocast": "our step under autocast over float32 weights",
    "original": "the original's recipe: float16 autocast, eager attention, log-mel on the CPU",
    "transformers-amp": "transformers' AST with SDPA under bfloat16 autocast over float32 weights",
    "transformers-amp-compile": "the same under torch.compile",
    "one thread": "ours on one thread, where ours takes two",
    "torchaudio": "torchaudio.compliance.kaldi.fbank, a clip at a time",
    "soundfile": "decoding alone, no features",
    "soundfile+torchaudio": "decoding and torchaudio's fbank, a clip at a time",
    "kaldi-native-fbank": "kaldi-native-fbank, a clip at a time",
    "onnxruntime": "the plain PyTorch AST exported to ONNX",
    "onnxruntime-int8": "the same with dynamically quantised products",
    "openvino": "the plain PyTorch AST converted to OpenVINO",
    "openvino-bf16": "the same in bfloat16",
    "openvino-int8": "the same with products quantised by NNCF",
    "torch-int8": "the plain PyTorch AST with dynamically quantised linear layers",
    "rows": "ours from a weight that is not packed",
    "residual by oneDNN": "a packed product to which oneDNN adds a residual",
    "bytes": "the product of bytes alone",
    "unpacked": "ours without `optimize_for_inference`",
}


def names(text: str | None) -> tuple[str, ...] | None:
    """Peers, or patterns of them, of a comma-separated list; None for all.

    Raises:
        ValueError: a name is unknown.
    """
    if text is None or text == "all":
        return None
    wanted = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in wanted if name != "none" and not fnmatch.filter(PEERS, name)]
    if unknown:
        raise ValueError(
            f"--peers {text!r}: unknown peer {', '.join(unknown)}; "
            f"expected some of all, none, {', '.join(PEERS)}"
        )
    return wanted


def need(module: str) -> ModuleType:
    """The module, or `Skipped` with the reason: absent, or present and broken."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise Skipped(f"{module} does not import ({type(error).__name__}: {error})") from error


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of a function, static shapes; `Skipped` where there is no compiler for it."""
    if not hasattr(torch, "compile"):
        raise Skipped("this PyTorch has no torch.compile")
    return torch.compile(function, dynamic=False)


def compiled_parts(network: torch.nn.Module, **options: Any) -> torch.nn.Module:
    """The network with its repeated blocks compiled, once for all: quick to prepare, for checks."""
    for part in network.modules():
        if isinstance(part, torch.nn.ModuleList):
            for block in part:
                block.compile(dynamic=False, **options)
    return network


# as an option it also keeps code that others compiled from being taken for this, and the reverse
_FREEZING = {"freezing": True}


def compiled_frozen(network: torch.nn.Module, parts: bool = False) -> Callable[..., Any]:
    """A network in eval mode under `torch.compile` with its weights as constants: packed on a CPU.

    Freezing is on during the first call alone, which compiles; without gradients, or it does nothing.

    Args:
        network: its weights no longer change.
        parts: compile its repeated blocks only, as `compiled_parts` does.
    """
    if not hasattr(torch, "compile"):
        raise Skipped("this PyTorch has no torch.compile")
    config = need("torch._inductor.config")
    compile_: Callable[..., Any] = (
        compiled_parts if parts else partial(torch.compile, dynamic=False)
    )
    call = compile_(network, options=_FREEZING)
    calls = itertools.count()

    def run(*inputs: Tensor) -> Any:
        if next(calls):
            return call(*inputs)
        with config.patch(freezing=True):
            return call(*inputs)

    return run


SDPA_BACKENDS = {
    "sdpa-cudnn": "CUDNN_ATTENTION",
    "sdpa-flash": "FLASH_ATTENTION",
    "sdpa-efficient": "EFFICIENT_ATTENTION",
    "sdpa-math": "MATH",
}


def sdpa(name: str) -> Callable[..., Sequence[Tensor]]:
    """`F.scaled_dot_product_attention` on [B, T, H, D] views, held to one backend unless `sdpa`.

    The backward of a graph made under a held backend uses that backend too.
    """

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if name == "sdpa":
            return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2),)
        attention = importlib.import_module("torch.nn.attention")
        backend = getattr(attention.SDPBackend, SDPA_BACKENDS[name])
        with attention.sdpa_kernel([backend]):
            return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2),)

    return run


def torchaudio_fbank(num_mel_bins: int = 128, rate: int = 16000) -> Callable[[Tensor], Tensor]:
    """torchaudio's Kaldi fbank as AST calls it: [B, N] -> [B, S, F], raw energies."""
    kaldi = need("torchaudio.compliance.kaldi")

    def run(wave: Tensor) -> Tensor:
        clips = [
            kaldi.fbank(
                clip[None],
                htk_compat=True,
                sample_frequency=rate,
                use_energy=False,
                window_type="hanning",
                num_mel_bins=num_mel_bins,
                dither=0.0,
                frame_shift=10,
            )
            for clip in wave
        ]
        return torch.stack(clips)

    return run


def kaldi_native_fbank(num_mel_bins: int = 128, rate: int = 16000) -> Callable[[Tensor], Tensor]:
    """kaldi-native-fbank with the same options: [B, N] -> [B, S, F], raw energies."""
    knf = need("kaldi_native_fbank")
    numpy = need("numpy")
    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.samp_freq = rate
    options.frame_opts.window_type = "hanning"
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = num_mel_bins
    options.mel_opts.low_freq = 20.0
    options.mel_opts.high_freq = 0.0
    options.use_energy = False

    def one(clip: Tensor) -> Tensor:
        fbank = knf.OnlineFbank(options)
        fbank.accept_waveform(rate, clip.numpy())
        fbank.input_finished()
        frames = [fbank.get_frame(number) for number in range(fbank.num_frames_ready)]
        return torch.from_numpy(numpy.stack(frames))

    return lambda wave: torch.stack([one(clip) for clip in wave])


def feature_extractor() -> Callable[[Tensor], Tensor]:
    """transformers' ASTFeatureExtractor: [B, N] -> [B, 1024, 128], normalised."""
    transformers = need("transformers")
    extractor = transformers.ASTFeatureExtractor()

    def run(wave: Tensor) -> Tensor:
        clips = [clip.cpu().numpy() for clip in wave]
        features = extractor(clips, sampling_rate=16000, return_tensors="pt")["input_values"]
        return features.to(wave.device)

    return run
