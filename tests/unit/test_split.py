"""The split by document hash, near-duplicate search against brute force, and the filter of the stream."""

import hashlib
import itertools
import logging
import re
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curriq.config import DataConfig, SourceConfig
from curriq.data.contamination import ContaminationFilter, NearDuplicateIndex, SplitRule, shingles
from curriq.data.documents import Document, MemorySource
from curriq.data.split import LEAST_WINDOWS, build_held_out, fitted_sizes
from curriq.errors import CurriqError
from curriq.types import Windows

VOCABULARY = [f"w{i}" for i in range(400)]
FAMILIES = 200
FAMILY_WORDS = [f"f{family}w{i}" for family in range(FAMILIES) for i in range(40)]
SIZES = {"reward": 6, "validation": 3, "test": 6}


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<eos>", "<unk>", *VOCABULARY, *FAMILY_WORDS])}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", unk_token="<unk>")


def corpus(seed=0, documents=FAMILIES):
    """Random documents whose words tell their family; every second one has a twin with another first word,
    at a Jaccard similarity of (n − 5)/(n − 3) for n words."""
    rng = np.random.default_rng(seed)
    texts = []
    for family in range(documents):
        words = [f"f{family % FAMILIES}w{i}" for i in range(rng.integers(8, 40))]
        texts.append(" ".join(words))
        if family % 2:
            texts.append(" ".join([VOCABULARY[family % 400], *words[1:]]))
    return [Document(text) for text in texts]


def family_of(document):
    return int(re.search(r"f(\d+)w", document.text)[1])


def data_config(**changes):
    settings = {
        "sources": (SourceConfig(name="web", path="unused"),),
        "target": "web",
        "window": 8,
        "held_out_share": 0.5,
        "reward_set_size": SIZES["reward"],
        "validation_set_size": SIZES["validation"],
        "test_set_size": SIZES["test"],
    }
    return DataConfig(**(settings | changes))


def jaccard(left, right):
    """By definition, over sets of word 5-tuples; a shorter text is one tuple."""
    grams = []
    for text in (left, right):
        words = re.findall(r"\w+", text.lower())
        grams.append({tuple(words[i : i + 5]) for i in range(max(len(words) - 4, min(len(words), 1)))})
    union = grams[0] | grams[1]
    return len(grams[0] & grams[1]) / len(union) if union else 0.0


# near-duplicate search


def test_shingles_ignore_case_and_punctuation_but_not_order():
    text = "One two, three four five six."
    np.testing.assert_array_equal(shingles(text), shingles("one TWO three; four five -- six"))
    assert len(shingles(text)) == 2
    np.testing.assert_array_equal(shingles("only four words here"), shingles("Only four, words here!"))
    assert not np.intersect1d(shingles(text), shingles("six five four three two one")).size
    assert len(shingles("only four words here")) == 1, "a short text is one shingle"
    assert not np.intersect1d(shingles("only four words here"), shingles("only four words there")).size
    assert len(shingles(" .,;")) == 0


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=14), min_size=1, max_size=14),
    st.lists(st.sampled_from("abc"), max_size=14),
    st.sampled_from([0.05, 0.25, 1 / 3, 0.5, 0.6, 0.75, 0.999, 1.0]),
    st.booleans(),
)
def test_index_finds_exactly_the_pairs_that_brute_force_finds(texts, query, threshold, compact):
    index = NearDuplicateIndex(threshold)
    for number, words in enumerate(texts):
        assert index.add(shingles(" ".join(words))) == number
    if compact:
        index.compact()
    found = index.matches(shingles(" ".join(query)))
    similarities = [jaccard(" ".join(words), " ".join(query)) for words in texts]
    expected = [i for i, similarity in enumerate(similarities) if similarity >= threshold]
    assert found.tolist() == expected, "texts of fewer shingles than count as contained"


@settings(deadline=None, max_examples=60)
@given(
    st.integers(12, 40),
    st.lists(st.integers(0, 200), max_size=3),
    st.integers(0, 60),
    st.integers(0, 60),
    st.sampled_from([0.3, 0.6, 0.9]),
)
def test_index_finds_a_copy_inside_a_longer_text(length, edited, before, after, threshold):
    """Against the rule: 2t/(1 + t) of the shingles of a passage, whose words nothing else has."""
    passage = [f"p{i}" for i in range(length + 4)]
    copy = list(passage)
    for place in edited:
        copy[place % len(copy)] = "edited"
    text = [*(f"b{i}" for i in range(before)), *copy, *(f"a{i}" for i in range(after))]
    intact = sum(copy[i : i + 5] == passage[i : i + 5] for i in range(length))
    similarity = intact / (length + max(1, len(text) - 4) - intact)
    index = NearDuplicateIndex(threshold)
    index.add(shingles(" ".join(passage)))
    expected = intact >= 2 * threshold / (1 + threshold) * length or similarity >= threshold
    assert (len(index.matches(shingles(" ".join(text)))) == 1) == expected


def test_scattered_shingles_are_no_copy():
    passage = [f"w{i}" for i in range(60)]
    index = NearDuplicateIndex(0.6)
    index.add(shingles(" ".join(passage)))
    filler = [f"x{i}" for i in range(200)]
    scattered = [word for i in range(0, 60, 6) for word in (*passage[i : i + 10], *filler)]
    assert np.isin(shingles(" ".join(passage)), shingles(" ".join(scattered))).mean() > 0.9
    assert len(index.matches(shingles(" ".join(scattered)))) == 0
    assert len(index.matches(shingles(" ".join([*scattered, *passage])))) == 1


LANGUAGES = {
    "English": "All human beings are born free and equal in dignity and rights. They are endowed with reason "
    "and conscience and should act towards one another in a spirit of brotherhood, and everyone is entitled "
    "to all the rights and freedoms set forth here, without distinction of any kind, such as race or colour.",
    "Chinese": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。"
    "人人有资格享有本宣言所载的一切权利和自由。",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。"
    "人間は、理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. "
    "인간은 천부적으로 이성과 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다.",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ "
    "ต่างมีเหตุผลและมโนธรรม และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ",
    "Lao": "ມະນຸດເກີດມາມີສິດເສລີພາບ ແລະ ສະເໝີໜ້າກັນໃນທາງກຽດຕິສັກ ແລະ ທາງສິດດ້ວຍມະນຸດມີສະຕິສຳປັດຊັນຍະ ແລະຕ້ອງປະພຶດຕໍ່ກັນໃນທາງພີ່ນ້ອງ",
    "Khmer": "មនុស្សទាំងអស់កើតមកមានសេរីភាពនិងសមភាពក្នុងផ្នែកសេចក្ដីថ្លៃថ្នូរនិងសិទ្ធិ មនុស្សមានវិចារណញ្ញាណនិងសតិសម្បជញ្ញៈជាប់ពីកំណើត",
    "Burmese": "လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် လည်းကောင်း၊ တူညီလွတ်လပ်သော အခွင့်အရေးများဖြင့် လည်းကောင်း၊ မွေးဖွားလာသူများ ဖြစ်သည်",
    "Yi": "ꊿꂷꃅꄿꐨꐥ,ꌅꅍꀂꏽꐯꒈꃅꐥꌐ。ꊿꊇꉪꍆꌋꆀꁨꉌꑌꐥ,ꄷꀋꁨꂛꊨꅫꃀꃅꐥꄡꑟ。"
    "ꑠꆹꏦꃤꇬꄉꀧꋭꌠꌅꅍꉬꇩꏤꈀꐥꌠ。",
    "Javanese": "ꦱꦧꦼꦤ꧀ꦮꦺꦴꦁꦏꦭꦲꦶꦂꦫꦏꦺꦏꦤ꧀ꦛꦶꦩꦂꦢꦶꦏꦭꦤ꧀ꦢꦂꦧꦺꦩꦂꦠꦧꦠ꧀ꦭꦤ꧀ꦲꦏ꧀ꦲꦏ꧀ꦏꦁꦥꦝꦏꦧꦺꦃ",
    "mixed": "The model GPT は人間の言語を学習する機械であり、Python で書かれたプログラムから "
    "free software として誰でも利用することができる。",
}
"""Article 1 of the Universal Declaration of Human Rights, mostly."""


@pytest.mark.parametrize("language", LANGUAGES)
class TestLanguages:
    def edited(self, text: str, rng: np.random.Generator) -> str:
        """The text with two other characters, as far from each other as they happen to be."""
        characters = list(text)
        for place in rng.choice(len(text), 2, replace=False):
            characters[place] = "Ω"
        return "".join(characters)

    def test_copies_with_two_other_characters_are_found(self, language: str) -> None:
        text, rng = LANGUAGES[language], np.random.default_rng(0)
        index = NearDuplicateIndex(0.6)
        index.add(shingles(text))
        around = " ".join(other for name, other in LANGUAGES.items() if name != language) * 3
        for _ in range(100):
            copy = self.edited(text, rng)
            assert len(index.matches(shingles(copy))) == 1
            assert len(index.matches(shingles(f"{around} {copy} {around}"))) == 1

    def test_other_texts_are_not(self, language: str) -> None:
        index = NearDuplicateIndex(0.6)
        index.add(shingles(LANGUAGES[language]))
        others = [other for name, other in LANGUAGES.items() if name != language]
        assert not any(len(index.matches(shingles(other))) for other in others)
        # The same characters in another order, as texts of one language have them.
        text = LANGUAGES[language]
        units = text.split(" ") if language == "English" else list(text)
        shuffled = ["".join(np.random.default_rng(i).permutation(units)) for i in range(20)]
        assert not any(len(index.matches(shingles(other))) for other in shuffled)


def test_words_beside_characters_keep_their_shingles():
    english = "one two three four five six seven"
    both = shingles(f"人人生而自由 {english}")
    assert np.isin(shingles(english), both).all()
    assert np.isin(shingles("人人生而自由"), both).all()


# the rule


def test_sides_have_the_asked_proportions():
    rule = SplitRule(0.3, {"reward": 20, "validation": 10, "test": 20})
    sides = [rule.side(Document(f"document {i}")) for i in range(6_000)]
    for side, share in {"train": 0.7, "reward": 0.12, "validation": 0.06, "test": 0.12}.items():
        assert sides.count(side) / 6_000 == pytest.approx(share, abs=5 * np.sqrt(share / 6_000))


@given(st.text(min_size=1), st.floats(0.01, 0.98), st.floats(0.001, 0.02))
def test_a_greater_share_holds_out_more_and_sizes_do_not_move_the_border(text, share, more):
    document = Document(text)
    small, large = SplitRule(share, SIZES), SplitRule(share + more, SIZES)
    other_sizes = SplitRule(share, {"reward": 1, "validation": 900, "test": 7})
    if small.side(document) != "train":
        assert large.side(document) != "train"
    assert (small.side(document) == "train") == (other_sizes.side(document) == "train")


def test_split_seed_0_is_the_split_from_before_the_setting():
    """Position of a key by the published hash, with its salt alone."""
    rule = SplitRule(0.3, SIZES)
    for document in (Document(f"document {i}") for i in range(300)):
        digest = hashlib.blake2b(document.key.encode(), digest_size=8, salt=b"curriq-split-1").digest()
        assert (rule.side(document) == "train") == (int.from_bytes(digest, "big") >= 0.3 * 2**64)


def test_splits_of_two_seeds_are_independent():
    """A share of 0.3 is held out by each, and 0.09 of all documents by both."""
    documents = [Document(f"document {i}") for i in range(6_000)]
    rules = [SplitRule(0.3, SIZES, seed) for seed in (1, 2**40)]
    held_out = [[rule.side(document) != "train" for document in documents] for rule in rules]
    both = [all(pair) for pair in zip(*held_out, strict=True)]
    for share, found in ((0.3, held_out[0]), (0.3, held_out[1]), (0.09, both)):
        assert sum(found) / 6_000 == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / 6_000))


# held-out sets


def families(windows, tokenizer):
    """Families of documents that a set of windows has words of."""
    return {
        int(family) for family in re.findall(r"f(\d+)w", " ".join(tokenizer.batch_decode(windows.tokens)))
    }


@settings(deadline=None, max_examples=15)
@given(st.floats(0.3, 0.8), st.sampled_from([0.3, 0.6, 0.9, 1.0]), st.integers(0, 3))
def test_documents_and_their_near_duplicates_are_on_one_side(tokenizer, share, threshold, seed):
    documents = corpus(seed)
    twins = {}
    for document in documents:
        twins.setdefault(family_of(document), []).append(document)
    config = data_config(held_out_share=share, near_duplicate_threshold=threshold)
    sets, contamination = build_held_out(MemorySource("web", documents, 0), tokenizer, config)
    assert {name: len(getattr(sets, name)) for name in SIZES} == SIZES

    sides = {name: families(getattr(sets, name), tokenizer) for name in SIZES}
    training = [document for document in documents if contamination.allows(document, of_target=True)]
    sides["train"] = {family_of(document) for document in training}
    assert sides["train"]
    assert all(SplitRule(share, SIZES).side(document) == "train" for document in training)
    for left, right in itertools.combinations(sides, 2):
        for family in sides[left] & sides[right]:
            first, second = twins[family]  # a document alone cannot be on two sides
            assert jaccard(first.text, second.text) < threshold


def test_the_filter_applies_to_other_sources_and_leaves_them_their_own_documents(tokenizer):
    documents = corpus()
    sets, contamination = build_held_out(MemorySource("web", documents, 0), tokenizer, data_config())
    used = families(Windows.cat([sets.reward, sets.validation, sets.test]), tokenizer)
    held_out = next(d for d in documents if not contamination.allows(d) and family_of(d) in used)
    words = held_out.text.split()
    assert not contamination.allows(Document("  \n".join(words)))
    similar = [*words, "w1"] if len(words) > 12 else words
    assert not contamination.allows(Document(" ".join(similar)))
    assert contamination.allows(Document(" ".join(reversed(words))))

    rule = SplitRule(0.5, SIZES)
    foreign = [Document(f"w1 w2 w3 w4 w5 w6 {i}") for i in range(40)]
    assert all(contamination.allows(document) for document in foreign)
    allowed = [contamination.allows(document, of_target=True) for document in foreign]
    assert allowed == [rule.side(document) == "train" for document in foreign]


def test_a_document_between_two_sets_is_left_out():
    contamination = ContaminationFilter(SplitRule(0.999999, SIZES), 0.3)
    words = [f"x{i}" for i in range(30)]
    left, right, bridge = words[:16], words[14:], words
    contamination.add(Document(" ".join(left)), "reward")
    contamination.add(Document(" ".join(right)), "test")
    assert contamination.place(Document(" ".join(left[:-1]))) == "reward"
    assert contamination.place(Document(" ".join(right[:-1]))) == "test"
    assert contamination.place(Document(" ".join(bridge))) is None
    assert not contamination.allows(Document(" ".join(bridge)))


def test_the_sets_do_not_depend_on_other_sources_and_are_disjoint(tokenizer):
    documents = corpus()
    first, _ = build_held_out(MemorySource("web", documents, 0), tokenizer, data_config())
    more = (SourceConfig(name="web", path="unused"), SourceConfig(name="more", path="unused"))
    second, _ = build_held_out(MemorySource("web", documents, 0), tokenizer, data_config(sources=more))
    windows = [tuple(row) for name in SIZES for row in getattr(first, name).tokens.tolist()]
    assert len(set(windows)) == sum(SIZES.values())
    for name in SIZES:
        assert torch.equal(getattr(first, name).tokens, getattr(second, name).tokens)
        assert torch.equal(getattr(first, name).ids, getattr(second, name).ids)


def test_sets_are_spread_over_documents(tokenizer):
    """One document of 40 words would fill four windows and more of a set."""
    documents = [Document(" ".join(f"f{family}w{i}" for i in range(40))) for family in range(FAMILIES)]
    sets, _ = build_held_out(MemorySource("web", documents, 0), tokenizer, data_config())
    assert all(len(families(getattr(sets, name), tokenizer)) >= size for name, size in SIZES.items())


def test_the_sets_are_spread_over_a_source_that_is_sorted(tokenizer):
    """Families come in the order of their numbers. The beginning alone would fill all sets."""

    class Sorted(MemorySource):
        def next_document(self) -> Document | None:
            return next(self.in_order, None)

    documents = [Document(" ".join(f"f{family}w{i}" for i in range(40))) for family in range(FAMILIES)]
    source = Sorted("web", documents, 0)
    source.in_order = iter(documents)
    sets, _ = build_held_out(source, tokenizer, data_config())
    found = set.union(*(families(getattr(sets, name), tokenizer) for name in SIZES))
    assert sum(family > FAMILIES / 2 for family in found) >= 4


def test_the_reference_is_all_text_of_the_reward_sets_documents(tokenizer):
    """Laid end to end it is whole documents, the last one cut; the reward set is a part of it."""
    documents = corpus()
    sets, _ = build_held_out(MemorySource("web", documents, 0), tokenizer, data_config())
    reference = sets.reference
    assert len(reference) > SIZES["reward"]
    rows = [tuple(row) for row in reference.tokens.tolist()]
    places = [rows.index(tuple(row)) for row in sets.reward.tokens.tolist()]
    assert places == sorted(places)
    assert torch.equal(reference.document[places], sets.reward.document)
    words = tokenizer.convert_ids_to_tokens(reference.tokens.flatten().tolist())
    *whole, cut = (text.strip() for text in " ".join(words).split("<eos>"))
    number = {document.text: document.number for document in documents}
    assert set(whole) <= set(number)
    ours = {number[text] for text in whole} | {n for text, n in number.items() if text.startswith(cut)}
    assert set(reference.document.tolist()) <= ours
    for name in ("validation", "test"):
        assert not set(reference.document.tolist()) & set(getattr(sets, name).document.tolist())


def test_topic_coherent_sets_hold_whole_documents_apart(tokenizer):
    config = data_config(
        topic_coherent=True, topic_pool_size=60, topic_encoder="hashing", topic_temperature=0.05
    )
    documents = corpus(documents=200)
    sets, _ = build_held_out(MemorySource("web", documents, 0), tokenizer, config)
    assert {name: len(getattr(sets, name)) for name in SIZES} == SIZES
    assert torch.equal(sets.reference.tokens, sets.reward.tokens)  # the rest is of other topics
    found = [families(getattr(sets, name), tokenizer) for name in SIZES]
    twins = {family_of(documents[i]) for i in range(1, len(documents))
             if family_of(documents[i]) == family_of(documents[i - 1])}  # fmt: skip
    assert all(not (left & right) - twins for left, right in itertools.combinations(found, 2))


def test_too_small_a_corpus_is_an_error_with_numbers_and_fixes(tokenizer):
    documents = corpus(documents=20)
    with pytest.raises(CurriqError) as caught:
        build_held_out(MemorySource("web", documents, 0), tokenizer, data_config(test_set_size=5000))
    message = str(caught.value)
    assert re.search(r"test 5000 \(available \d+\)", message)
    for fix in ("--test-set-size", "--reward-set-size", "--held-out-share = 0.5", "--window", "'web'"):
        assert fix in message


def test_a_huge_target_is_read_no_further_than_needed(tokenizer):
    documents = [Document(f"{d.text} {i}") for i in range(20) for d in corpus()]
    source = MemorySource("web", documents, 0)
    build_held_out(source, tokenizer, data_config())
    assert source.state_dict()["position"] < 2000


class TestFittedSizes:
    SIZES: ClassVar = {"reward": 128, "validation": 64, "test": 128}

    def test_what_fits_is_as_asked_for(self):
        assert fitted_sizes(self.SIZES, {"reward": 200, "validation": 64, "test": 128}) == self.SIZES

    def test_all_shrink_in_one_proportion(self):
        fitted = fitted_sizes(self.SIZES, {"reward": 120, "validation": 48, "test": 99})
        assert fitted == {"reward": 96, "validation": 48, "test": 96}

    def test_there_is_a_least(self):
        available = {"reward": 40, "validation": LEAST_WINDOWS, "test": 40}
        assert fitted_sizes(self.SIZES, available) == {"reward": 32, "validation": 16, "test": 32}
        assert fitted_sizes(self.SIZES, available | {"validation": 15}) is None

    def test_sizes_below_the_least_stay_whole(self):
        assert fitted_sizes({"reward": 8, "validation": 8, "test": 8}, dict.fromkeys(self.SIZES, 7)) is None

    @given(
        st.lists(st.integers(16, 500), min_size=3, max_size=3),
        st.lists(st.integers(0, 500), min_size=3, max_size=3),
    )
    def test_never_more_than_there_is(self, sizes: list[int], available: list[int]):
        names = ("reward", "validation", "test")
        there = dict(zip(names, available, strict=True))
        fitted = fitted_sizes(dict(zip(names, sizes, strict=True)), there)
        if fitted is not None:
            assert all(LEAST_WINDOWS <= fitted[name] <= there[name] for name in names)

    def test_a_small_target_gets_smaller_sets(self, tokenizer, caplog):
        """The documents of each side are those of the sizes asked for; the log says what was taken."""
        asked = {"reward_set_size": 128, "validation_set_size": 64, "test_set_size": 128}
        documents = corpus(documents=150)
        with caplog.at_level(logging.INFO, "curriq"):
            sets, contamination = build_held_out(
                MemorySource("web", documents, 0), tokenizer, data_config(**asked)
            )
        lengths = {name: len(getattr(sets, name)) for name in SIZES}
        assert lengths["validation"] < 64
        assert lengths["reward"] == lengths["test"]
        assert abs(lengths["reward"] - 2 * lengths["validation"]) <= 1
        assert f"reward {lengths['reward']} of 128" in caplog.text
        rule = SplitRule(0.5, {"reward": 128, "validation": 64, "test": 128})
        assert [contamination.rule.side(d) for d in documents] == [rule.side(d) for d in documents]

    def test_sizes_that_are_meant_exactly(self, tokenizer):
        config = data_config(
            reward_set_size=128, validation_set_size=64, test_set_size=128, held_out_sizes="exact"
        )
        with pytest.raises(CurriqError, match="larger than the held-out documents"):
            build_held_out(MemorySource("web", corpus(documents=150), 0), tokenizer, config)
