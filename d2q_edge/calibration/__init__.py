"""Calibration data: texts, token windows, and the hidden states of their tokens between two blocks."""
