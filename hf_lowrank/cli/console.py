"""Where commands print: tables and sentences for people, JSON for machines."""

import json
import sys
from typing import Any

from rich.console import Console

# Formulas and names hold brackets, so no markup; a file or a pipe is not 80 columns wide.
console = Console(markup=False, width=None if sys.stdout.isatty() else 140)


def print_json(record: dict[str, Any]) -> None:
    """Print plain JSON, without colours or wrapping."""
    print(json.dumps(record, indent=2))
