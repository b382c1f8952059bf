"""Tokenizers: training and its cache, encoding, and tokenizers from folders and the hub."""

import json
import logging
import os
import random
import re
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from curriq.config import LMConfig, TokenizerConfig
from curriq.data.cache import read_cached, write_cached
from curriq.data.tokenizer import (
    EOS,
    MOST_CHARACTERS,
    cut_words,
    encode,
    eos_id,
    first_bytes,
    load_tokenizer,
    ordinary_ids,
    train_tokenizer,
)
from curriq.data.waiting import still_at_work
from curriq.errors import CurriqError

TEXTS = [
    "the cat sat on the mat",
    "the dog sat on the log",
    "a naïve café 学習 😀",
    "\tdef f(x):\n    return x",
]
HARD = ["", " ", "\x00\x01", "naïve café", "學習", "😀🇩🇪", "tabs\t and\r\nlines  ", "e\u0301", "\u2028"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CURRIQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS * 5, vocab_size=300, sample_bytes=10_000)


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    return json.dumps(tokenizer.get_vocab(), sort_keys=True)


class TestTraining:
    def test_vocabulary_and_special_token(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert len(tokenizer) == 300
        assert sorted(tokenizer.get_vocab().values()) == list(range(300))
        assert {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token} == {EOS}
        assert eos_id(tokenizer) == tokenizer.get_vocab()[EOS] == 0

    def test_merges_what_is_frequent(self) -> None:
        """By hand: of `abab abab …` byte-level BPE first merges a+b, then ab+ab, then the space before."""
        trained = train_tokenizer(["abab abab abab abab"], vocab_size=260, sample_bytes=1000)
        assert set(trained.get_vocab()) >= {"ab", "abab", "Ġabab"}
        assert len(trained) == 260
        assert len(encode(trained, ["abab abab"])[0]) == 2

    def test_small_sample_gives_a_small_vocabulary(self) -> None:
        assert len(train_tokenizer(["ab"], vocab_size=2048, sample_bytes=1000)) <= 258

    @pytest.mark.parametrize("text", HARD)
    def test_any_text_comes_back(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        (ids,) = encode(tokenizer, [text])
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text

    def test_sample_is_cut_to_bytes(self) -> None:
        assert list(first_bytes(["abc", "", "défg", "never"], 6)) == ["abc", "dé"]
        assert list(first_bytes(["abc", "dé"], 5)) == ["abc", "d"]
        assert list(first_bytes(["abc", "defg"], 100)) == ["abc", "defg"]
        assert list(first_bytes(["é"], 1)) == []

    def test_no_more_of_the_sample_is_read_than_needed(self) -> None:
        def texts():
            yield "x" * 100
            raise AssertionError("read on")

        train_tokenizer(texts(), 257, 100)

    def test_is_the_same_in_every_process_with_and_without_threads(self, cache: Path) -> None:
        program = (
            "import curriq.data.tokenizer as t, random\n"
            "draw = random.Random(0)\n"
            "words = [''.join(draw.choices('abcdefg', k=draw.randint(1, 6))) for _ in range(300)]\n"
            "texts = [' '.join(draw.choices(words, k=200)) for _ in range(200)]\n"
            "trained = t.train_tokenizer(texts, 600, 10**6).backend_tokenizer.to_str()\n"
        )
        environment = os.environ | {
            "TOKENIZERS_PARALLELISM": "true",
            "CURRIQ_CACHE": str(cache / "other"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-c", program + "print(trained, end='')"]
        threaded = subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout
        here: dict[str, str] = {}
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        exec(program, here)
        assert len(threaded) > 10_000
        assert threaded == here["trained"]

    def test_no_text(self) -> None:
        for texts in ([], ["", ""]):
            with pytest.raises(CurriqError, match="no text to train on"):
                train_tokenizer(texts, 300, 100)


class TestCache:
    def test_is_used_and_equal(self, tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
        (path,) = cache.glob("*.entry")
        name = f"tokenizers/{path.stem}"
        marked = read_cached(name).replace(b'"dropout":null', b'"dropout":0.5')
        again = train_tokenizer(TEXTS * 5, 300, 10_000)
        assert vocabulary(again) == vocabulary(tokenizer)
        assert encode(again, TEXTS) == encode(tokenizer, TEXTS)
        write_cached(name, marked)  # shows that the entry is what is read
        cached = train_tokenizer(TEXTS * 5, 300, 10_000).backend_tokenizer
        assert cached.model.dropout == 0.5

    def test_is_keyed_by_text_and_size(self, tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
        train_tokenizer(TEXTS * 5, 299, 10_000)
        train_tokenizer(TEXTS * 4, 300, 10_000)
        train_tokenizer(TEXTS * 5, 300, 99)
        assert len(list(cache.iterdir())) == 4

    @pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"{}"])
    def test_damaged_one_is_made_again(
        self, tokenizer: PreTrainedTokenizerBase, cache: Path, damage: bytes
    ) -> None:
        (path,) = cache.glob("*.entry")
        whole = path.read_bytes()
        path.write_bytes(damage)
        assert vocabulary(train_tokenizer(TEXTS * 5, 300, 10_000)) == vocabulary(tokenizer)
        assert path.read_bytes() == whole

    def test_need_not_be_writable(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("CURRIQ_CACHE", str(tmp_path / "file"))
        assert vocabulary(train_tokenizer(TEXTS * 5, 300, 10_000)) == vocabulary(tokenizer)


class TestEncode:
    def test_equals_the_ordinary_call(self, tokenizer: PreTrainedTokenizerBase) -> None:
        texts = TEXTS + HARD
        assert encode(tokenizer, texts) == [
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts
        ]
        assert encode(tokenizer, []) == []

    def test_no_document_can_contain_eos(self, tokenizer: PreTrainedTokenizerBase) -> None:
        text = f"before{EOS}after"
        (ids,) = encode(tokenizer, [text])
        assert eos_id(tokenizer) not in ids
        assert tokenizer.decode(ids) == text

    def test_long_texts_are_whole_and_without_a_warning(
        self, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
    ) -> None:
        tokenizer.model_max_length = 16
        tokenizer.backend_tokenizer.enable_truncation(16)
        tokenizer.backend_tokenizer.enable_padding(length=64)
        with caplog.at_level(logging.DEBUG):
            (long, short) = encode(tokenizer, ["the cat " * 500, "the"])
        assert tokenizer.decode(long) == "the cat " * 500
        assert tokenizer.decode(short) == "the"
        assert caplog.records == []

    def test_adds_no_special_tokens(self, shared_data: Path) -> None:
        llama = load_tokenizer(
            TokenizerConfig(tokenizer=str(shared_data / "stories260k")), LMConfig(), lambda: []
        )
        (ids,) = encode(llama, ["Once upon a time"])
        assert not set(ids) & set(llama.all_special_ids)

    def test_slow_tokenizer(self, tmp_path: Path) -> None:
        from transformers import ByT5Tokenizer

        slow = ByT5Tokenizer()
        assert not slow.is_fast
        # ByT5: each byte plus 3; </s> has id 1.
        assert encode(slow, ["ab", "é</s>"]) == [[100, 101], [b + 3 for b in "é</s>".encode()]]

    def test_ordinary_ids(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert ordinary_ids(tokenizer).tolist() == list(range(1, 300))


class TestLoading:
    def load(self, name: str, model: str = "random:gpt2") -> PreTrainedTokenizerBase:
        config = TokenizerConfig(tokenizer=name, vocab_size=280)
        return load_tokenizer(config, LMConfig(model=model), lambda: TEXTS)

    def test_train_and_auto_for_a_random_model(self) -> None:
        assert vocabulary(self.load("train")) == vocabulary(self.load("auto"))
        assert len(self.load("auto")) == 280

    def test_folder_and_auto_for_a_pretrained_model(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        tokenizer.save_pretrained(tmp_path / "saved")
        folder = str(tmp_path / "saved")
        for loaded in (self.load(folder), self.load("auto", folder)):
            assert vocabulary(loaded) == vocabulary(tokenizer)
            assert encode(loaded, TEXTS + HARD) == encode(tokenizer, TEXTS + HARD)
            assert eos_id(loaded) == 0

    def test_other_tokens_than_a_pretrained_models_own_are_reported(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for folder in ("model", "copy"):
            tokenizer.save_pretrained(tmp_path / folder)
        model = str(tmp_path / "model")
        for quiet in (("auto", model), (str(tmp_path / "copy"), model), ("train", f"random:{model}")):
            self.load(*quiet)
        self.load("train", str(tmp_path / "without a tokenizer"))
        assert not caplog.records
        self.load("train", model)
        assert "--tokenizer train" in caplog.text
        assert f"random:{model}" in caplog.text

    def test_gpt2(self, shared_data: Path) -> None:
        gpt2 = self.load(str(shared_data / "gpt2_tokenizer"))
        assert encode(gpt2, ["Hello world"]) == [[15496, 995]]
        assert eos_id(gpt2) == 50256
        assert len(ordinary_ids(gpt2)) == 50256

    def test_sample_is_not_read_when_nothing_is_trained(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        tokenizer.save_pretrained(tmp_path / "saved")
        load_tokenizer(TokenizerConfig(tokenizer=str(tmp_path / "saved")), LMConfig(), pytest.fail)

    def test_hub_name(self, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def from_pretrained(name: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
            assert not trust_remote_code  # or a hub tokenizer could ask on the terminal, and run its code
            asked.append(name)
            return tokenizer

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
        assert self.load("owner/name") is tokenizer
        assert self.load("auto", model="owner/model") is tokenizer
        assert asked == ["owner/name", "owner/model"]

    def test_without_eos(self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
        bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
        bare.save_pretrained(tmp_path / "bare")
        with pytest.raises(CurriqError, match=r"bare' has no EOS token.*eos_token.*--tokenizer train"):
            self.load(str(tmp_path / "bare"))

    def test_folder_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").write_text("")
        with pytest.raises(
            CurriqError, match=r"--tokenizer '.*missing' is a path, and there is no such folder"
        ):
            self.load(str(tmp_path / "missing"))
        for name in ("empty", "file"):
            with pytest.raises(CurriqError, match=rf"from the folder '.*{name}' .*tokenizer\.json.* train"):
                self.load(str(tmp_path / name))

    def test_damaged_folder(self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text('{"version": ')
        with pytest.raises(CurriqError, match="no tokenizer can be read from the folder"):
            self.load(str(tmp_path))

    def test_hub_that_is_not_reachable(self) -> None:
        with pytest.raises(CurriqError, match=r"hub name 'owner/name' .*HF_HUB_OFFLINE.*local folder"):
            self.load("owner/name")


RUNS = {
    "letters": "x",
    "random letters": "",
    "digits": "7",
    "spaces": " ",
    "line breaks": "\n",
    "punctuation": "=",
    "underscores": "_",
    "ideographs": "語",
}


@pytest.mark.parametrize("kind", RUNS)
def test_long_words_are_cut_in_the_sample_and_nothing_is_lost(kind: str, caplog) -> None:
    rng = random.Random(0)
    run = RUNS[kind] * 100_000 or "".join(rng.choices(string.ascii_lowercase, k=100_000))
    texts = ["an ordinary text\n", f"before {run} after", "x" * MOST_CHARACTERS, run]
    with caplog.at_level(logging.WARNING, "curriq"):
        cut = list(cut_words(texts))
    assert "".join(cut) == "".join(texts)
    assert cut[0] == texts[0]
    assert texts[2] in cut  # just short enough
    words = [word for text in cut for word in re.findall(r"[^\W\d_]+|\d+|\s+|[^\w\s]+|_+", text)]
    assert max(map(len, words)) <= MOST_CHARACTERS
    first, *rest = caplog.messages
    assert "the document that begins with 'before " in first  # named once
    assert rest == ["the tokenizer's sample cuts words of 2 documents in all."]


def test_training_and_encoding_take_time_with_the_length_of_a_word_not_its_square(
    tmp_path, monkeypatch
) -> None:
    """50,000 letters took 16 s, and 5 MB would have taken two days."""
    monkeypatch.setenv("CURRIQ_CACHE", str(tmp_path))
    letters = "".join(random.Random(0).choices(string.ascii_lowercase, k=400_000))
    began = time.process_time()
    tokenizer = train_tokenizer([letters, "y" * 5_000_000], 300, 10_000_000)
    assert time.process_time() - began < 60
    seconds = []
    for size in (100_000, 400_000):
        began = time.process_time()
        (ids,) = encode(tokenizer, [letters[:size]])
        seconds.append(time.process_time() - began)
        assert tokenizer.decode(ids) == letters[:size]
    assert seconds[1] < 10 * max(seconds[0], 0.02)


def test_long_work_says_that_it_goes_on(caplog, monkeypatch) -> None:
    monkeypatch.setattr("curriq.data.waiting.EVERY", 0.02)
    with caplog.at_level(logging.INFO, "curriq"), still_at_work("training the tokenizer"):
        time.sleep(0.2)
    assert len(caplog.messages) > 2
    assert caplog.messages[0] == "training the tokenizer: 0 s so far"
    count = len(caplog.messages)
    time.sleep(0.05)
    assert len(caplog.messages) == count
