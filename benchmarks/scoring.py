"""How fast `curriq select` scores a corpus: MB per minute and core, and where the time goes.

    python benchmarks/scoring.py                      # embedded prose and code, repeated to 16 and 64 MB
    python benchmarks/scoring.py --files data/*.jsonl.gz --text-field content

One process, one thread, seconds of its processor: reading, parsing, tokenising and scoring are timed apart
and together, with a tokenizer trained here. Repeated text has no new words for the table of words to learn,
so give files of your own for a figure that holds for them.
"""

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from pathlib import Path

from curriq.config import SourceConfig
from curriq.curate.build import build_target
from curriq.curate.documents import Cutter, Worker, parse
from curriq.curate.inputs import CorpusSource, Inputs, open_inputs, read_chunks
from curriq.curate.pool import one_thread
from curriq.data.documents import Document
from curriq.data.embedded import embedded_documents
from curriq.data.ngrams import NgramCounts
from curriq.data.tokenizer import encode, train_tokenizer
from curriq.select.documents import NgramScorer

WINDOW = 128


def write_corpus(path: Path, size: int) -> None:
    """Embedded prose and code, repeated to so many bytes, with a number that makes each text new."""
    texts = [document.text for kind in ("prose", "code") for document in embedded_documents(kind)]
    written, count = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            line = json.dumps({"text": f"{texts[count % len(texts)]} {count}", "number": count}) + "\n"
            file.write(line)
            written += len(line)
            count += 1


def seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(name: str, inputs: Inputs, vocabulary: int, profile: bool) -> None:
    """Print the speed on some files."""
    config = inputs.config(0)
    chunks = []
    reading = seconds(lambda: chunks.extend(read_chunks(inputs)))
    size = sum(chunk.characters for chunk in chunks) / 1e6
    parsed: list[list[Document]] = []
    parsing = seconds(
        lambda: parsed.extend(
            parse(chunk, inputs.files[chunk.file].path, config).documents for chunk in chunks
        )
    )
    texts = [document.text for documents in parsed for document in documents]
    tokenizer = train_tokenizer(texts, vocabulary, 4_000_000)
    library = seconds(lambda: encode(tokenizer, texts[: max(1, len(texts) // 8)]))
    share = sum(map(len, texts[: max(1, len(texts) // 8)])) / sum(map(len, texts))
    cutter, cuts = Cutter(tokenizer, WINDOW), []
    tokenising = seconds(lambda: cuts.extend(cutter(documents)[1] for documents in parsed))
    target = build_target("target", parsed[0], tokenizer, WINDOW)
    counts = target.counts + NgramCounts.of(cuts[0], of_target=False)
    scorer = NgramScorer(counts)
    scoring = seconds(lambda: [scorer(cut) for cut in cuts])
    worker = Worker(inputs, tokenizer, WINDOW, dsir=scorer)
    together = seconds(lambda: [worker.score(chunk) for chunk in read_chunks(inputs)])
    parts = {"reading": reading, "parsing": parsing, "tokenising": tokenising, "scoring": scoring}
    total = sum(parts.values())
    split = ", ".join(f"{part} {spent / total:.0%}" for part, spent in parts.items())
    print(
        f"{name:<24} {size:7.1f} MB  {60 * size / together:7.0f} MB/min and core  ({split}; the library's "
        f"tokenising alone {60 * size * share / library:.0f} MB/min)"
    )
    if profile:
        profiler = cProfile.Profile()
        fresh = Worker(inputs, tokenizer, WINDOW, dsir=scorer)
        profiler.runcall(lambda: [fresh.score(chunk) for chunk in read_chunks(inputs)])
        pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64], help="MB of the embedded corpora")
    parser.add_argument("--files", nargs="+", default=[], help="files of your own, in place of these")
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--profile", action="store_true", help="print where the time goes, by function")
    options = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        for size in () if options.files else options.sizes:
            path = Path(folder, f"{size}.jsonl")
            write_corpus(path, size * 1_000_000)
            source = CorpusSource(SourceConfig(name="corpus", path=str(path)))
            measure(f"embedded, {size} MB", open_inputs([source]), options.vocab_size, options.profile)
        for name in options.files:
            source = CorpusSource(SourceConfig(name=name, path=name, text_field=options.text_field))
            measure(Path(name).name, open_inputs([source]), options.vocab_size, options.profile)


if __name__ == "__main__":
    main()
