"""Documents, and sources in memory."""

import pytest

from curriq.data.documents import (
    Document,
    DocumentSource,
    MemorySource,
    document_key,
    read_epoch,
)
from curriq.errors import CurriqError


def texts_of(source: DocumentSource) -> list[str]:
    return [document.text for document in read_epoch(source)]


class TestMemorySource:
    def test_every_epoch_is_another_complete_permutation(self) -> None:
        documents = [Document(str(i)) for i in range(50)]
        source = MemorySource("mine", documents, seed=0)
        epochs = [texts_of(source) for _ in range(4)]
        assert source.epoch == 4
        assert all(sorted(epoch, key=int) == [str(i) for i in range(50)] for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4

    def test_order_depends_on_seed_and_name(self) -> None:
        documents = [Document(str(i)) for i in range(50)]
        orders = [texts_of(MemorySource(n, documents, s)) for n, s in (("a", 0), ("a", 1), ("b", 0))]
        assert orders[0] == texts_of(MemorySource("a", documents, 0))
        assert orders[0] != orders[1] != orders[2] != orders[0]

    def test_fingerprint_is_of_the_content(self) -> None:
        one, other = [Document("a b"), Document("c")], [Document("a  b"), Document("c")]
        prints = {MemorySource("m", d, 0, v).fingerprint() for d in (one, other) for v in ("1", "2")}
        assert len(prints) == 4
        assert MemorySource("other", one, 9, "1").fingerprint() in prints

    def test_no_documents(self) -> None:
        with pytest.raises(CurriqError, match="'mine' holds no document"):
            MemorySource("mine", [], 0)


class TestDocument:
    def test_key_ignores_white_space_alone(self) -> None:
        assert Document("a  b\n c ").key == Document("a b c").key == document_key("\ta b\nc")
        assert Document("a b c").key != Document("a b C").key
        assert len(Document("").key) == 16

    def test_corrupted_copy_can_keep_the_key(self) -> None:
        assert Document("c1ean", key=Document("clean").key).key == Document("clean").key

    def test_number_is_a_63_bit_identity_of_the_key(self) -> None:
        numbers = [Document(str(i)).number for i in range(2000)]
        assert len(set(numbers)) == 2000
        assert all(0 <= number < 2**63 for number in numbers)
        assert Document("c1ean", key=Document("clean").key).number == Document("clean").number
        assert Document("x", key="a key of the user's own").number >= 0
