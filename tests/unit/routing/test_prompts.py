"""Prompts files and their forms."""

import pytest

from experts.errors import RoutingError
from experts.routing import load_prompts, prompt_forms, render_prompts
from experts.routing.loading import load_tokenizer
from tests.fixtures.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_lines_are_read_and_blank_ones_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x", "answer": "y", "split": "train"}\n\n{"prompt": "ü"}\n', encoding="utf-8")
    first, second = load_prompts(path)
    assert (first.prompt, first.answer, first.side) == ("x", "y", "train")
    assert (second.prompt, second.answer) == ("ü", None)


def test_prompts_without_a_split_are_divided_the_same_way_every_time(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"prompt": "number {i}"}}\n' for i in range(200)))
    sides = [prompt.side for prompt in load_prompts(path)]
    assert sides == [prompt.side for prompt in load_prompts(path)]
    assert 20 <= sides.count("validation") <= 60


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no prompts"),
        ("not json\n", ":1: line"),
        ('{"prompt": "a"}\n{"prompt": ""}\n', ":2: prompt"),
        ('{"answer": "a"}\n', ":1: prompt"),
        ('{"prompt": "a", "split": "test"}\n', ":1: split"),
        ("[]\n", ":1: line"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, content, says):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(RoutingError, match=says):
        load_prompts(path)


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(RoutingError, match=r"nothing\.jsonl"):
        load_prompts(tmp_path / "nothing.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(RoutingError, match=r"binary\.jsonl"):
        load_prompts(tmp_path / "binary.jsonl")


def test_every_prompt_is_rendered_as_chat_and_raw(tokenizer):
    chat, raw, chat_2, raw_2 = render_prompts(tokenizer, ["hello", "and then"])
    assert tokenizer.decode(chat) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(raw) == "hello"
    assert tokenizer.decode(raw_2) == "and then"
    assert len(chat_2) > len(raw_2)


def test_without_a_template_there_is_only_the_raw_form(tokenizer, tmp_path):
    plain = load_tokenizer(tiny_tokenizer(tmp_path))
    plain.chat_template = None
    assert prompt_forms(plain) == ("raw",)
    assert [plain.decode(ids) for ids in render_prompts(plain, ["hello"])] == ["hello"]


def test_an_empty_prompt_is_refused(tokenizer):
    with pytest.raises(RoutingError, match="prompt 1"):
        render_prompts(tokenizer, ["a", ""])


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
    hostile = load_tokenizer(tiny_tokenizer(tmp_path))
    hostile.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RoutingError, match="template refuses"):
        render_prompts(hostile, ["a"])
