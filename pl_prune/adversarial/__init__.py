"""Attacks, robust losses, and an evaluation of robustness: torch only."""
