"""A saved model: writing, reading, checking, describing and publishing its folder."""
