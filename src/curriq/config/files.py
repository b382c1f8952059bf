"""A run's settings to a dictionary, a TOML file or a word of the command line, and back."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from curriq.config.aliases import FORMER
from curriq.config.checks import errors_name
from curriq.config.run import RunConfig, field_owners
from curriq.config.sections import SourceConfig
from curriq.config.values import refuse_unknown, source_tables, validated
from curriq.errors import CurriqError


def from_dict(values: dict[str, Any], base: RunConfig | None = None) -> RunConfig:
    """A RunConfig from nested plain values; what is absent keeps the value it has in `base`.

    Raises:
        CurriqError: an unknown section or key, a value of the wrong type, or a refused value.
    """
    return (base or RunConfig()).override(**flat_settings(values))


def flat_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Flat name → plain value, from nested plain values.

    Raises:
        CurriqError: an unknown section or key.
    """
    refuse_unknown(values, RunConfig.__dataclass_fields__)
    flat: dict[str, Any] = {}
    for section, settings in values.items():
        if not isinstance(settings, dict):
            raise CurriqError(f"[{section}] must be a table of settings, not {settings!r}.")
        own = [name for name, owner in field_owners().items() if owner == section]
        refuse_unknown([name for name in settings if name not in FORMER], own, f"[{section}] ")
        flat |= settings
    return flat


def source_from_dict(values: dict[str, Any]) -> SourceConfig:
    """One source from plain values.

    Raises:
        CurriqError: an unknown key, a missing one, a value of the wrong type, or a refused value.
    """
    return validated(SourceConfig, source_tables([values])[0], "source: {}".format)


def format_source(source: SourceConfig) -> str:
    """A source as one word of key=value pairs, without what is at its default; the command line reads it."""
    defaults = {field.name: field.default for field in dataclasses.fields(source)}
    return ",".join(f"{key}={value}" for key, value in vars(source).items() if value != defaults[key])


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        CurriqError: no such file, or no valid TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CurriqError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise CurriqError(f"{path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CurriqError(f"{path} is not valid TOML: {error}.") from None


def load_toml(path: str | Path, base: RunConfig | None = None) -> RunConfig:
    """Read a run file over `base` (the defaults when None).

    Raises:
        CurriqError: no such file, no valid TOML, or a setting that `from_dict` refuses.
    """
    values = read_tables(Path(path))
    with errors_name(path):
        return from_dict(values, base)


def load_run_config(run_dir: Path) -> RunConfig:
    """The configuration that a run wrote into its folder.

    Raises:
        CurriqError: the folder holds no run, or its configuration cannot be read.
    """
    settings = run_dir / "config.toml"
    if not settings.exists():
        raise CurriqError(f"{run_dir} is not the folder of a run: there is no {settings.name} in it.")
    return load_toml(settings)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values, in TOML's and JSON's types; `from_dict(to_dict(c)) == c`."""
    return {
        section: {
            name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()
        }
        for section, settings in dataclasses.asdict(config).items()
    }


def to_toml(config: RunConfig) -> str:
    """The whole configuration as a TOML document that `load_toml` reads back."""
    import tomlkit

    return tomlkit.dumps(to_dict(config))
