"""Many models and what was measured of them: each study with its own figures."""
