"""The model card: what a model is, how it was made, what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from prefopt.config import RunConfig, dump
from prefopt.engine.folder import RunFolder
from prefopt.errors import redact


def card(config: RunConfig, folder: RunFolder, facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Markdown with the front matter that model hubs read. Names no home folder: a model may be published."""
    info = json.loads(folder.info.read_text("utf-8"))
    kind = "text-classification" if config.algorithm.trains_reward else "text-generation"
    head = dump({"library_name": "transformers", "pipeline_tag": kind, "tags": ["prefopt", config.algorithm.name]})
    rows = "\n".join(f"| `{name}` | {_number(value)} |" for name, value in metrics.items())
    versions = ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    data = "\n".join(f"- `{name}`, sha256 `{digest}`" for name, digest in info["data"].items())
    paper = f" Paper: {config.algorithm.paper}." if config.algorithm.paper else ""
    text = f"""---
{head}---

# {config.algorithm.name} on `{config.model.path}`

{config.algorithm.summary()}{paper} Trained with prefopt.

{_result(config)}

## Data

Source `{config.data.source.name}`.
{data}

## How it ended

{facts["outcome"]} after {facts["steps"]} steps and {facts["updates"]} updates. Tokens: {json.dumps(facts["budget"])}.

| last metrics | |
|---|---|
{rows}

## Configuration

```yaml
{folder.config.read_text("utf-8")}```

{versions}
"""
    return str(redact(text.replace(os.path.expanduser("~/"), "~/")))


def _result(config: RunConfig) -> str:
    if config.algorithm.trains_reward:
        return (
            "A reward model: `AutoModelForSequenceClassification` gives one score for prompt, completion and "
            "end-of-sequence token, read at the last token that is not padding."
        )
    return "A causal language model: load it with `AutoModelForCausalLM.from_pretrained`."


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
