"""JSON and YAML of people and of hostile people."""

from itertools import pairwise

import pytest

from pahm.text_files import parse_json, parse_yaml, read_json, read_yaml


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_read_over(tmp_path, mark):
    path = tmp_path / "a"
    path.write_bytes(mark + b'{"name": [1, 2.5, null, "\xc3\xa9"]}')
    assert read_json(path) == read_yaml(path) == {"name": [1, 2.5, None, "é"]}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "Exceeds the limit"),
        ("[1e400]", "'1e400' is not a finite number"),
        ("[-Infinity]", "-Infinity is not a finite number"),
        ("[NaN]", "NaN is not a finite number"),
        ('{"a": 1, "b": 1, "a": 1}', "'a' is given twice"),
        (b'"\xff"', "decode"),
    ],
)
def test_what_is_no_plain_json_is_one_sentence(text, sentence):
    with pytest.raises(ValueError, match=f"^mine is not JSON that can be read: .*({sentence})") as caught:
        parse_json(text, "mine")
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"12345678901", "has more than 10 bytes"),
        (b"\xff\xfea\x00", "is not a text file in UTF-8"),
    ],
)
def test_files_that_are_too_large_or_no_text_are_named(tmp_path, content, sentence):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"mine\.json {sentence}"):
        read_json(path, limit=10)
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="is not a file"):
        read_json(tmp_path)


def test_aliases_are_refused_before_they_are_followed():
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairwise("abcdefgh")]
    with pytest.raises(ValueError, match=r"^mine: aliases such as \*a are not supported"):
        parse_yaml("\n".join(lines), "mine")
