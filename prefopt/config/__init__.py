"""Configuration: what a YAML file may say, and what is wrong with it."""

from prefopt.config.load import (
    allowed_in,
    allowed_plugins,
    anchored,
    load_run,
    load_suite,
    located,
    read_document,
    redacted_keys,
    resolved,
    run_from,
    schema,
)
from prefopt.config.models import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ReferenceConfig,
    RunConfig,
    RunSection,
    SuiteConfig,
)
from prefopt.config.stages import Stage, holds_stages, stages_of
from prefopt.config.yaml import Document, dump

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "Document",
    "EvalConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "ReferenceConfig",
    "RunConfig",
    "RunSection",
    "Stage",
    "SuiteConfig",
    "allowed_in",
    "allowed_plugins",
    "anchored",
    "dump",
    "holds_stages",
    "load_run",
    "load_suite",
    "located",
    "read_document",
    "redacted_keys",
    "resolved",
    "run_from",
    "schema",
    "stages_of",
]
