"""What `ast-fast listen` does: raw samples on standard input, one line of labels a hop."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ._text import one_line
from .config import ModelFacts
from .inference import Activation, load_for_inference
from .labels import read_labels
from .streaming import StreamingTagger, StreamPrediction

_READ_BYTES = 1 << 16
_RECORD = "arecord -t raw -f S16_LE -r {rate} | ast-fast listen --model DIR"


def listen(
    model: str,
    rate_hz: int,
    hop_s: float,
    window_s: float | None,
    top_k: int,
    labels: Path | None,
    activation: Activation,
    smoothing: float,
    as_json: bool,
    facts: ModelFacts,
) -> int:
    """See `cli.listen`."""
    source = _standard_input(rate_hz)
    network = load_for_inference(model, facts=facts)
    tagger = StreamingTagger(
        network,
        window_s=window_s,
        hop_s=hop_s,
        top_k=top_k,
        labels=read_labels(labels, network.config.label_dim).names if labels else None,
        activation=activation,
        source_rate_hz=rate_hz,
        smoothing=smoothing,
    )
    _note(
        f"listening at {rate_hz} Hz: the last {tagger.window_s:.2f} s every {tagger.hop_s:g} s; "
        "Ctrl-C ends it"
    )
    rest = b""
    pace = _Pace(tagger.hop_s)
    try:
        for data in _blocks(source):
            data = rest + data
            whole = len(data) // 2 * 2
            rest = data[whole:]
            pace.begin()
            results = tagger.push(np.frombuffer(data[:whole], "<i2").astype(np.int16))
            pace.end(len(results))
            _print(results, as_json)
        _print(tagger.flush(), as_json)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped after {tagger.seconds:.2f} s of audio") from None
    if rest:
        _note("the stream ended in the middle of a sample: 1 byte was dropped")
    if not tagger.seconds:
        raise ValueError(
            f"standard input held no samples: expected raw 16-bit mono at {rate_hz} Hz, as from "
            + _RECORD.format(rate=rate_hz)
        )
    if not tagger.num_results:
        _note(f"the stream of {tagger.seconds:.4f} s is shorter than one frame: nothing to label")
    _note(f"the stream ended after {tagger.seconds:.2f} s")
    return 0


def _standard_input(rate_hz: int) -> BinaryIO:
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("standard input is closed: expected raw samples on it")
    if sys.stdin.isatty():
        raise ValueError(
            "standard input is a terminal: expected raw 16-bit mono samples, as from "
            + _RECORD.format(rate=rate_hz)
        )
    return sys.stdin.buffer


def _blocks(source: BinaryIO) -> Iterator[bytes]:
    """What has come, as soon as it comes: waiting for full blocks would delay the results."""
    read = getattr(source, "read1", source.read)
    while data := read(_READ_BYTES):
        yield data


class _Pace:
    """Say once if windows take longer than a hop: a live source would outrun the model."""

    def __init__(self, hop_s: float) -> None:
        self._hop_s = hop_s
        self._began = 0.0
        self._slow = 0
        self._said = False

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self, results: int) -> None:
        if not results or self._said:
            return
        each_s = (time.perf_counter() - self._began) / results
        # the first window also pays for what is made once; one slow window may be chance
        self._slow = self._slow + 1 if each_s > self._hop_s else 0
        if self._slow >= 3:
            self._said = True
            _note(
                f"a window takes {each_s:.2f} s, longer than the hop of {self._hop_s:g} s: a live "
                "source will run ahead and lose samples; raise --hop or take a smaller model"
            )


def _print(results: list[StreamPrediction], as_json: bool) -> None:
    for result in results:
        if as_json:
            line = json.dumps(
                {
                    "start_s": result.start_s,
                    "end_s": result.end_s,
                    "filled": result.filled,
                    "labels": [{"label": name, "score": score} for name, score in result.labels],
                },
                allow_nan=False,
            )
        else:
            found = ", ".join(f"{one_line(name)} {score:.4f}" for name, score in result.labels)
            share = "" if result.filled == 1.0 else f"  ({100 * result.filled:.0f} % filled)"
            line = f"{result.start_s:9.2f} -{result.end_s:9.2f} s  {found}{share}"
        print(line, flush=True)


def _note(text: str) -> None:
    print(f"ast-fast: {text}", file=sys.stderr, flush=True)
