"""Hostile checkpoints, from ten bytes to 16 MB, that ask for gigabytes or for ever.

`python tests/hub/bombs.py FOLDER` loads each in this process and prints what came of it as lines of JSON: the
error, the resident memory it took at its peak, and the seconds. test_bombs.py holds them to bounds.
"""

from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

import ast_fast
from ast_fast import hub
from ast_fast.config import ModelConfig

HUGE = 2**33  # 8 GiB: more than a test may take, less than many machines have
KEY = "v.cls_token"


def entries_of(state: dict) -> dict[str, bytes]:
    """What torch.save writes, by name."""
    file = io.BytesIO()
    torch.save(state, file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


ENTRIES = entries_of({KEY: torch.zeros(8)})
PICKLE = next(name for name in ENTRIES if name.endswith("data.pkl"))
DATA = next(name for name in ENTRIES if name.endswith("data/0"))


def archive(compression: int = zipfile.ZIP_STORED, **changes: bytes) -> bytes:
    """A torch archive with another `pickle` in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as out:
        for name, value in ENTRIES.items():
            out.writestr(name, changes["pickle"] if name == PICKLE else value)
    return file.getvalue()


def long_integer(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little")


def called(function: str, *sizes: int) -> bytes:
    """A pickle of {KEY: function(*sizes)}; the restricted reader makes some calls."""
    module, _, name = function.rpartition(".")
    key = b"X" + struct.pack("<I", len(KEY)) + KEY.encode()
    numbers = b"".join(map(long_integer, sizes))
    return b"\x80\x02}" + key + f"c{module}\n{name}\n(".encode() + numbers + b"tRs."


def old_format(content: bytes) -> bytes:
    """A file from before archives: four pickles in a row, of which the last is this."""
    file = io.BytesIO()
    torch.save({KEY: torch.zeros(8)}, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    for _ in range(3):
        pickle.load(file)
    return file.getvalue()[: file.tell()] + content


def whole_model_of_nothing() -> bytes:
    """Every tensor of a model; its positions are eight gibibytes that the file does not hold."""
    state = ast_fast.ASTModel.from_config(CONFIG).state_dict()
    content = archive_of(state)
    ours = called("torch.FloatTensor", 1, HUGE // 256, 64)
    place = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(place, "w") as out:
        for name in source.namelist():
            value = source.read(name)
            if name.endswith("data.pkl"):
                # the last word of the dict's: one more entry, over the one before
                key = b"X" + struct.pack("<I", 11) + b"v.pos_embed"
                value = value[:-1] + key + ours[ours.index(b"ctorch") : -2] + b"s."
            out.writestr(name, value)
    return place.getvalue()


def archive_of(state: dict) -> bytes:
    file = io.BytesIO()
    torch.save(dict(state), file)
    return file.getvalue()


def doubled(levels: int, wrap: Callable[[object], object], inner: object) -> bytes:
    """A container of two of the one before: 2 ** levels leaves for who walks it as a tree."""
    for _ in range(levels):
        inner = wrap(inner)
    return pickle.dumps(inner, protocol=2)


def deflated(true_size: bool) -> bytes:
    """A quarter of a gibibyte of zeros in 256 kB; the directory may say that it is 32 bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        for name, value in ENTRIES.items():
            if name != DATA:
                out.writestr(name, value)
                continue
            with out.open(name, "w", force_zip64=True) as opened:
                for _ in range(2**8):
                    opened.write(bytes(2**20))
        if not true_size:
            out.getinfo(DATA).file_size = 32
    return file.getvalue()


def overlapping() -> bytes:
    """Twenty thousand entries of the directory that all name one megabyte."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name, value in ENTRIES.items():
            out.writestr(name, bytes(2**20) if name == DATA else value)
        found = out.getinfo(DATA)
        for index in range(20_000):
            copy = zipfile.ZipInfo(f"{DATA}{index}")
            for slot in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(copy, slot, getattr(found, slot))
            out.filelist.append(copy)
    return file.getvalue()


def exbibytes() -> bytes:
    """A directory that gives one entry four exbibytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name, value in ENTRIES.items():
            out.writestr(name, value)
        out.filelist[-1].file_size = out.filelist[-1].compress_size = 2**62
    return file.getvalue()


def sparse_tar() -> bytes:
    """PyTorch's oldest format: a tar, whose member is eight gibibytes of which 512 bytes are there."""
    header = tarfile.TarInfo("storages")
    header.size = 512
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = b"S"
    block[386:398], block[398:410] = b"%011o\0" % (HUGE - 512), b"%011o\0" % 512
    block[483:495] = b"%011o\0" % HUGE
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512) + bytes(1024)


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


STORED = zipfile.ZIP_STORED
FILES: dict[str, Callable[[], bytes]] = {
    "deflated.pth": lambda: deflated(True),
    "deflated and denied.pth": lambda: deflated(False),
    "overlapping.pth": overlapping,
    "exbibytes.pth": exbibytes,
    "bytearray.pth": lambda: archive(pickle=called("__builtin__.bytearray", HUGE)),
    "bytearray packed.pth": lambda: archive(
        zipfile.ZIP_DEFLATED, pickle=called("builtins.bytearray", HUGE)
    ),
    "bytearray in the old format.pth": lambda: old_format(called("__builtin__.bytearray", HUGE)),
    "first of the old format's pickles.pth": lambda: called("__builtin__.bytearray", HUGE),
    "tensor of a size.pth": lambda: archive(pickle=called("torch.FloatTensor", HUGE)),
    "storage of a size.pth": lambda: archive(pickle=called("torch.FloatStorage", HUGE)),
    "tensor of a size in a model.pth": whole_model_of_nothing,
    "doubled lists.pth": lambda: archive(pickle=doubled(60, lambda x: {KEY: [x, x]}, 1)),
    "doubled dicts.pth": lambda: archive(
        pickle=doubled(60, lambda x: {"model": x, "state_dict": x}, {KEY: 1})
    ),
    "storage that is short.pth": lambda: archive(
        pickle=ENTRIES[PICKLE].replace(b"K\x08", long_integer(2**31))
    ),
    "string.pth": lambda: archive(pickle=b"\x80\x02}\x8d" + HUGE.to_bytes(8, "little") + b"a."),
    "tar.pth": sparse_tar,
    "shape.safetensors": lambda: safetensors({KEY: tensor([HUGE], 0, 4 * HUGE)}),
    "overflow.safetensors": lambda: safetensors({KEY: tensor([2**40, 2**40], 0, 0)}),
    "length.safetensors": lambda: struct.pack("<Q", 2**62) + b"{}",
    "overlap.safetensors": lambda: safetensors(
        {f"v.x{index}": tensor([2**18], 0, 2**20) for index in range(20_000)}, bytes(2**20)
    ),
    "many.safetensors": lambda: safetensors(
        {f"v.blocks.{index}.x": tensor([0], 0, 0) for index in range(200_000)}
    ),
    "metadata.safetensors": lambda: safetensors(
        {"__metadata__": {str(index): "x" for index in range(900_000)}}
    ),
}
CONFIG = ModelConfig(
    label_dim=5, input_fdim=32, input_tdim=32, embed_dim=64, depth=1, num_heads=1, dead_heads=False
)
SETTINGS: dict[str, dict] = {
    "depth": {"depth": 10**8},
    "a depth that a machine could hold": {"depth": 4000},
    "width": {"embed_dim": 2**40},
    "a width that a machine could hold": {"embed_dim": 16384, "num_heads": 256},
    "labels": {"label_dim": 2**40},
    "frames": {"input_tdim": 2**40},
    "mlp": {"mlp_ratio": 1e300},
}
THEIRS: dict[str, dict] = {
    "their depth": {"num_hidden_layers": 10**8},
    "their width": {"hidden_size": 2**40},
    "their labels": {"num_labels": 2**40},
}
NAMES = [*FILES, *SETTINGS, *THEIRS]


def place(folder: Path, name: str) -> Path:
    """Make one of them."""
    target = folder / name
    if name in FILES:
        target.write_bytes(FILES[name]())
        return target
    model = ast_fast.ASTModel.from_config(CONFIG.replace(eps=1e-12, head_eps=1e-12))
    state, config = model.state_dict(), model.config.to_dict()
    if name in SETTINGS:
        hub.write_pretrained(
            target, state, {"model": {**config, **SETTINGS[name]}, "frontend": None}
        )
        return target
    front = ast_fast.config.LogMelConfig(num_mel_bins=32, num_frames=32)
    hub.write_transformers(target, state, config, front.to_dict())
    settings = json.loads((target / "config.json").read_text())
    settings.pop("id2label", None)
    (target / "config.json").write_text(json.dumps({**settings, **THEIRS[name]}))
    return target


def memory_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def tried(path: Path) -> dict:
    """What loading it gives."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before, started = memory_kib("VmRSS"), time.process_time()
    try:
        ast_fast.ASTModel.from_pretrained(path)
        error, message = "", "loaded"
    except Exception as raised:
        error, message = type(raised).__name__, str(raised)
    return {
        "error": error, "message": message, "mib": (memory_kib("VmHWM") - before) / 1024,
        "seconds": time.process_time() - started,
        "file_mib": path.stat().st_size / 2**20 if path.is_file() else 0.0,
    }  # fmt: skip


def main(folder: Path) -> None:
    """All of them, one after the other, in a process that has loaded a good model of each kind."""
    # a bomb that goes off costs this process, not the machine
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    model = ast_fast.ASTModel.from_config(CONFIG)
    model.save_pretrained(folder / "good")
    torch.save(model.state_dict(), folder / "good.pth")
    for path in (folder / "good", folder / "good" / "model.safetensors"):
        ast_fast.ASTModel.from_pretrained(path)
    grid = {"input_fdim": 32, "input_tdim": 32, "fstride": 10, "tstride": 10}
    hub.read_weights(folder / "good.pth", **grid)
    for name in NAMES:
        path = place(folder, name)
        print(json.dumps({"name": name, **tried(path)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
