"""Command line and YAML files -> one validated, frozen configuration."""

from configs.command_line import argument_parser
from configs.config import Config, ConfigError
from configs.derived import BatchPlan, LearningRates, batch_plan, learning_rates, run_folder
from configs.load import choices_in_words, config_from_args, dump, load_config, teacher_config

__all__ = [
    "BatchPlan",
    "Config",
    "ConfigError",
    "LearningRates",
    "argument_parser",
    "batch_plan",
    "choices_in_words",
    "config_from_args",
    "dump",
    "learning_rates",
    "load_config",
    "run_folder",
    "teacher_config",
]
