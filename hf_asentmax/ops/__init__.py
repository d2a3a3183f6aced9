"""Differentiable alpha-entmax and alpha-entmax attention. Knows torch only."""
