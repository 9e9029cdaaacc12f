"""A transformers model as this library sees it: which layers can be factorized, and where their weights are."""
