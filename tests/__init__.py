"""Tests, one file per module of d2q_edge."""
