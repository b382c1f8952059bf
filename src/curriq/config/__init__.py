"""One frozen dataclass per component; each validates itself and exists once.

Field names are unique over all sections, so that the command line can be flat (`--beta 0.5`) while
the TOML file has sections (`[critic] beta = 0.5`). The docstring under each field is its help text.
"""

from curriq.config.checks import (
    did_you_mean,
    flag,
    missing_extra,
    require,
    require_at_least,
    require_positive,
    require_share,
    unknown_key,
)
from curriq.config.critic import CriticConfig, FeatureName
from curriq.config.evaluation import EvalConfig
from curriq.config.langevin import (
    WITHOUT_Q,
    WITHOUT_QUERY,
    LangevinConfig,
    RetrievalConfig,
)
from curriq.config.run import (
    RunConfig,
    check_source_tables,
    differences,
    field_owners,
    format_source,
    from_dict,
    load_run_config,
    load_toml,
    source_from_dict,
    to_dict,
    to_toml,
)
from curriq.config.sections import (
    EMBEDDED_SOURCES,
    CorruptionName,
    DataConfig,
    LMConfig,
    LogConfig,
    OptimConfig,
    SelectConfig,
    SelectorName,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = [
    "EMBEDDED_SOURCES",
    "WITHOUT_Q",
    "WITHOUT_QUERY",
    "CorruptionName",
    "CriticConfig",
    "DataConfig",
    "EvalConfig",
    "FeatureName",
    "LMConfig",
    "LangevinConfig",
    "LogConfig",
    "OptimConfig",
    "RetrievalConfig",
    "RunConfig",
    "SelectConfig",
    "SelectorName",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "check_source_tables",
    "did_you_mean",
    "differences",
    "field_owners",
    "flag",
    "format_source",
    "from_dict",
    "load_run_config",
    "load_toml",
    "missing_extra",
    "require",
    "require_at_least",
    "require_positive",
    "require_share",
    "source_from_dict",
    "to_dict",
    "to_toml",
    "unknown_key",
]
