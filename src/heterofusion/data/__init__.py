"""Rows of data as prompts, answers and tokens."""
