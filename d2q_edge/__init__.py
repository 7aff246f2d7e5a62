"""d2q-edge: 2- and 3-bit GGUF files for llama.cpp on laptops and phones (D2Quant, arXiv 2602.02546)."""

__version__ = "0.1.0"
