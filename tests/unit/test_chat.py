"""Conversations: rows of every format, and tokens with the learnt ones against masks computed by hand."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from curriq.config import SourceConfig
from curriq.data.chat import MOST_TURNS, encode_chat, read_conversation
from curriq.data.documents import Document, DocumentSource, document_key, read_epoch
from curriq.data.sources import open_source
from curriq.data.tokenizer import EOS, encode, train_tokenizer
from curriq.errors import CurriqError

TAGGED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %} {{ m['content'] }} <eos>{% endgeneration %}{% else %} {{ m['content'] }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
FORGETFUL = PLAIN.replace("<eos>", "{% if loop.last %}<eos>{% endif %}")
ALTERNATING = "{{ raise_exception('roles must alternate') }}"

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "ok bye"},
]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def word_tokenizer(template: str | None = None) -> PreTrainedTokenizerBase:
    """One token per word and per mark; white space is dropped."""
    words = ["<eos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    words += ["be", "kind", "hi", "there", "ok", "bye"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    marks = pre_tokenizers.Split(Regex(r"<\|\w+\|>"), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marks])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def bytes_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    """A byte-level BPE with a few merges, one of which joins the end of a mark with a line break."""
    monkeypatch.setenv("CURRIQ_CACHE", str(tmp_path))
    return train_tokenizer(["<|user|>\nhi there<|end|>\n<|assistant|>\n\n\n  ok bye"] * 9, 290, 10**5)


def words_and_learnt(tokenizer: PreTrainedTokenizerBase, messages: Any) -> list[tuple[str, bool]]:
    ids, learnt = encode_chat(tokenizer, messages)
    return list(zip(tokenizer.convert_ids_to_tokens(ids), learnt, strict=True))


class TestEncoding:
    def test_a_template_may_name_the_special_tokens(self) -> None:
        marked = TAGGED.replace("<eos>", "{{ eos_token }}")
        assert encode_chat(word_tokenizer(marked), CHAT) == encode_chat(word_tokenizer(TAGGED), CHAT)

    @pytest.mark.parametrize("template", [TAGGED, PLAIN])
    def test_learns_the_assistants_tokens(self, template: str) -> None:
        assert words_and_learnt(word_tokenizer(template), CHAT) == [
            ("<|system|>", False), ("be", False), ("kind", False),
            ("<|user|>", False), ("hi", False), ("there", False),
            ("<|assistant|>", False), ("hi", True), ("<eos>", True),
            ("<|user|>", False), ("ok", False),
            ("<|assistant|>", False), ("ok", True), ("bye", True), ("<eos>", True),
        ]  # fmt: skip

    @pytest.mark.parametrize("template", [TAGGED, PLAIN])
    def test_one_role_alone(self, template: str) -> None:
        tokenizer = word_tokenizer(template)
        assert not any(encode_chat(tokenizer, CHAT[:2])[1])
        assert encode_chat(tokenizer, [turn("assistant", "ok")])[1] == [False, True, True]
        two = [turn("assistant", "ok"), turn("assistant", "bye")]
        assert encode_chat(tokenizer, two)[1] == [False, True, True, False, True, True]

    def test_default_template(self, caplog: pytest.LogCaptureFixture) -> None:
        tokenizer = word_tokenizer()
        expected = [
            ("<|system|>", False), ("be", False), ("kind", False), ("<|end|>", False),
            ("<|user|>", False), ("hi", False), ("there", False), ("<|end|>", False),
            ("<|assistant|>", False), ("hi", True), ("<|end|>", True),
        ]  # fmt: skip
        with caplog.at_level(logging.WARNING, logger="curriq"):
            assert words_and_learnt(tokenizer, CHAT[:3]) == expected
            assert words_and_learnt(tokenizer, tuple(CHAT[:3])) == expected
        assert [record.getMessage().count("no chat_template") for record in caplog.records] == [1]
        prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=False)
        assert prompt == encode_chat(tokenizer, CHAT[:3])[0][:9]

    @pytest.mark.parametrize(("content", "straddling"), [("ok\n\nbye 😀", ""), ("  ok", "\n")])
    def test_default_template_as_bytes(
        self, bytes_tokenizer: PreTrainedTokenizerBase, content: str, straddling: str
    ) -> None:
        """A line break of the template and the spaces of the answer are one token, which is learnt."""
        ids, learnt = encode_chat(bytes_tokenizer, [turn("user", "hi"), turn("assistant", content)])
        text = f"<|user|>\nhi<|end|>\n<|assistant|>\n{content}<|end|>\n"
        assert ids == encode(bytes_tokenizer, [text])[0], "its marks are ordinary text"
        answer = [i for i, is_learnt in zip(ids, learnt, strict=True) if is_learnt]
        assert bytes_tokenizer.decode(answer) == f"{straddling}{content}<|end|>\n"

    def test_masks_of_transformers_run_on_where_white_space_ends_a_span(self) -> None:
        """The reason for masks of our own; once this fails, `encode_chat` can use the library's."""
        tokenizer = word_tokenizer(TAGGED.replace("<eos>{% end", "\n{% end").replace("%} {{", "%}{{"))
        theirs = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True)["assistant_masks"]
        ours = encode_chat(tokenizer, CHAT)[1]
        assert theirs == [0] * 7 + [1] * 6
        assert ours == [False] * 7 + [True] + [False] * 3 + [True] * 2

    @given(
        st.lists(
            st.tuples(st.sampled_from(["user", "assistant"]), st.text("ab <|>\n😀ü", min_size=1)), min_size=1
        )
    )
    def test_equals_transformers_where_tokens_keep_white_space(self, turns: list[tuple[str, str]]) -> None:
        model = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        model.model = models.BPE(vocab=alphabet, merges=[])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
        tokenizer.chat_template = TAGGED
        messages = [turn(*item) for item in turns]
        theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
        ids, learnt = encode_chat(tokenizer, messages)
        assert ids == theirs["input_ids"]
        assert learnt == [bool(i) for i in theirs["assistant_masks"]]
        tokenizer.chat_template = PLAIN
        assert encode_chat(tokenizer, messages) == (ids, learnt)

    def test_tokens_of_white_space_are_learnt_with_trimmed_offsets(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {byte: i for i, byte in enumerate([*alphabet, "ĠĠ", "ĠĠĠ"])}
        model = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "Ġ"), ("ĠĠ", "Ġ")]))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.post_processor = processors.ByteLevel(trim_offsets=True)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
        tokenizer.chat_template = PLAIN.replace("<eos>", "")
        found = words_and_learnt(tokenizer, [turn("user", "a"), turn("assistant", "b:\n    c")])
        assert [token for token, is_learnt in found if is_learnt] == [*"Ġb:Ċ", "ĠĠĠ", "Ġ", "c", "Ġ"]

    def test_encoding_documents_in_between_changes_nothing(
        self, bytes_tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """`encode` makes special tokens ordinary text; in a template they are tokens."""
        bytes_tokenizer.chat_template = TAGGED.replace("<eos>", EOS)
        before = encode_chat(bytes_tokenizer, CHAT)
        assert before[0].count(bytes_tokenizer.eos_token_id) == 2
        assert bytes_tokenizer.eos_token_id not in encode(bytes_tokenizer, [f"hi {EOS}"])[0]
        assert encode_chat(bytes_tokenizer, CHAT) == before

    def test_named_templates_and_more_fields(self) -> None:
        tokenizer = word_tokenizer()
        tokenizer.chat_template = {"default": PLAIN, "tool_use": ALTERNATING}
        messages = [CHAT[1], {"role": "assistant", "tool_calls": [{"name": "bye"}]}]
        assert encode_chat(tokenizer, messages)[1] == [False] * 4 + [True]

    def test_a_template_that_rewrites_earlier_turns(self) -> None:
        tokenizer = word_tokenizer(FORGETFUL)
        assert encode_chat(tokenizer, CHAT[:3])[1] == [False] * 7 + [True] * 2
        with pytest.raises(CurriqError, match=r"changes turn 3 of .*later turns.*\{% generation %\} tags"):
            encode_chat(tokenizer, CHAT)

    def test_a_template_that_refuses(self) -> None:
        with pytest.raises(CurriqError, match=r"cannot render .*be kind.*must alternate.*another template"):
            encode_chat(word_tokenizer(ALTERNATING), CHAT)

    def test_slow_tokenizer(self) -> None:
        from transformers import ByT5Tokenizer

        with pytest.raises(CurriqError, match=r"chat data needs a fast tokenizer"):
            encode_chat(ByT5Tokenizer(), CHAT)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def opened(path: Path | str, **settings: Any) -> DocumentSource:
    return open_source(SourceConfig(name="chat", path=str(path), text_field="messages", **settings), 0)


@pytest.fixture(params=[".jsonl", ".json", ".parquet"])
def extension(request: pytest.FixtureRequest) -> str:
    return request.param


class TestReading:
    def test_rows_carry_their_conversation(self, tmp_path: Path, extension: str) -> None:
        chats = [CHAT, [turn("user", "\n hi"), turn("assistant", "naïve 学習\n\n")]]
        rows = [{"id": i, "messages": chat, "level": i} for i, chat in enumerate(chats)]
        source = opened(write(tmp_path / f"a{extension}", rows), difficulty_field="level")
        documents = list(read_epoch(source))
        assert [document.messages for document in documents] == [tuple(chat) for chat in chats]
        assert [document.difficulty for document in documents] == [0, 1]
        texts = [
            "system: be kind\nuser: hi there\nassistant: hi\nuser: ok\nassistant: ok bye",
            "user: \n hi\nassistant: naïve 学習",
        ]
        assert [document.text for document in documents] == texts
        assert [document.key for document in documents] == [document_key(text) for text in texts]
        assert list(read_epoch(source)) == documents
        assert len(set(documents)) == 2

    def test_messages_with_other_fields(self, tmp_path: Path, extension: str) -> None:
        chat = [
            {"role": "user", "content": "hi", "name": "Bo"},
            {"role": "assistant", "content": None, "tool": {"id": "x"}},
            {"role": "tool", "content": "bye"},
        ]
        (document,) = read_epoch(opened(write(tmp_path / f"a{extension}", [{"messages": chat}])))
        assert document.messages == (chat[0], {"role": "assistant", "tool": {"id": "x"}}, chat[2])
        assert document.text == "user: hi\nassistant: \ntool: bye"

    def test_rows_without_content_are_skipped(self, tmp_path: Path, extension: str) -> None:
        empty = [[], [turn("user", " \n")], [turn("user", ""), turn("assistant", "")]]
        rows = [{"messages": chat} for chat in [*empty, CHAT, *empty]]
        (document,) = read_epoch(opened(write(tmp_path / f"a{extension}", rows)))
        assert document.messages == tuple(CHAT)

    @pytest.mark.parametrize(
        "value",
        [
            [1, 2],
            ["hi", "there"],
            [{"from": "human", "value": "hi"}],
            [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            {"role": "user", "content": "hi"},
            [["user", "hi"]],
        ],
        ids=str,
    )
    def test_other_values_are_refused(self, tmp_path: Path, extension: str, value: Any) -> None:
        source = opened(write(tmp_path / f"a{extension}", [{"id": 1, "messages": value}]))
        where = "line 1 of .*" if extension == ".jsonl" else "row 1 of .*"
        kind = "dict" if isinstance(value, dict) else "list"
        match = rf"{where}a{extension}: column 'messages' holds .* \({kind}\), neither a text nor a conv"
        with pytest.raises(CurriqError, match=match):
            source.next_document()

    @pytest.mark.parametrize("item", [1, {"from": "human", "value": "hi"}], ids=str)
    def test_the_error_lists_the_columns(self, tmp_path: Path, extension: str, item: Any) -> None:
        source = opened(write(tmp_path / f"a{extension}", [{"body": "x", "messages": [item]}]))
        with pytest.raises(CurriqError, match="text_field=COLUMN; columns: body, messages"):
            source.next_document()

    def test_half_a_surrogate_pair_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text(r'{"messages": [{"role": "user", "content": "cut \ud83d here"}]}')
        (document,) = read_epoch(opened(path))
        assert document.messages == (turn("user", "cut ? here"),)
        assert document.text == "user: cut ? here"

    def test_hub_data_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        rows = [{"messages": CHAT}, {"messages": CHAT[1:3]}]
        stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
        source = opened("hub:owner/name", hub_revision="0" * 40)
        assert [document.messages for document in read_epoch(source)] == [tuple(CHAT), tuple(CHAT[1:3])]

    def test_resumes_exactly(self, tmp_path: Path, extension: str) -> None:
        rows = [{"messages": [turn("user", f"say {i}"), turn("assistant", str(i))]} for i in range(7)]
        path = write(tmp_path / f"a{extension}", rows)
        source = opened(path)
        head = [source.next_document() for _ in range(4)]
        resumed = opened(path)
        resumed.load_state_dict(source.state_dict())
        assert [*head, *read_epoch(resumed)] == list(read_epoch(opened(path)))

    def test_lists_of_json_that_are_no_messages(self) -> None:
        assert read_conversation(["not JSON"]) is None
        assert read_conversation(['{"role": "user"}']) == ({"role": "user"},)
        assert read_conversation("text") is None

    def test_equal_text_of_other_conversations_is_another_document(self) -> None:
        one = Document("user: a", messages=(turn("user", "a"),))
        assert one != Document("user: a")
        assert one == Document("user: a", messages=(turn("user", "a"),))
        assert hash(one) == hash(Document("user: a"))


def test_a_conversation_of_too_many_turns_without_tags_is_refused_at_once() -> None:
    """Each turn is rendered with all before it: 20,000 turns would take an hour."""
    tokenizer = train_tokenizer(["user assistant hello"], 300, 1000)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    turns = [{"role": ("user", "assistant")[i % 2], "content": "hello"} for i in range(MOST_TURNS + 1)]
    with pytest.raises(CurriqError, match=r"has 2001 turns.*no {% generation %} tags.*at most 2000"):
        encode_chat(tokenizer, turns)
    ids, learnt = encode_chat(tokenizer, turns[:4])
    assert 0 < sum(learnt) < len(ids)
