"""What the loader is held to, in the newest committed measurement of the path from files to features."""

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def newest():
    """Rows of the newest result file of the suite `path`."""
    files = [json.loads(file.read_text()) for file in RESULTS.glob("*-path-*.json")]
    if not files:
        pytest.skip("the suite `path` has not been measured")
    return max(files, key=lambda content: content["environment"]["date"])["rows"]


def rows(case, provider, **shape):
    found = [
        row
        for row in newest()
        if row["case"] == case and row["provider"].startswith(provider) and row["status"] == "ok"
        if shape.items() <= row["shape"].items()
    ]
    assert found, f"{case}: {provider} was not measured"
    return found


def test_flac_is_read_with_features_made_at_083_of_soundfiles_own_speed():
    # a ratio is soundfile's time over ours, and soundfile only decodes
    for row in rows("flac_files", "soundfile"):
        if row["provider"] == "soundfile":
            assert row["ratio"]["p50"] >= 0.83, row["shape"]


def test_a_core_makes_features_of_1500_clips_a_second_from_raw_shards():
    for row in rows("s16_shards", "ast_fast", workers=0, N=160000):
        assert row["clips_per_second"] >= 1500
