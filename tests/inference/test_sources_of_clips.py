"""Files, folders, lists, manifests and shards as one sequence of numbered clips."""

import json
import os

import pytest
import soundfile as sf
import torch

from ast_fast import predict, tag
from ast_fast.data import AudioDataset, ManifestError, read_folder, write_shards
from ast_fast.inference import Failure
from ast_fast.inference.sources import FILES_A_UNIT, digest_of, units_of


@pytest.fixture
def good(clips):
    return sorted(clips.glob("0[0-9].*"))


def probabilities(results):
    return torch.stack([r.probabilities for r in results if not isinstance(r, Failure)])


def paths_of(units):
    return [path for unit in units for path, _ in unit.files]


def test_lists_and_manifests_need_no_labels_and_start_from_their_folder(
    tiny_model, clips, good, tmp_path
):
    names = [path.name for path in good]
    (clips / "list.txt").write_text("".join(f"{name}\n" for name in names) + "\n")
    (tmp_path / "bare.csv").write_text("path\n" + "\n".join(names))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"wav": n}) + "\n" for n in names))
    original = {"data": [{"wav": name, "labels": "/m/a"} for name in names]}
    (tmp_path / "original.json").write_text(json.dumps(original))
    expected = probabilities(tag(good, tiny_model))
    for source, root in (
        (clips / "list.txt", None),
        (tmp_path / "bare.csv", clips),
        (tmp_path / "lines.jsonl", clips),
        (tmp_path / "original.json", clips),
    ):
        results = list(tag([source], tiny_model, root=root))
        assert [r.path for r in results] == [str(path) for path in good]
        torch.testing.assert_close(probabilities(results), expected)
    (clips / "list.txt").unlink()


def test_bad_lists_name_the_line(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "nul.txt").write_text("a.wav\nb\0.wav\n")
    (tmp_path / "leaves.csv").write_text("path\na.wav\n../b.wav\n")
    (tmp_path / "column.csv").write_text("name\na.wav\n")
    for name, says in (
        ("empty.txt", "holds no paths"),
        ("nul.txt", "line 2"),
        ("leaves.csv", "line 3.*leaves its folder"),
        ("column.csv", "expected 'path'"),
    ):
        with pytest.raises(ManifestError, match=says):
            list(units_of([tmp_path / name]))
    for name in ("none.txt", "none.csv", "none.tar"):
        with pytest.raises(FileNotFoundError):
            list(units_of([tmp_path / name]))


def test_a_link_out_of_a_manifests_root_is_not_followed(tiny_model, clips, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.wav").symlink_to(clips / "00.wav")
    (root / "list.csv").write_text("path\nlink.wav\n")
    (result,) = tag([root / "list.csv"], tiny_model)
    assert isinstance(result, Failure) and "leaves the root" in str(result.error)


@pytest.mark.parametrize("encoding", ["s16", "flac"])
def test_shards_give_what_their_files_do_and_tell_where_a_clip_lies(
    tiny_model, good, tmp_path, encoding
):
    folder = tmp_path / "wavs" / "all"
    folder.mkdir(parents=True)
    for path in good:
        sf.write(folder / f"{path.stem}.wav", sf.read(path, dtype="int16")[0], 16000)
    dataset = AudioDataset(read_folder(tmp_path / "wavs"))
    write_shards(dataset, tmp_path / "shards", encoding=encoding, shard_bytes=200_000)
    tars = sorted((tmp_path / "shards").glob("*.tar"))
    assert len(tars) > 1
    expected = probabilities(tag([folder], tiny_model))
    for sources in ([tmp_path / "shards"], tars):
        for num_workers in (0, 2):
            results = list(tag(sources, tiny_model, num_workers=num_workers))
            torch.testing.assert_close(probabilities(results), expected, rtol=1e-4, atol=1e-6)
            assert len({r.path for r in results}) == len(good)
            assert all(r.path.startswith(f"{tmp_path}/shards/") for r in results)
            assert all(r.path.endswith(encoding) for r in results)


def test_damage_in_a_shard_costs_its_clip_alone(tiny_model, good, tmp_path):
    folder = tmp_path / "wavs" / "all"
    folder.mkdir(parents=True)
    for path in good:
        sf.write(folder / f"{path.stem}.wav", sf.read(path, dtype="int16")[0], 16000)
    write_shards(AudioDataset(read_folder(tmp_path / "wavs")), tmp_path / "s", encoding="flac")
    (tar,) = (tmp_path / "s").glob("*.tar")
    content = bytearray(tar.read_bytes())
    place = content.index(b"fLaC", len(content) // 2)
    content[place : place + 400] = bytes(400)
    tar.write_bytes(content)
    for num_workers in (0, 1):
        results = list(tag([tmp_path / "s"], tiny_model, num_workers=num_workers))
        failed = [r for r in results if isinstance(r, Failure)]
        assert len(results) == len(good) and len(failed) == 1
        assert failed[0].path.startswith(str(tar)) and failed[0].path.endswith(".flac")


def test_a_path_for_one_clip_is_a_clip_whatever_its_suffix(tiny_model, clips, tmp_path):
    odd = tmp_path / "sound.txt"
    odd.write_bytes((clips / "03.flac").read_bytes())
    assert predict(odd, tiny_model).labels == predict(clips / "03.flac", tiny_model).labels


def test_numbers_follow_the_sources_and_the_digest_their_order(clips, good):
    units = list(units_of([clips, *good]))
    numbers = [number for unit in units for number in unit.numbers]
    assert numbers == list(range(12 + len(good)))
    assert max(len(unit.numbers) for unit in units) == FILES_A_UNIT
    assert paths_of(units)[12:] == [os.fspath(path) for path in good]
    assert digest_of(units) == digest_of(list(units_of([clips, *good])))
    assert digest_of(units) != digest_of(list(units_of([*good, clips])))
    left = units[0].without({0, 2})
    assert left.numbers == (1, 3) and paths_of([left]) == paths_of(units)[1:4:2]
    assert units[0].without(set(range(4))) is None
