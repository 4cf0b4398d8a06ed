"""Merges of experts that share a base."""
