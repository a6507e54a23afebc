"""README.md of an exported draft: what it is, where it comes from, how to serve it."""

from __future__ import annotations

from typing import Any

import colospec
from colospec.draft.public import CardText
from colospec.target import Target

_CARD = """\
---
library_name: transformers
tags:
- speculative-decoding
- {tag}
- colospec
---

# {title} draft model for {target}

Proposes the next tokens of **{target}**, which verifies them: the output stays the target's own, it
only comes faster. Trained with colospec {version}. The input embedding is not in this directory:
engines share the target's.

| fact | value |
|---|---|
{facts}

## Serve

Replace `TARGET` by the target model and `DRAFT` by this directory.

{serve}
Acceptance depends on target, prompts and sampling: measure it on your own traffic. Metrics above
that are called simulated are estimates from training accuracy.
"""


def model_card(target: Target, dtype: str, text: CardText, facts: dict[str, Any]) -> str:
    """Return the card of a draft for `target`; `facts` is any flat or nested JSON about its
    training."""
    kind = ", ".join(target.hf_config.get("architectures") or ())
    rows = {
        "target": f"{target.name} ({kind or 'text model'}, hidden size {target.hidden_size:,})",
        **text.rows,
        "dtype": dtype,
        **_flat(facts),
    }
    table = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())
    return _CARD.format(
        target=target.name,
        title=text.title,
        tag=text.tag,
        version=colospec.__version__,
        facts=table,
        serve=text.serve,
    )


def _flat(facts: dict[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            flat |= {f"{name}: {key}": text for key, text in _flat(value).items()}
        else:
            flat[name.replace("_", " ")] = (
                f"{value:.4g}" if isinstance(value, float) else str(value)
            )
    return flat


def _cell(text: str) -> str:
    """Keep text inside its table cell."""
    return " ".join(text.replace("|", "/").split())
