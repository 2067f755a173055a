import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protlm import vocabulary
from protlm.vocabulary import IllegalLetterError, ModelVocabulary, are_residues, clean, decode, encode

ESM2 = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]


def test_the_tokens_are_esms_in_esms_order():
    assert list(vocabulary.TOKENS) == ESM2
    assert vocabulary.VOCABULARY_SIZE == 33
    assert (vocabulary.CLS, vocabulary.PAD, vocabulary.EOS, vocabulary.MASK) == (0, 1, 2, 32)
    assert (vocabulary.FIRST_RESIDUE, vocabulary.NUM_RESIDUES, vocabulary.NUM_STANDARD_RESIDUES) == (4, 25, 20)
    assert vocabulary.RESIDUES == "LAGVSERTIDPKQNFYMHWCXBUZO"
    assert all(vocabulary.TOKEN_IDS[token] == number for number, token in enumerate(ESM2))


@pytest.mark.parametrize(
    ("text", "residues", "repairs"),
    [
        (b"MKV", b"MKV", {}),
        (b"", b"", {}),
        (b"UOBZX", b"UOBZX", {}),
        (b"mKv", b"MKV", {"lower_case": 2}),
        (b"MKV*", b"MKV", {"trailing_stop": 1}),
        (b"MKV* \n", b"MKV", {"trailing_stop": 1, "white_space": 2}),
        (b"MKV*--", b"MKV", {"trailing_stop": 1, "gap": 2}),
        (b"MJV", b"MXV", {"j_to_x": 1}),
        (b"MjV", b"MXV", {"j_to_x": 1, "lower_case": 1}),
        (b"M-K.V", b"MKV", {"gap": 2}),
        (b"M K\tV\r", b"MKV", {"white_space": 3}),
        (b"*", b"", {"trailing_stop": 1}),
        (b" -", b"", {"white_space": 1, "gap": 1}),
    ],
)
def test_repairs_are_made_and_counted(text, residues, repairs):
    cleaned, counts = clean(text)
    assert cleaned == residues
    assert dict(counts) == repairs
    assert set(counts) <= set(vocabulary.REPAIRS)


@pytest.mark.parametrize(
    ("text", "letter", "offset"),
    [
        (b"MK1V", "1", 2),
        (b"M*V", "*", 1),
        (b"MV**", "*", 2),
        (b"**", "*", 0),
        (b"M -*-*", "*", 3),
        (b"MK>V", ">", 2),
        (b"MK\x00", "\x00", 2),
        ("Mé".encode(), "é", 1),
        (b"mk v?", "?", 4),
    ],
)
def test_any_other_letter_is_an_error_at_its_place(text, letter, offset):
    with pytest.raises(IllegalLetterError) as caught:
        clean(text)
    assert (caught.value.letter, caught.value.offset) == (letter, offset)
    assert str(caught.value) == f"illegal character {letter!r} at position {offset + 1}"


@given(st.text(vocabulary.RESIDUES))
def test_encode_and_decode_are_inverse(sequence):
    tokens = encode(sequence.encode())
    assert tokens.dtype == np.uint8
    assert tokens.tolist() == [vocabulary.TOKEN_IDS[letter] for letter in sequence]
    assert are_residues(tokens)
    assert decode(tokens) == sequence


@given(st.text(vocabulary.RESIDUES + vocabulary.RESIDUES.lower() + "Jj-. \t*", max_size=30))
def test_whatever_is_cleaned_has_residues_only_and_needs_no_second_cleaning(text):
    try:
        residues, repairs = clean(text.encode())
    except IllegalLetterError:
        # Of these letters only a stop that is not the last letter is illegal.
        assert "*" in text.rstrip(" \t-.")[:-1]
        return
    assert set(residues.decode()) <= set(vocabulary.RESIDUES)
    assert clean(residues) == (residues, {})
    assert len(text) - len(residues) == repairs["gap"] + repairs["white_space"] + repairs["trailing_stop"]


@given(st.binary(min_size=1, max_size=30))
def test_the_place_of_an_illegal_letter_is_inside_the_text(text):
    try:
        clean(text)
    except IllegalLetterError as error:
        offset = error.offset
    else:
        return
    assert 0 <= offset < len(text)
    assert text[offset : offset + 1].upper() not in {bytes([letter]) for letter in vocabulary.RESIDUES.encode()}


@pytest.mark.parametrize("token", [0, 1, 2, 3, 29, 32, 255])
def test_decode_refuses_what_is_no_residue(token):
    assert not are_residues(np.array([4, token]))
    with pytest.raises(ValueError, match="tokens: expected residue tokens 4…28"):
        decode(np.array([4, token]))


def test_no_tokens_are_residues_and_decode_to_nothing():
    assert are_residues(np.array([], dtype=np.uint8))
    assert decode(np.array([], dtype=np.uint8)) == ""


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def test_the_tokens_of_data_are_those_of_a_model_of_ours():
    ours = ModelVocabulary()
    assert ours.is_ours
    assert (len(ours), ours.pad, ours.mask, ours.lacked) == (33, vocabulary.PAD, vocabulary.MASK, "")
    assert ours.ids.tolist() == ours.columns.tolist() == list(range(33))


def test_special_tokens_are_found_by_their_names_and_residues_by_their_letters():
    tokens = (*SPECIAL, *"ACDEFGHIKLMNPQRSTVWYX")
    model = ModelVocabulary(tokens)
    assert not model.is_ours
    ids = {token: tokens[number] for token, number in zip(vocabulary.TOKENS, model.ids.tolist(), strict=True)}
    assert [ids[token] for token in ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>", "L", "Y", "X")] == [
        "[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", "L", "Y", "X",
    ]  # fmt: skip
    assert [ids[token] for token in "BUZO"] == ["X"] * 4
    assert (model.lacked, model.stand_in) == ("BUZO", "X")
    assert [model.columns[vocabulary.TOKEN_IDS[token]] for token in ("B", "-", "<null_1>")] == [-1] * 3


def test_without_an_x_other_residues_are_unknown():
    model = ModelVocabulary((*SPECIAL, *"ACDEFGHIKLMNPQRSTVWY"))
    assert (model.lacked, model.stand_in) == ("XBUZO", "[UNK]")


def test_residues_that_a_model_was_trained_to_see_as_x_keep_their_column():
    model = ModelVocabulary((*SPECIAL, *"ACDEFGHIKLMNPQRSTVWYXUZOB"), residues_as_x="UZOB")
    assert (model.lacked, model.stand_in) == ("BUZO", "X")
    letters = [vocabulary.TOKEN_IDS[letter] for letter in "UZOB"]
    assert [model.tokens[number] for number in model.ids[letters]] == ["X"] * 4
    assert [model.tokens[number] for number in model.columns[letters]] == list("UZOB")


@pytest.mark.parametrize(
    ("tokens", "as_x", "message"),
    [
        (("L", "L"), "", "'L' twice"),
        (SPECIAL[:4], "", r"expected a token <mask> or \[MASK\]"),
        (SPECIAL, "", "expected a token L, got none"),
        ((*SPECIAL[2:], *"ACDEFGHIKLMNPQRSTVWY"), "", "got neither"),
        ((*SPECIAL, *"ACDEFGHIKLMNPQRSTVWYB"), "B", "read as X, got none"),
        (vocabulary.TOKENS, "*", "got '\\*'"),
    ],
)
def test_a_vocabulary_that_no_protein_can_be_written_in_is_refused(tokens, as_x, message):
    with pytest.raises(ValueError, match=message):
        ModelVocabulary(tokens, as_x)
