"""Text as people have it: read in the stated way whatever editors and tools wrote, else named by file, line
and byte."""

import codecs
import json
from pathlib import Path

import pytest
from test_corpus import WordTokenizer, data

from dmsae_lib.data import corpus
from dmsae_lib.data.corpus import documents, tokenise
from dmsae_lib.store.artifacts import UserError

MARK = codecs.BOM_UTF8
TEXTS = ["one ünd two", "thrée 😀", "four"]
ENCODED = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    # the mark that the codec of Python does not write
    "utf-32": b"",
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def file_of(folder: Path, kind: str, texts: list[str], newline: str = "\n") -> tuple[Path, str]:
    path = folder / f"texts.{kind}"
    lines = texts if kind == "txt" else [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    return path, (2 * newline if kind == "txt" else newline).join(lines) + newline


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ENCODED)
def test_every_encoding_with_a_mark_gives_the_same_documents(tmp_path, kind, newline, encoding):
    path, text = file_of(tmp_path, kind, TEXTS, newline)
    path.write_bytes(ENCODED[encoding] + text.encode(encoding))
    assert [found.strip() for found in documents(data(path))] == TEXTS


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_marks_inside_a_file_made_of_several_are_taken_off(tmp_path, kind):
    path, text = file_of(tmp_path, kind, TEXTS)
    path.write_bytes((MARK + text.encode() + b"\n") * 2)
    assert [found.strip() for found in documents(data(path))] == TEXTS * 2
    path.write_bytes(MARK)
    assert list(documents(data(path))) == []


@pytest.mark.parametrize("between", ["\ufeff\n", " \ufeff", "\ufeff\ufeff"])
def test_marks_alone_in_a_line_or_several_of_them_are_taken_off(tmp_path, between):
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "a"}}\n{between}{{"text": "\ufeff\ufeffb"}}\n\ufeff', encoding="utf-8")
    assert list(documents(data(path))) == ["a", "b"]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("encoding, byte", [("utf-16-le", 1), ("utf-16-be", 0), ("utf-32-le", 1)])
def test_other_encodings_without_a_mark_are_no_text(tmp_path, kind, encoding, byte):
    """English in UTF-16 is UTF-8, too, with a null after each letter."""
    path, text = file_of(tmp_path, kind, ["hello there"])
    path.write_bytes(text.encode(encoding))
    with pytest.raises(
        UserError, match=rf"is not UTF-8 text .a null byte.* at byte {byte}, in line 1.; convert it"
    ):
        list(documents(data(path)))


def test_a_mark_inside_the_text_field_is_taken_off_and_one_in_the_middle_is_text(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "\ufeffone"}) + "\n" + json.dumps({"text": "t\ufeffwo"}))
    assert list(documents(data(path))) == ["one", "t\ufeffwo"]


HALVES = [
    (r"a\ud83d b", "a\ufffd b"),
    (r"\ude00\ud83d", "\ufffd\ufffd"),
    (r"\ud83d\ude00", "😀"),
    (r"\ud83d\n\ude00", "\ufffd\n\ufffd"),
]


@pytest.mark.parametrize(("escaped", "read"), HALVES)
def test_half_a_surrogate_pair_is_the_replacement_character(tmp_path, escaped, read):
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "{escaped}"}}\n')
    assert list(documents(data(path))) == [read]


def test_the_rows_of_a_hub_data_set_are_cleaned_too(monkeypatch):
    import datasets

    rows = [{"text": text} for text in ("\ufeffone", "t\ud83dwo", "three")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert list(documents(data("owner/texts"))) == ["one", "t\ufffdwo", "three"]


def test_real_tokenizers_take_whatever_was_read(tiny_llama, tmp_path):
    """Lone halves are a TypeError in the tokenizers package; the tokens of the rest are those of the clean
    file."""
    lines = [json.dumps({"text": f"word {i} \ud83d and more words"}) for i in range(3000)]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    (tmp_path / "good.jsonl").write_text("\n".join(lines).replace(r"\ud83d", "\ufffd"), encoding="utf-8")
    bad, good = (
        tokenise(data(tmp_path / name), tiny_llama.tokenizer, 16) for name in ("bad.jsonl", "good.jsonl")
    )
    assert all((bad[split].tokens == good[split].tokens).all() for split in corpus.SPLITS)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("before", [0, 1, 20_000])  # the last is deeper than any buffer
def test_what_is_not_utf_8_is_named_by_line_and_byte(tmp_path, kind, mark, before):
    path, text = file_of(tmp_path, kind, [f"fine é {i}" for i in range(before)])
    start = mark + (text.encode() if before else b"")
    # never UTF-8, Latin-1, half a pair, cut short
    for bad in (b"\xff", b"\xe9t\xe9", b"\xed\xa0\xbd", b"\xf0\x9f\x98"):
        path.write_bytes(start + b"ab " + bad + b"\nmore\n")
        with pytest.raises(UserError) as caught:
            list(documents(data(path)))
        line = start.count(b"\n") + 1
        assert f"{path} is not UTF-8 text (" in str(caught.value) and "invalid" in str(caught.value)
        assert f" at byte {len(start) + 3}, in line {line}); " in str(caught.value)


def test_a_fault_in_utf_16_is_replaced(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("one ".encode("utf-16") + b"\x3d\xd8" + " two".encode("utf-16-le"))
    (found,) = documents(data(path))
    assert found.startswith("one \ufffd") and found.endswith("two")


def test_json_that_nests_too_deeply_is_named_by_its_line(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "x"}\n' + '{"text": ' + "[" * 200_000)
    with pytest.raises(
        UserError, match="line 2 of .*texts.jsonl is not a JSON object with the text field 'text'; mend"
    ):
        tokenise(data(tmp_path), WordTokenizer(), 16)
