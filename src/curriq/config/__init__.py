"""One frozen dataclass per component; each validates itself and exists once.

Field names are unique over all sections, so that the command line can be flat (`--beta 0.5`) while
the TOML file has sections (`[critic] beta = 0.5`). The docstring under each field is its help text.
"""

from curriq.config.aliases import FORMER as FORMER
from curriq.config.checks import Count as Count
from curriq.config.checks import Section as Section
from curriq.config.checks import did_you_mean as did_you_mean
from curriq.config.checks import errors_name as errors_name
from curriq.config.checks import flag as flag
from curriq.config.checks import missing_extra as missing_extra
from curriq.config.checks import require as require
from curriq.config.checks import require_at_least as require_at_least
from curriq.config.checks import require_known as require_known
from curriq.config.checks import unknown_key as unknown_key
from curriq.config.critic import CriticConfig as CriticConfig
from curriq.config.critic import FeatureName as FeatureName
from curriq.config.files import flat_settings as flat_settings
from curriq.config.files import format_source as format_source
from curriq.config.files import from_dict as from_dict
from curriq.config.files import load_run_config as load_run_config
from curriq.config.files import load_toml as load_toml
from curriq.config.files import read_tables as read_tables
from curriq.config.files import source_from_dict as source_from_dict
from curriq.config.files import to_dict as to_dict
from curriq.config.files import to_toml as to_toml
from curriq.config.langevin import PROPOSERS as PROPOSERS
from curriq.config.langevin import WITHOUT_Q as WITHOUT_Q
from curriq.config.langevin import WITHOUT_QUERY as WITHOUT_QUERY
from curriq.config.langevin import LangevinConfig as LangevinConfig
from curriq.config.langevin import RetrievalConfig as RetrievalConfig
from curriq.config.run import RunConfig as RunConfig
from curriq.config.run import differences as differences
from curriq.config.run import field_owners as field_owners
from curriq.config.sections import EMBEDDED_SOURCES as EMBEDDED_SOURCES
from curriq.config.sections import SELECTORS as SELECTORS
from curriq.config.sections import CorruptionName as CorruptionName
from curriq.config.sections import DataConfig as DataConfig
from curriq.config.sections import EvalConfig as EvalConfig
from curriq.config.sections import LMConfig as LMConfig
from curriq.config.sections import LogConfig as LogConfig
from curriq.config.sections import OptimConfig as OptimConfig
from curriq.config.sections import SelectConfig as SelectConfig
from curriq.config.sections import SourceConfig as SourceConfig
from curriq.config.sections import TokenizerConfig as TokenizerConfig
from curriq.config.sections import TrainConfig as TrainConfig
from curriq.config.values import refuse_unknown as refuse_unknown
from curriq.config.values import validated as validated
