"""Names of classes from a table or a list, wrong lines named by their number."""

from __future__ import annotations

import pytest

from ast_fast.labels import read_labels

TABLE = 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n2,/t/dd1,Dog\n'


@pytest.mark.parametrize("change", [lambda t: t, lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n"),
                                    lambda t: t + "\n", str.rstrip])  # fmt: skip
def test_audiosets_table(tmp_path, change):
    file = tmp_path / "class_labels_indices.csv"
    file.write_bytes(change(TABLE).encode())
    labels = read_labels(file, 3)
    assert labels.names == ("Speech", "Male speech, man speaking", "Dog")
    assert labels.mids == ("/m/09x0r", "/m/05zppz", "/t/dd1")
    assert labels.index_of("/t/dd1") == 2 and labels.index_of("Speech") == 0 and len(labels) == 3
    with pytest.raises(ValueError, match="label 'Cat' is unknown: expected one of 3 classes"):
        labels.index_of("Cat")


def test_a_list(tmp_path):
    (tmp_path / "names.txt").write_text("ma\nshi\n li \n")
    labels = read_labels(tmp_path / "names.txt")
    assert labels.names == labels.mids == ("ma", "shi", "li")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "mid,index,display_name\n0,a,b\n",
            "line 1: got the columns .*expected index,mid,display_name",
        ),
        ("", "line 1: got the columns"),
        ("index,mid,display_name\n", "name no class"),
        ("index,mid,display_name\n0,a,A\n2,b,B\n", "line 3: got index '2': expected 1"),
        ("index,mid,display_name\n0,a,A\n0,b,B\n", "line 3: got index '0': expected 1"),
        ("index,mid,display_name\n0,a,A\n1,a,B\n", "line 3: mid 'a' is on line 2 already"),
        ("index,mid,display_name\n0,a,Male, man\n", r"line 2: got 4 fields: .*\(quote commas\)"),
        ("index,mid,display_name\n0,a,\n", "line 2: mid or display_name is empty"),
        ('index,mid,display_name\n0,a,"A\n', "line 2: is no CSV"),
        ("index,mid,display_name\n0,a,A\0\n", "hold NUL"),
        (
            "index,mid,display_name\n0,a," + "x" * 70_000 + "\n",
            "line 2: a field is longer than 64 KiB",
        ),
        ("index,mid,display_name\n0,a," + "x" * 140_000 + "\n", "line 2: is no CSV"),
    ],
)
def test_wrong_tables(tmp_path, text, message):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "l.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "are empty"),
        (b"a\n\nb\n", "line 2: is empty"),
        (b"a\nb\na\n", "line 3: 'a' is on line 1 already"),
        (b"a\n\xff\xfe\n", "are not UTF-8"),
    ],
)
def test_wrong_lists(tmp_path, content, message):
    (tmp_path / "l.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "l.txt")


def test_counts_and_places(tmp_path):
    (tmp_path / "l.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="name 2 classes: expected 3"):
        read_labels(tmp_path / "l.txt", 3)
    with pytest.raises(FileNotFoundError, match="do not exist: expected class_labels_indices"):
        read_labels(tmp_path / "absent.csv")
