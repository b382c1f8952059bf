"""The pins with hashes are those without."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHOSEN_BY_MACHINE = re.compile("torch|triton|nvidia-.*|cuda-.*")


def pins(name: str) -> dict[str, str]:
    """Package → version and marker."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = (re.match(r"([\w.-]+)==([^\\]*)", line) for line in lines)
    return {match[1]: match[2].strip() for match in found if match}


def test_the_pins_with_hashes_agree_with_the_others():
    plain, hashed = pins("constraints.txt"), pins("constraints-hashes.txt")
    assert len(hashed) > 80
    for package, version in hashed.items():
        assert plain[package].split(" ")[0] == version.split(" ")[0], (
            f"{package}: `make constraints-hashes.txt`"
        )
        assert not CHOSEN_BY_MACHINE.fullmatch(package)


def test_every_pin_has_a_hash():
    text = (ROOT / "constraints-hashes.txt").read_text(encoding="utf-8")
    entries = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry) for entry in entries)


def test_what_the_tests_need_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    wanted += project["optional-dependencies"]["dev"] + project["optional-dependencies"]["report"]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted}
    assert {name for name in names if not CHOSEN_BY_MACHINE.fullmatch(name)} <= set(
        pins("constraints-hashes.txt")
    )
