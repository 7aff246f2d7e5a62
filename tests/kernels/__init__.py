"""Tests of the C side: the installed patched runtime, the patch series, the kernels' sources compiled here."""
