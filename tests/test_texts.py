import pytest
from hypothesis import given
from hypothesis import strategies as st

from tappa.errors import TextError
from tappa.texts import encode_texts, packaged_text, read_lines, read_text
from tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHARACTERS = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=8)


def test_read_text_keeps_the_text_and_drops_a_byte_order_mark(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\r\ntext\n")
    assert read_text(path) == read_text(str(path)) == "naïve\r\ntext\n"


def test_read_text_names_the_byte_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("a naïve text".encode("latin-1"))
    with pytest.raises(TextError, match=r"byte 0xef at offset 4 of .*latin\.txt"):
        read_text(path)


@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"\xef\xbb\xbf"])
def test_read_text_refuses_an_empty_file(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match="empty file"):
        read_text(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing.txt", "No such file"), ("folder", "got a folder"), ("nul\0", "null byte")],
)
def test_read_text_refuses_what_is_no_file(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(TextError, match=message):
        read_text(tmp_path / name)


def test_packaged_text_is_english_prose_of_the_promised_size():
    text = packaged_text()
    assert 50_000 < len(text.encode()) < 300_000
    assert text.isascii()
    assert "\r" not in text
    assert "It is a truth universally acknowledged" in text[:300]
    assert "gutenberg" not in text.lower()


@given(CHARACTERS, st.integers(8, 40))
def test_encode_texts_gives_the_first_tokens(text, tokens):
    [ids] = encode_texts(TOKENIZER, [text], tokens=tokens, context=40)
    assert ids == TOKENIZER(text).input_ids[:tokens]


def test_encode_texts_takes_2048_tokens_by_default_or_the_context():
    text = packaged_text()
    assert [len(ids) for ids in encode_texts(TOKENIZER, [text, text[:99]])] == [2048, 99]
    assert [len(ids) for ids in encode_texts(TOKENIZER, [text], context=8192)] == [2048]
    assert [len(ids) for ids in encode_texts(TOKENIZER, [text], context=100)] == [100]


@pytest.mark.parametrize(
    ("texts", "tokens", "message"),
    [
        (["1234567"], None, "at least 8 tokens, the text has 7"),
        (["12345678", ""], None, "at least 8 tokens, text 2 of 2 has 0"),
        (["12345678"], 7, "tokens as a whole number from 8 on, got 7"),
        (["12345678"], 101, "101 tokens are more than the model's context of 100 tokens"),
        ([], None, "at least one text"),
    ],
)
def test_encode_texts_refuses(texts, tokens, message):
    with pytest.raises(TextError, match=message):
        encode_texts(TOKENIZER, texts, tokens=tokens, context=100)


@pytest.mark.xdist_group("smollm2")
@pytest.mark.parametrize("tokens", [8, 2048, 30_000])
def test_encode_texts_of_a_prefix_equals_the_whole(smollm2, tokens, caplog):
    text = packaged_text()
    [ids] = encode_texts(smollm2.tokenizer, [text], tokens=tokens, context=30_000)
    assert caplog.records == []
    assert ids == smollm2.tokenizer(text).input_ids[:tokens]


@pytest.mark.xdist_group("smollm2")
def test_encode_texts_looks_further_when_tokens_are_long(smollm2):
    text = " internationalization" * 500 + " the end"
    [ids] = encode_texts(smollm2.tokenizer, [text], tokens=400)
    assert ids == smollm2.tokenizer(text).input_ids[:400]


def test_lines_are_read_one_by_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes("\ufeffa\u2028b\r\n\nç\n".encode() + b"\xff\n" + b"z" * 100)
    lines = read_lines(path)
    assert [next(lines) for _ in range(3)] == ["a\u2028b\r", "", "ç"]
    with pytest.raises(TextError, match=r"byte 0xff at offset 14 of .*a\.jsonl"):
        next(lines)
    with pytest.raises(TextError, match=r"cannot read the text file .*: No such file"):
        next(read_lines(tmp_path / "none"))
