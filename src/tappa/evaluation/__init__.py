"""Evaluating compressed caches with lm-evaluation-harness."""
