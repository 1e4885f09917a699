"""Tar shards: what is written comes back, and what is hostile or damaged is named and costs itself alone."""

import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast import use_backend
from ast_fast.audio import AudioReport
from ast_fast.config import AudioConfig, LogMelConfig
from ast_fast.data import (
    AudioDataset,
    Clip,
    ManifestError,
    ShardSampler,
    ShardSet,
    Skip,
    WaveformDataset,
    read_folder,
    write_shards,
)
from ast_fast.data.tar import packed
from ast_fast.frontend import log_mel_features


def waves(count=23, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randint(-9000, 9000, (900 + 37 * i,), dtype=torch.int16, generator=draw)
        for i in range(count)
    ]


def dataset(count=23):
    labels = [(i % 3,) if i % 5 else (0, 2) for i in range(count)]
    return WaveformDataset(waves(count), labels, ("a", "b", "c"))


def items(shards):
    return [item for number in range(len(shards.blocks)) for item in shards.read_block(number)]


def raw_clip(key, samples=800, label=0, value=7, rate=16000):
    told = {"labels": [label], "sample_rate_hz": rate}
    sound = np.full(samples, value, "<i2").tobytes()
    return packed(f"{key}.s16", sound) + packed(f"{key}.json", json.dumps(told).encode())


def tar_of(*parts, end=True):
    return b"".join(parts) + (bytes(1024) if end else b"")


def opened(folder, content, **options):
    (folder / "x.tar").write_bytes(content)
    return ShardSet(folder, **options)


def kinds(shards):
    return ["skip" if isinstance(item, Skip) else item.wave.shape[0] for item in items(shards)]


@pytest.mark.parametrize("encoding", ["s16", "flac"])
@pytest.mark.parametrize("indexed", [True, False])
def test_what_is_written_comes_back_to_the_bit(tmp_path, encoding, indexed):
    source = dataset()
    report = write_shards(source, tmp_path, encoding=encoding, shard_bytes=20_000)
    assert report.clips == 23 and len(list(tmp_path.glob("*.tar"))) > 3
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["clips"] == 23 and sum(index["class_counts"]) == 23 + 5
    if not indexed:
        (tmp_path / "index.json").unlink()
    shards = ShardSet(tmp_path, block_bytes=8000)
    assert shards.classes == source.classes and shards.labels == source.labels
    assert len(shards.blocks) > 5 and len(shards) == 23
    for index, item in enumerate(items(shards)):
        assert isinstance(item, Clip) and item.index == index
        assert item.wave.dtype == torch.int16 and torch.equal(item.wave, source.waves[index])
        assert item.labels == source.labels[index] and item.report == AudioReport(clips=1)
        alone = shards[index]
        assert torch.equal(alone.wave, item.wave)
    assert shards[-1].index == 22
    with pytest.raises(IndexError):
        shards[23]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_features_of_int16_clips_are_those_of_float32_to_the_bit(backend):
    front = LogMelConfig(num_frames=16)
    with use_backend(backend):
        for wave in waves(6):
            whole = log_mel_features(wave[None], front)
            assert torch.equal(whole, log_mel_features(wave[None] / 32768.0, front))


def test_selected_clips_are_read_alone_and_as_asked(tmp_path):
    source = dataset()
    write_shards(source, tmp_path, shard_bytes=20_000)
    whole = ShardSet(tmp_path, block_bytes=8000)
    chosen = [0, 1, 2, 5, 6, 11, 22]
    some = whole.select(chosen).read_as(AudioConfig(dtype="float32"))
    assert len(some) == 7 and some.labels == [source.labels[i] for i in chosen]
    assert len(whole) == 23 and whole[0].wave.dtype == torch.int16
    # no block reaches over clips that were left out
    clip_bytes = sum(block.end - block.begin for block in some.blocks)
    assert clip_bytes == sum(
        whole.select([i]).blocks[0].end - whole.select([i]).blocks[0].begin for i in chosen
    )
    for index, (item, origin) in enumerate(zip(items(some), chosen, strict=True)):
        assert item.index == index and item.labels == source.labels[origin]
        assert torch.equal(item.wave, source.waves[origin] / 32768.0)
        assert torch.equal(item.wave, some[index].wave)


def test_standard_tools_read_our_shards_and_we_read_theirs(tmp_path):
    write_shards(dataset(3), tmp_path / "ours")
    with tarfile.open(tmp_path / "ours" / "000000.tar") as archive:
        assert archive.getnames()[:2] == ["000000000.s16", "000000000.json"]
        sound = archive.extractfile("000000001.s16").read()
    assert sound == waves(3)[1].numpy().tobytes()
    long = "folder/" + "n" * 150 + "ae" + "\u00e9"
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        folder = tmp_path / str(kind)
        folder.mkdir()
        with tarfile.open(folder / "t.tar", "w", format=kind) as archive:
            for number, key in enumerate(["x", long, "z"]):
                file = io.BytesIO()
                sf.write(file, np.full(500 + number, 0.25), 16000, format="WAV", subtype="PCM_16")
                for name, content in (
                    (f"{key}.wav", file.getvalue()),
                    (f"{key}.cls", b"%d" % number),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        shards = ShardSet(folder)
        assert kinds(shards) == [500, 501, 502]
        assert shards.classes == ("0", "1", "2") and shards.labels == [(0,), (1,), (2,)]


def test_shards_give_the_items_that_the_files_give(tmp_path):
    rng = np.random.default_rng(0)
    for name, rate, width in (
        ("a/0", 16000, "PCM_16"),
        ("a/1", 8000, "PCM_16"),
        ("b/2", 16000, "PCM_24"),
    ):
        path = tmp_path / "files" / f"{name}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, rng.normal(0, 0.1, 3000), rate, subtype=width)
    files = AudioDataset(read_folder(tmp_path / "files"), AudioConfig(dtype="auto"))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for index, path in enumerate(files.manifest.paths):
            archive.add(tmp_path / "files" / path, f"{index}.flac")
    shards = ShardSet(tmp_path / "x.tar")
    for a, b in zip(items(shards), (files[i] for i in range(3)), strict=True):
        assert a.wave.dtype == b.wave.dtype and torch.equal(a.wave, b.wave)
        assert a.report == b.report
    assert [item.wave.dtype for item in items(shards)] == [
        torch.int16,
        torch.float32,
        torch.float32,
    ]


@pytest.mark.parametrize("block_bytes", [3000, 4 << 20])
def test_clips_from_anywhere_are_those_of_the_blocks(tmp_path, block_bytes):
    write_shards(dataset(), tmp_path, shard_bytes=8000)
    shards = ShardSet(tmp_path, block_bytes=block_bytes)
    assert len(list(tmp_path.glob("*.tar"))) > 4
    whole = items(shards)
    order = torch.randint(23, (60,), generator=torch.Generator().manual_seed(2)).tolist()
    found = list(shards.read_clips([*order, -1]))
    assert [clip.index for clip in found] == [*order, 22]
    for clip in found:
        assert (
            torch.equal(clip.wave, whole[clip.index].wave)
            and clip.labels == dataset().labels[clip.index]
        )
    assert list(shards.read_clips([])) == []
    with pytest.raises(IndexError):
        next(shards.read_clips([23]))


def test_a_shard_that_is_gone_or_cut_costs_its_own_clips(tmp_path):
    write_shards(dataset(), tmp_path, shard_bytes=16_000)
    shards = ShardSet(tmp_path)
    places = [np.flatnonzero(shards._index.shard_of == shard).tolist() for shard in range(3)]
    (tmp_path / "000000.tar").unlink()
    cut = tmp_path / "000001.tar"
    cut.write_bytes(cut.read_bytes()[: int(shards._index.ends[places[1][0]]) + 100])
    order = [places[2][0], places[0][1], places[1][0], places[1][1], places[2][1], places[0][0]]
    found = list(shards.read_clips(order))
    assert [isinstance(item, Skip) for item in found] == [False, True, False, True, False, True]
    assert [item.index for item in found] == order
    assert "'000000.tar': clip 1: cannot be read" in found[1].report.notes[0]
    assert "cut off" in found[3].report.notes[0]


def test_names_are_never_paths(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    names = ["../../evil", "/etc/passwd", "~/x", "C:\\x", "\x1b[31m", "a/../b/"]
    content = tar_of(*(raw_clip(f"{name}{i}") for i, name in enumerate(names)))
    shards = opened(inside, content)
    assert kinds(shards) == [800] * len(names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    assert [p.name for p in inside.iterdir()] == ["x.tar"]


def test_links_devices_and_folders_are_passed_over(tmp_path):
    odd = []
    for kind in (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
    ):
        info = tarfile.TarInfo("k0.wav")
        info.type, info.linkname = kind, "/etc/passwd"
        odd.append(info.tobuf())
    shards = opened(tmp_path, tar_of(raw_clip("a"), *odd, raw_clip("b")))
    assert kinds(shards) == [800, 800]


def header(name="big.s16", size=800, kind=b"0"):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "attack",
    [
        header(size=1 << 60),
        header(size=(1 << 33) - 1),
        header(size=900_000),
        header(kind=b"x", size=1 << 40),
        header(kind=b"L", size=1 << 30),
        header(kind=b"x", size=40) + b"99999999999 path=x\n".ljust(512, b"\0"),
        header(kind=b"x", size=20) + b"19 size=-5555555555\n".ljust(512, b"\0"),
        header(kind=b"x", size=11) + b"11 size=9e9".ljust(512, b"\0"),
        b"\xff" * 512,
        b"\x1f\x8b" + bytes(510),
        header()[:300],
    ],
    ids=range(11),
)
def test_hostile_headers_cost_little_and_are_counted(tmp_path, attack):
    # the clip before is whole; what comes after cannot be found without the sizes
    started = time.perf_counter()
    shards = opened(tmp_path, tar_of(raw_clip("a"), attack, end=False))
    found = items(shards)
    assert time.perf_counter() - started < 1
    assert [isinstance(item, Skip) for item in found] == [False, True]
    assert found[1].report.skipped == {"ShardError": 1}
    assert "x.tar" in found[1].report.notes[0]


def test_a_cut_off_shard_names_shard_and_clip_and_spares_the_others(tmp_path):
    write_shards(dataset(), tmp_path, shard_bytes=20_000)
    names = sorted(p.name for p in tmp_path.glob("*.tar"))
    victim = tmp_path / names[1]
    whole = ShardSet(tmp_path)
    inside = [i for i in range(23) if whole.blocks[whole.block_of[i]].shard == 1]
    content = victim.read_bytes()
    for cut in (len(content) // 2, 5 * 512 + 100, 512, 0):
        victim.write_bytes(content[:cut])
        for shards in (ShardSet(tmp_path, block_bytes=4000), ShardSet(tmp_path)):
            found = items(shards)
            bad = [item.index for item in found if isinstance(item, Skip)]
            assert len(found) == 23 and bad and set(bad) <= set(inside)
            assert bad == inside[-len(bad) :] and (cut > 0 or bad == inside)
            for item in found:
                if isinstance(item, Skip):
                    assert item.report.skipped == {"ShardError": 1}
                    assert names[1] in item.report.notes[0]
                else:
                    assert torch.equal(item.wave, waves()[item.index])
    victim.write_bytes(content[: len(content) // 2])
    note = next(i for i in items(ShardSet(tmp_path)) if isinstance(i, Skip)).report.notes[0]
    assert "cut off" in note and "00000" in note.split(":")[1]
    (tmp_path / "index.json").unlink()
    scanned = ShardSet(tmp_path)
    assert [i for i in kinds(scanned) if i == "skip"] == ["skip"]


def test_damage_inside_a_shard_costs_only_the_clips_it_hits(tmp_path):
    write_shards(dataset(), tmp_path)
    file = tmp_path / "000000.tar"
    content = bytearray(file.read_bytes())
    begins = json.loads((tmp_path / "index.json").read_text())["shards"][0]["offsets"]
    content[begins[7] + 10] ^= 0xFF
    file.write_bytes(content)
    found = kinds(ShardSet(tmp_path))
    assert found.index("skip") == 7 and found.count("skip") == 1


def test_bad_clips_are_skipped_with_their_reason(tmp_path):
    odd = packed("odd.s16", b"123") + packed("odd.json", b'{"sample_rate_hz": 16000}')
    rateless = packed("r.s16", bytes(800)) + packed("r.json", b"{}")
    broken = packed("f.flac", b"fLaC" + bytes(300))
    nothing = packed("e.s16", b"") + packed("e.json", b'{"sample_rate_hz": 16000}')
    twice = packed("t.s16", bytes(8)) + packed("t.wav", bytes(8))
    notes = packed("j.s16", bytes(8)) + packed("j.json", b"[[[")
    content = tar_of(
        odd, raw_clip("ok"), rateless, broken, nothing, twice, notes, packed("README", b"x")
    )
    shards = opened(tmp_path, content)
    reports = [item.report for item in items(shards) if isinstance(item, Skip)]
    assert [next(iter(report.skipped)) for report in reports] == [
        "ShardError",
        "ShardError",
        "AudioDecodeError",
        "AudioEmptyError",
        "ShardError",
        "ShardError",
    ]
    for report, key in zip(reports, "orfetj", strict=True):
        assert f"'x.tar': '{key}" in report.notes[0]
    strict = ShardSet(tmp_path, strict=True)
    with pytest.raises(ValueError, match=r"'x.tar': 'odd'"):
        items(strict)


def test_raw_samples_of_another_rate_are_resampled_and_short_ones_padded(tmp_path):
    shards = opened(tmp_path, tar_of(raw_clip("a", rate=8000), raw_clip("b", samples=10)))
    first, second = items(shards)
    assert first.wave.shape == (1600,) and first.report.resampled == 1
    assert (
        second.wave.shape == (400,)
        and second.report.padded == 1
        and second.wave[:10].tolist() == [7] * 10
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda i: i.update(version=9), "version 9"),
        (lambda i: i.update(format="other"), "is no index"),
        (lambda i: i["shards"][0].update(name="../x.tar"), "expected a file name"),
        (lambda i: i["shards"][0]["offsets"].__setitem__(1, 3), "rising multiples"),
        (lambda i: i["shards"][0]["offsets"].__setitem__(1, -512), "rising multiples"),
        (lambda i: i["shards"][0]["labels"].__setitem__(0, [99]), "below 3"),
        (lambda i: i["shards"][0]["labels"].pop(), "offsets and"),
        (lambda i: i["shards"].pop(), "does not list"),
        (lambda i: i.update(classes="abc"), "list of texts"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, change, says):
    write_shards(dataset(), tmp_path, shard_bytes=20_000)
    file = tmp_path / "index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(ManifestError, match=says):
        ShardSet(tmp_path)


def test_folders_without_shards_and_clips_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="no tar shards"):
        ShardSet(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ShardSet(tmp_path / "gone")
    with pytest.raises(ManifestError, match="no clips"):
        opened(tmp_path, tar_of(packed("README", b"x")))


class Interrupted(WaveformDataset):
    """Ends the run at one clip."""

    limit = 10**9

    def __getitem__(self, index):
        if index >= self.limit:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_an_interrupted_writer_resumes_to_the_same_bytes(tmp_path):
    source = Interrupted(waves(), dataset().labels, ("a", "b", "c"))
    write_shards(source, tmp_path / "whole", shard_bytes=20_000)
    folder = tmp_path / "cut"
    for source.limit in (2, 9, 17):
        with pytest.raises(KeyboardInterrupt):
            write_shards(source, folder, shard_bytes=20_000, resume=True)
        assert not (folder / "index.json").exists()
    source.limit = 10**9
    with pytest.raises(ManifestError, match="interrupted run: resume"):
        write_shards(source, folder, shard_bytes=20_000)
    with pytest.raises(ManifestError, match="other shard_bytes"):
        write_shards(source, folder, shard_bytes=30_000, resume=True)
    assert write_shards(source, folder, shard_bytes=20_000, resume=True).clips == 23
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    with pytest.raises(ManifestError, match="prepared with other shard_bytes"):
        write_shards(source, folder, resume=True)
    with pytest.raises(ManifestError, match="holds shards already"):
        write_shards(source, folder, shard_bytes=20_000)
    source.limit = 0  # nothing is read again
    assert write_shards(source, folder, shard_bytes=20_000, resume=True).clips == 23


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_share_an_epoch_without_loss(tmp_path, ranks, shuffle):
    write_shards(dataset(), tmp_path, shard_bytes=20_000)
    shards = ShardSet(tmp_path, block_bytes=6000)
    lists = [
        list(
            ShardSampler(
                shards, 6, rank=rank, world_size=ranks, shuffle=shuffle, window_bytes=20_000
            )
        )
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in lists}) == 1
    drawn = [index for batches in lists for batch in batches for index in batch]
    assert set(drawn) == set(range(23)) and len(drawn) - 23 < ranks
    shares = [{int(shards.block_of[i]) for batch in batches for i in batch} for batches in lists]
    assert sum(map(len, shares)) <= len(shards.blocks) + ranks - 1
    if not shuffle and ranks == 1:
        assert drawn == list(range(23))


def test_the_shuffle_mixes_within_its_window_and_differs_by_seed_and_epoch(tmp_path):
    write_shards(dataset(), tmp_path, shard_bytes=20_000)
    shards = ShardSet(tmp_path, block_bytes=6000)
    sampler = ShardSampler(shards, 5, seed=1, window_bytes=25_000)
    order = [index for batch in sampler for index in batch]
    assert sorted(order) == list(range(23)) and order != list(range(23))
    assert order == [
        i for batch in ShardSampler(shards, 5, seed=1, window_bytes=25_000) for i in batch
    ]
    assert order != [
        i for batch in ShardSampler(shards, 5, seed=2, window_bytes=25_000) for i in batch
    ]
    # a block is open only while its window is: what lies in memory at a time stays bounded
    first, last = {}, {}
    for place, index in enumerate(order):
        block = int(shards.block_of[index])
        first.setdefault(block, place)
        last[block] = place
    open_bytes = max(
        sum(b.end - b.begin for n, b in enumerate(shards.blocks) if first[n] <= place <= last[n])
        for place in range(23)
    )
    assert open_bytes <= 25_000 + 6000
    for _ in range(len(sampler)):
        sampler.step()
    assert order != [index for batch in sampler for index in batch]
    other = ShardSampler(shards, 5, seed=1, window_bytes=99_000)
    with pytest.raises(ValueError, match="window_bytes=25000"):
        other.load_state_dict(sampler.state_dict())


def test_reading_leaves_no_file_open(tmp_path):
    write_shards(dataset(), tmp_path, encoding="flac")
    shards = ShardSet(tmp_path)
    items(shards)
    before = len(list(Path("/proc/self/fd").iterdir()))
    items(shards)
    shards[3]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
