"""Processes that share a conversion: how they are started, and their collectives."""
