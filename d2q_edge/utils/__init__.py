"""Helpers without a domain: files, locks, JSON, progress, the machine."""
