"""Writes the text of the streams on which a static score is blind.

    export CURRIQ_DEV_DATA=FOLDER CURRIQ_MADE_DATA=build/streams
    python experiments/streams/make.py                    # seconds; the same bytes every time
    curriq compare experiments/blind.toml
    curriq compare experiments/alike.toml

Each stream of `blind.toml` takes away one thing that a static score of n-grams knows:

copies         Web pages, most of them near copies of a dozen: all are equally target-like.
lookalike      Text drawn from a trigram model of words of Stack Exchange: its vocabulary, word pairs and
               triples are the target's, and it says nothing.
prerequisites  Sums of two numbers, which are what chains of sums are made of. The target is the chains.
pool           A target of sixty pages, which a filter takes many times over.
task           Problems with worked answers as the target, in a stream of other text.

Each of `alike.toml` has two sources of one form, in which no word or pair of words tells right from wrong:

answers        Sums of two numbers, with right answers and with those of other sums.
facts          Who lives where and keeps how many goats, and the same with the facts mixed up.
order          Numbers and the same numbers sorted, or in some other order.

`pool`, `task`, `facts` and `order` are for judging only: nothing is chosen on them.
"""

import argparse
import gzip
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from curriq.rng import derive_seed

VIRAL = 12
"""Pages that are copied."""
COPIES = 400
"""Near copies of each."""
EDITED = 0.03
"""Share of a copy's words that are dropped or doubled."""


def rng(name: str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(0, f"made/{name}"))


def texts(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def near_copies(pages: list[str]) -> list[str]:
    """The pages, the first of them `COPIES` times more, each copy with other edits and another beginning."""
    draw = rng("copies")
    found = list(pages)
    for page in pages[:VIRAL]:
        words = page.split(" ")
        for _ in range(COPIES):
            kept = words[draw.integers(0, max(1, len(words) // 5)) :]
            kind = draw.random(len(kept))
            times = np.where(kind < EDITED / 2, 0, np.where(kind > 1 - EDITED / 2, 2, 1))
            found.append(" ".join(np.repeat(np.array(kept, dtype=object), times)))
    return [found[i] for i in draw.permutation(len(found))]


def trigram_text(documents: list[str], words: int) -> list[str]:
    """As many words drawn from the trigrams of the documents, in texts of the documents' lengths.

    Some of the documents will be held out, so this text is a little more like the test set than noise of that
    kind would be; that helps the arms that train on it.
    """
    draw = rng("lookalike")
    following: dict[tuple[str, str], list[str]] = defaultdict(list)
    lengths = []
    for document in documents:
        parts = document.split(" ")
        lengths.append(len(parts))
        for first, second, third in zip(parts, parts[1:], parts[2:], strict=False):
            following[first, second].append(third)
    pairs = list(following)
    made, total = [], 0
    while total < words:
        text = list(pairs[draw.integers(len(pairs))])
        length = max(16, lengths[draw.integers(len(lengths))])
        while len(text) < length:
            # Another context now and then, or long passages of the documents would be repeated word for word.
            pair = (text[-2], text[-1])
            if pair not in following or (len(set(following[pair])) == 1 and draw.random() < 0.5):
                text += pairs[draw.integers(len(pairs))]
            else:
                options = following[pair]
                text.append(options[draw.integers(len(options))])
        made.append(" ".join(text))
        total += len(text)
    return made


def sums(documents: int) -> list[str]:
    """Lists of sums of two numbers below 100."""
    draw = rng("sums")
    return [
        " ".join(f"{a} + {b} = {a + b} ;" for a, b in draw.integers(0, 100, (60, 2)).tolist())
        for _ in range(documents)
    ]


def chains(documents: int) -> list[str]:
    """Lists of chains of four numbers below 60, added up one after another: each step is a sum of two."""
    draw = rng("chains")
    made = []
    for _ in range(documents):
        lines = []
        for a, b, c, d in draw.integers(0, 60, (20, 4)).tolist():
            lines.append(f"{a} + {b} + {c} + {d} : {a} + {b} = {a + b} , {a + b} + {c} = {a + b + c} , "
                         f"{a + b + c} + {d} = {a + b + c + d} .")  # fmt: skip
        made.append(" ".join(lines))
    return made


def wrong_sums(documents: int) -> list[str]:
    """As `sums`, with answers that are drawn."""
    draw = rng("wrong")
    return [
        " ".join(f"{a} + {b} = {c} ;" for a, b, c in draw.integers(0, 198, (60, 3)).tolist())
        for _ in range(documents)
    ]


PAIRED = {"target": 160, "right": 3000, "wrong": 3000}
"""Documents of each stream of `alike.toml`, by what they are."""


def answers(kind: str) -> list[str]:
    """Sums of two numbers below 100; wrong ones have the answers of others."""
    draw = rng(f"answers/{kind}")
    made = []
    for _ in range(PAIRED[kind]):
        terms = draw.integers(0, 100, (60, 2))
        total = terms.sum(1)
        if kind == "wrong":
            total = draw.permutation(total)
        made.append(" ".join(f"{a} + {b} = {c} ;" for (a, b), c in zip(terms.tolist(), total, strict=True)))
    return made


def facts(kind: str) -> list[str]:
    """Where each of three hundred people lives and how many goats they keep; wrong: what others do."""
    of_all, draw = rng("facts"), rng(f"facts/{kind}")
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(of_all.choice(syllables, 3)).capitalize() for _ in range(360)]
    people, places = words[:300], words[300:]
    home, goats = of_all.integers(0, len(places), 300), of_all.integers(2, 100, 300)
    made = []
    for _ in range(PAIRED[kind]):
        who = draw.integers(0, len(people), 30)
        where, many = (draw.permutation(who), draw.permutation(who)) if kind == "wrong" else (who, who)
        made.append(" ".join(f"{people[p]} lives in {places[home[q]]} and keeps {goats[r]} goats ."
                             for p, q, r in zip(who, where, many, strict=True)))  # fmt: skip
    return made


def order(kind: str) -> list[str]:
    """Five numbers below 100 and the same sorted; wrong ones are in an order that is drawn."""
    draw = rng(f"order/{kind}")
    made = []
    for _ in range(PAIRED[kind]):
        lists = draw.integers(0, 100, (30, 5))
        then = draw.permuted(lists, axis=1) if kind == "wrong" else np.sort(lists, axis=1)
        made.append(" ".join(f"{' '.join(map(str, a))} : {' '.join(map(str, b))} ;"
                             for a, b in zip(lists.tolist(), then.tolist(), strict=True)))  # fmt: skip
    return made


def write(path: Path, documents: Iterable[str]) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CURRIQ_DEV_DATA", "data")))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("CURRIQ_MADE_DATA", "build/streams")))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pages = texts(options.data / "c4_sample" / "train.jsonl.gz")
    exchange = texts(options.data / "redpajama_domains" / "stackexchange.jsonl.gz")
    with gzip.open(options.data / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    made = {
        "copies": near_copies(pages),
        "lookalike": trigram_text(exchange, 900_000),
        "sums": sums(900),
        "chains": chains(900),
        "wrong_sums": wrong_sums(900),
        "pool": texts(options.data / "openwebtext_sample" / "train.jsonl.gz")[:60],
        **{f"{make.__name__}_{kind}": make(kind) for make in (answers, facts, order) for kind in PAIRED},
        "task": [f"Question: {p['question']}\nAnswer: {p['answer']}" for p in problems],
    }
    for name, documents in made.items():
        write(options.out / f"{name}.jsonl.gz", documents)
        characters = sum(map(len, documents))
        print(f"{options.out / name}.jsonl.gz: {len(documents)} documents, {characters:,} characters")


if __name__ == "__main__":
    main()
