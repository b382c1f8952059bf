"""Does a corpus filtered with `curriq select` train better than as many tokens of random documents of it?

    python experiments/selected.py                  # minutes on one core; a stopped call is continued

Each seed makes a corpus of its own: the dirty stream (prose among code and four kinds of corruption) as
documents in one file without labels. A quarter of the prose is the target of `curriq select`, which never
enters the corpus; another quarter, which neither the corpus nor the selection has seen, holds the validation
and the test set. Three models train on equally many tokens, plainly (uniform, preset `small`): on what
`curriq select` keeps, on random documents, and on the clean prose of the corpus, which no filter can know
(the oracle). All read with one tokenizer.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np

import curriq
from curriq.config import SourceConfig
from curriq.data.corruption import corrupt_text, corrupt_tokens
from curriq.data.documents import Document
from curriq.data.embedded import embedded_documents
from curriq.data.tokenizer import encode, ordinary_ids, train_tokenizer
from curriq.evaluate.statistics import WindowChanges, summarise_differences
from curriq.runlog.read import read_summary, read_test_losses

CHARACTERS = 4_000_000
"""Of a corpus."""
MIX = {
    "prose": ("prose", "none", 0.2),
    "code": ("code", "none", 0.3),
    "random": ("prose", "random-tokens", 0.15),
    "shuffled": ("prose", "shuffled-tokens", 0.15),
    "ocr": ("prose", "ocr", 0.1),
    "duplicates": ("code", "duplicates", 0.1),
}
"""Name → embedded text, corruption and share of the characters, as in experiments/streams/dirty.toml."""
KEEP = 0.2
STEPS = 300
ARMS = ("selected", "random", "oracle")


def split_prose(seed: int) -> list[list[Document]]:
    """Half of the prose for the corpus, a quarter as target, a quarter to measure on."""
    documents = embedded_documents("prose")
    order = np.random.default_rng(seed).permutation(len(documents))
    half, quarter = len(order) // 2, len(order) // 4
    cuts = (order[:half], order[half : half + quarter], order[half + quarter :])
    return [[documents[i] for i in part] for part in cuts]


def corpus_rows(prose: list[Document], tokenizer, rng: np.random.Generator) -> Iterator[dict[str, str]]:
    """Rows of a corpus; `kind` says what each is, which nobody is told."""
    code = embedded_documents("code")
    vocabulary = ordinary_ids(tokenizer)
    for name, (text, corruption, share) in MIX.items():
        documents = prose if text == "prose" else [code[i] for i in rng.permutation(len(code))]
        if corruption == "duplicates":
            documents = documents[:20]
        written = 0
        for document in cycle(documents):
            if written >= share * CHARACTERS:
                break
            noisy = corrupt_text(corruption, document.text, rng)
            ids = corrupt_tokens(corruption, encode(tokenizer, [noisy])[0], vocabulary, rng)
            noisy = tokenizer.decode(ids) if corruption.endswith("tokens") else noisy
            written += len(noisy)
            yield {"text": noisy, "kind": name}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def within(rows: list[dict[str, str]], budget: int, tokenizer) -> list[dict[str, str]]:
    """The first rows, up to so many tokens."""
    sizes = np.cumsum([len(ids) for ids in encode(tokenizer, [row["text"] for row in rows])])
    return rows[: int(np.searchsorted(sizes, budget, side="right"))]


def prepare(folder: Path, seed: int) -> None:
    """The files of a seed: tokenizer, corpus, target, held-out text and the three sets to train on."""
    done = folder / "ready"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1000 + seed)
    prose, target, held_out = split_prose(seed)
    texts = [
        document.text for pair in zip(target, embedded_documents("code"), strict=False) for document in pair
    ]
    tokenizer = train_tokenizer(texts, 1024, 4_000_000)
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = list(corpus_rows(prose, tokenizer, rng))
    rows = [rows[i] for i in rng.permutation(len(rows))]
    write(folder / "corpus.jsonl", rows)
    for name, documents in (("target", target), ("held-out", held_out)):
        write(folder / f"{name}.jsonl", [{"text": document.text} for document in documents])
    select(folder)
    chosen = [json.loads(line) for line in (folder / "selected.jsonl").read_text().splitlines()]
    budget = sum(len(ids) for ids in encode(tokenizer, [row["text"] for row in chosen]))
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    write(folder / "random.jsonl", within(shuffled, budget, tokenizer))
    write(
        folder / "oracle.jsonl",
        within([row for row in shuffled if row["kind"] == "prose"], budget, tokenizer),
    )
    done.touch()


def select(folder: Path) -> None:
    """Filter the corpus as a user would."""
    command = [
        sys.executable,
        "-m",
        "curriq",
        "select",
        str(folder / "corpus.jsonl"),
        "--json",
        "--overwrite",
    ]
    command += ["--target", str(folder / "target.jsonl"), "--keep", str(KEEP), "--workers", "1"]
    command += ["--out", str(folder / "selected.jsonl"), "--tokenizer", str(folder / "tokenizer")]
    subprocess.run(command, check=True, stdout=(folder / "selected.json").open("w"))


def train(folder: Path, seed: int, arm: str) -> None:
    """Train an arm of a seed, if it has not been."""
    run_dir = folder / "runs" / arm
    if (run_dir / "summary.json").exists() and read_summary(run_dir)["finished"]:
        return
    if (run_dir / "checkpoints").exists():
        curriq.resume(run_dir)
        return
    held_out = SourceConfig(name="prose", path=str(folder / "held-out.jsonl"), weight=0.0)
    config = curriq.preset("small").override(
        sources=(SourceConfig(name=arm, path=str(folder / f"{arm}.jsonl")), held_out),
        target="prose",
        held_out_share=0.9,
        selector="uniform",
        tokenizer=str(folder / "tokenizer"),
        steps=STEPS,
        seed=seed,
        split_seed=seed,
        run_dir=str(run_dir),
        threads=1,
        tensorboard=False,
        progress="none",
    )
    curriq.run(config)


def losses(out: Path, seeds: list[int], arm: str) -> np.ndarray:
    return np.array([read_summary(out / str(seed) / "runs" / arm)["test_loss"] for seed in seeds])


def changes(out: Path, seeds: list[int], arm: str, baseline: str) -> list[WindowChanges]:
    found = []
    for seed in seeds:
        here, there = (read_test_losses(out / str(seed) / "runs" / name) for name in (arm, baseline))
        assert here is not None
        assert there is not None
        found.append(WindowChanges(here.losses - there.losses, here.tokens, here.ids))
    return found


def report(out: Path, seeds: list[int]) -> None:
    print(f"{len(seeds)} seeds, {STEPS} steps of 32 windows of 32 tokens, {KEEP:.0%} of the tokens kept")
    print("\nseed  prose in corpus  in what is kept  test loss: " + "  ".join(f"{arm:>8}" for arm in ARMS))
    for seed in seeds:
        shares = []
        for name in ("corpus", "selected"):
            rows = [json.loads(line) for line in (out / str(seed) / f"{name}.jsonl").open()]
            sizes = [(len(row["text"]), row["kind"] == "prose") for row in rows]
            shares.append(sum(n for n, wanted in sizes if wanted) / sum(n for n, _ in sizes))
        ends = "  ".join(f"{losses(out, [seed], arm)[0]:8.4f}" for arm in ARMS)
        print(f"{seed:4}  {shares[0]:15.1%}  {shares[1]:15.1%}  {'':10} {ends}")
    print("\nchange of the test loss, nats per token [over seeds and text], p of the sign-flip test")
    for arm, baseline in (("selected", "random"), ("oracle", "random"), ("selected", "oracle")):
        found = summarise_differences(
            losses(out, seeds, arm), losses(out, seeds, baseline), changes(out, seeds, arm, baseline)
        )
        interval = (
            ""
            if found.low_with_text is None
            else f"[{found.low_with_text:+.3f}, {found.high_with_text:+.3f}]"
        )
        print(f"{arm:>9} − {baseline:<7} {found.mean:+.3f} {interval}  p {found.p:.3f}  {found.verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--out", type=Path, default=Path("runs/selected"))
    options = parser.parse_args()
    for seed in options.seeds:
        folder = options.out / str(seed)
        prepare(folder, seed)
        for arm in ARMS:
            train(folder, seed, arm)
            print(
                f"seed {seed}: {arm} {read_summary(folder / 'runs' / arm)['test_loss']:.4f}", file=sys.stderr
            )
    report(options.out, options.seeds)


if __name__ == "__main__":
    main()
