"""Files and settings that ask for more than they are: refused at once, with nothing allocated."""

from __future__ import annotations

import json
import pickle
import resource
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import ast_fast
from ast_fast import hub
from ast_fast.config import LogMelConfig, MfccConfig, ModelConfig

CONFIG = ModelConfig(
    label_dim=5, input_fdim=32, input_tdim=32, embed_dim=64, depth=1, num_heads=1, dead_heads=False
)
FRONT = LogMelConfig(num_mel_bins=32, num_frames=32)


@pytest.fixture(autouse=True)
def at_once_and_within_memory():
    """No test may compute for long, or take 300 MB."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.fixture
def folder(tmp_path):
    ast_fast.ASTModel.from_config(CONFIG, FRONT).save_pretrained(tmp_path)
    return tmp_path


IMPOSSIBLE = [
    {"depth": 10**8},
    {"embed_dim": 2**40},
    {"embed_dim": 2**40, "num_heads": 2**40},
    {"num_heads": 0},
    {"mlp_ratio": 1e300},
    {"mlp_ratio": float("nan")},
    {"mlp_ratio": -4.0},
    {"label_dim": 2**40},
    {"input_tdim": 2**40},
    {"input_fdim": 2**40},
    {"input_tdim": 2**24, "tstride": 1},
    {"input_tdim": 2**24, "patch_tdim": 2**24},
    {"eps": float("nan")},
    {"head_eps": 1e300},
]
IMPOSSIBLE_FRONTS = [
    {"n_fft": 2**40},
    {"window_ms": 1e12},
    {"window_ms": float("inf")},
    {"hop_ms": 1e12},
    {"window_samples": 2**40},
    {"hop_samples": 2**40},
    {"sample_rate_hz": 2**40},
    {"sample_rate_hz": 0},
    {"mean": float("nan")},
    {"std": float("inf")},
    {"log_floor": float("inf")},
    {"low_freq_hz": float("nan")},
    {"num_mel_bins": 2**40},
    {"num_frames": 2**40},
]


def rewrite(folder, model, frontend):
    state = load_file(folder / "model.safetensors")
    # as another program would: NaN in JSON is nothing that we write
    settings = {"version": 1, "model": model, "frontend": frontend}
    metadata = {"format": "pt", "ast_fast": json.dumps(settings)}
    save_file(state, folder / "model.safetensors", metadata=metadata)
    (folder / "config.json").write_text(json.dumps({"ast_fast": settings}))


@pytest.mark.parametrize("changes", IMPOSSIBLE, ids=str)
def test_impossible_models(folder, changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}|patches|split"):
        ModelConfig(**changes)
    rewrite(folder, {**CONFIG.to_dict(), **changes}, FRONT.to_dict())
    with pytest.raises(hub.CheckpointError):
        ast_fast.ASTModel.from_pretrained(folder)
    name = next(iter(changes))
    if name in ("depth", "embed_dim", "mlp_ratio"):
        with pytest.raises(ValueError, match=name):
            ast_fast.create_model("ast_base_p16_s10", **changes)


@pytest.mark.parametrize("changes", IMPOSSIBLE_FRONTS, ids=str)
def test_impossible_front_ends(folder, changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=name):
        LogMelConfig(**changes)
    with pytest.raises(ValueError, match=name):
        ast_fast.LogMel(**changes)
    with pytest.raises(ValueError, match=name):
        MfccConfig.from_dict({"log_mel": changes})
    if name in ("num_mel_bins", "num_frames"):
        return  # a model's own sizes count
    rewrite(folder, CONFIG.to_dict(), {**FRONT.to_dict(), **changes})
    with pytest.raises(hub.CheckpointError, match=name):
        ast_fast.ASTModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "arguments",
    [{"n_fft": 2**40}, {"window_ms": 1e12}, {"hop_ms": float("inf")}, {"num_mel_bins": 2**40}],
    ids=str,
)
def test_the_op_itself_refuses_impossible_sizes(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ast_fast.ops.log_mel(torch.zeros(1, 16000), **arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 1000},
        {"embed_dim": 65536, "num_heads": 1024},
        {"label_dim": 2**20},
        {"input_tdim": 2**20},
        {"mlp_ratio": 1000.0},
    ],
    ids=str,
)
def test_possible_sizes_that_are_not_those_of_the_weights(folder, changes):
    rewrite(folder, {**CONFIG.to_dict(), **changes}, FRONT.to_dict())
    with pytest.raises(hub.CheckpointError, match="does not fit the model"):
        ast_fast.ASTModel.from_pretrained(folder)
    with pytest.raises(hub.CheckpointError, match="does not fit the model"):
        ast_fast.ASTModel.from_pretrained(folder, label_dim=3, input_tdim=64)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**8},
        {"hidden_size": 2**40},
        {"intermediate_size": 10**400},
        {"num_labels": 2**40},
        {"max_length": 2**40},
        {"layer_norm_eps": 1e300},
        {"layer_norm_eps": float("nan")},
        {"patch_size": [2**40, 16]},
        {"frequency_stride": 10**400},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_impossible_settings_of_transformers(tmp_path, changes):
    model = ast_fast.ASTModel.from_config(CONFIG.replace(eps=1e-12, head_eps=1e-12), FRONT)
    settings = model.config.to_dict(), model.frontend_config.to_dict()
    hub.write_transformers(tmp_path, model.state_dict(), *settings)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("id2label")
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(hub.CheckpointError):
        ast_fast.ASTModel.from_pretrained(tmp_path)


def test_settings_nested_beyond_sense(folder):
    deep = json.loads("[" * 900 + "]" * 900)
    rewrite(folder, {**CONFIG.to_dict(), "depth": deep}, FRONT.to_dict())
    with pytest.raises(hub.CheckpointError, match="depth="):
        ast_fast.ASTModel.from_pretrained(folder)


def archive_of(tmp_path, numel):
    """A torch archive whose one storage is `numel` zeros, deflated."""
    plain, packed = tmp_path / "plain.pth", tmp_path / "packed.pth"
    torch.save({"v.cls_token": torch.zeros(8)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = content.replace(b"K\x08", b"J" + numel.to_bytes(4, "little"))
            if entry.filename.endswith("data/0"):
                with out.open(entry.filename, "w", force_zip64=True) as opened:
                    for _ in range(numel * 4 // 2**20):
                        opened.write(bytes(2**20))
                continue
            out.writestr(entry.filename, content)
    return packed


def test_a_small_archive_that_unpacks_to_much(tmp_path):
    packed = archive_of(tmp_path, 2**25)  # 128 MiB, of which none is read
    assert packed.stat().st_size < 2**20
    with pytest.raises(hub.CheckpointError, match=r"would unpack to 13421.*not unpacked"):
        ast_fast.ASTModel.from_pretrained(packed)


def test_a_view_that_repeats_what_is_stored(tmp_path):
    state = ast_fast.ASTModel.from_config(CONFIG).state_dict()
    state["v.blocks.0.attn.qkv.weight"] = torch.zeros(1).expand(2**40, 2**10)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(hub.CheckpointError, match=r"qkv\.weight' has shape .* 4 are stored"):
        hub.read_weights(tmp_path / "x.pth")
    base = torch.zeros(2**18)
    torch.save({f"v.blocks.{i}.x": base.view(-1) for i in range(64)}, tmp_path / "y.pth")
    with pytest.raises(hub.CheckpointError, match="bytes that its tensors use as"):
        hub.read_weights(tmp_path / "y.pth")


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(4).to_sparse(), torch.zeros(4, device="meta"), torch.zeros(4, dtype=torch.int8)],
    ids=("sparse", "meta", "int8"),
)
def test_tensors_that_are_no_plain_weights(tmp_path, bad):
    state = ast_fast.ASTModel.from_config(CONFIG).state_dict()
    state["v.norm.weight"] = bad
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(hub.CheckpointError, match=r"v\.norm\.weight.*(expected|save)"):
        hub.read_weights(tmp_path / "x.pth", input_fdim=32, input_tdim=32)


def test_an_old_file_that_declares_more_than_it_has(tmp_path):
    file = tmp_path / "old.pth"
    torch.save({"v.cls_token": torch.zeros(8)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    assert content.count(b"K\x08") >= 1
    file.write_bytes(content.replace(b"K\x08", b"\x8a\x06" + (2**40).to_bytes(6, "little")))
    with pytest.raises(hub.CheckpointError):
        hub.read_weights(file)


def test_a_header_longer_than_any_models(folder):
    file = folder / "model.safetensors"
    file.write_bytes((2**26).to_bytes(8, "little") + b"{" + b" " * (2**26 - 1))
    with pytest.raises(hub.CheckpointError, match="declares a header of 67108864"):
        hub.read_weights(file)


ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\r"


def test_messages_carry_no_control_codes(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    bad = {**state, f"v.{ESCAPES}": torch.zeros(1)}
    messages = []

    def refused(path, **facts):
        with pytest.raises(hub.CheckpointError) as caught:
            ast_fast.ASTModel.from_pretrained(path, **facts)
        messages.append(str(caught.value))

    hub.write_pretrained(folder, bad, {"model": CONFIG.to_dict(), "frontend": None})
    refused(folder)
    for model in ({**CONFIG.to_dict(), ESCAPES: 1}, {**CONFIG.to_dict(), "problem_type": ESCAPES}):
        rewrite(folder, model, None)
        refused(folder)
    torch.save({ESCAPES: torch.zeros(1)}, tmp_path / "a.pth")
    torch.save({ESCAPES: 1}, tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes(b"c" + ESCAPES.encode() + b"\n" + ESCAPES.encode() + b"\n.")
    (tmp_path / "d.pth").write_bytes(pickle.dumps(ESCAPES))
    for name in "abcd":
        refused(tmp_path / f"{name}.pth")
    refused(tmp_path / f"{ESCAPES}.pth")
    for message in messages:
        assert message.replace("\n", "").isprintable()


def test_the_command_prints_no_control_codes(tmp_path):
    name = str(tmp_path / f"{ESCAPES}.pth")
    command = [sys.executable, "-m", "ast_fast", "convert", name, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "does not exist" in done.stderr
    assert done.stderr.replace("\n", "").isprintable()
