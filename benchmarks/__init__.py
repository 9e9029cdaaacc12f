"""What the library's speed and memory claims are measured by: `python -m benchmarks --help`."""
