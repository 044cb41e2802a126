"""Factors at work inside torch models. Knows no files."""
