"""A config → its model without weights, which says names and shapes and takes no memory."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights


def weightless(build: Callable[..., Any], config: Any, **options: Any) -> Any:
    """What `build` makes of a config, on the meta device; it may keep the config, and change it."""
    with init_empty_weights(), torch.device("meta"):
        return build(config, **options)
