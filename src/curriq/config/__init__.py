"""The settings of a run: one frozen dataclass per component, which validates itself and exists once.

Field names are unique over all sections, so that the command line can be flat (`--beta 0.5`) while
the TOML file has sections (`[critic] beta = 0.5`). The docstring under each field is its help text.
"""

# ruff: noqa: F401, I001 (the names that this package offers, a few lines per module)

from curriq.config.aliases import FORMER
from curriq.config.bounds import IN_MEMORY, Section, Within
from curriq.config.checks import did_you_mean, errors_name, flag, missing_extra, refuse_unknown, require
from curriq.config.checks import other_name, require_known
from curriq.config.describe import describe, describe_fields
from curriq.config.run import SIZES, RunConfig, differences, field_owners, flat_settings, format_source
from curriq.config.run import from_dict, load_run_config, load_toml, read_tables, source_table
from curriq.config.run import to_dict, to_toml, validated
from curriq.config.schema import run_schema
from curriq.config.search import WITHOUT_QUERY, LangevinConfig, RetrievalConfig
from curriq.config.sections import EMBEDDED_SOURCES, SELECTORS, CorruptionName, FeatureName
from curriq.config.sections import CriticConfig, DataConfig, EvalConfig, LMConfig
from curriq.config.sections import LogConfig, OptimConfig, SelectConfig
from curriq.config.sections import SourceConfig, TokenizerConfig, TrainConfig
