"""Tokenizers of other kinds, and vocabularies that do not fit their tokenizer."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from service.errors import InvalidRequestError
from service.grammar import Run
from tests.fixtures.tiny import VOCABULARY
from tests.unit.grammar.walking import END, accepts, allowed_ids, compiled, grammars, wander


def sentencepiece() -> PreTrainedTokenizerBase:
    """As Llama 2's: metaspace, and bytes for what is no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *'abcdefghijklmnopqrstuvwxyz0123456789{}":,', "▁a", "ab", "▁{", '":']
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *letters])}
    merges = [("▁", "a"), ("a", "b"), ("▁", "{"), ('"', ":")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_sentencepiece_tokens_are_read_with_their_spaces_and_bytes() -> None:
    tokenizer = sentencepiece()
    made = grammars(tokenizer, len(tokenizer), [2])
    grammar = compiled(made, "choice", [" ab é", "xy"])
    run = Run(grammar, "field")
    for piece in ("▁a", "b", "▁", "<0xC3>", "<0xA9>"):
        token = tokenizer.convert_tokens_to_ids(piece)
        assert token in allowed_ids(run), piece
        run.advance(token)
    assert run.complete
    assert wander(compiled(made, "regex", "[a-c]{4}"), tokenizer, 3).strip(" ") != ""


def test_a_model_with_more_tokens_than_its_tokenizer_never_gets_the_others(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    made = grammars(tokenizer, VOCABULARY + 77)
    run = Run(compiled(made, "regex", "(.|\n)*"), "field")
    assert len(run.allowed()) >= VOCABULARY + 77
    assert max(allowed_ids(run)) < VOCABULARY


def test_a_model_with_fewer_tokens_than_its_tokenizer_is_served(tokenizer: PreTrainedTokenizerBase) -> None:
    made = grammars(tokenizer, VOCABULARY - 10)
    assert accepts(compiled(made, "regex", "ab"), tokenizer, "ab")


def test_every_end_token_of_the_model_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    made = grammars(tokenizer, ends=[0, END])
    assert {0, END} <= set(allowed_ids(Run(compiled(made, "regex", "a*"), "field")))


def test_a_model_without_an_end_token_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidRequestError, match="no end-of-sequence token"):
        compiled(grammars(tokenizer, ends=[]), "regex", "a")


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path) -> None:
    lossy = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2, "</s>": 3}, unk_token="[UNK]"))
    lossy.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=lossy, unk_token="[UNK]", eos_token="</s>")
    with pytest.raises(InvalidRequestError, match="tokenizer cannot be constrained"):
        compiled(grammars(tokenizer, 4, [3]), "regex", "a")
