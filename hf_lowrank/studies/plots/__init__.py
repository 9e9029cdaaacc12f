"""Figures from plain records and dataclasses: nothing here measures anything."""
