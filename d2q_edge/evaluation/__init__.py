"""Measure GGUF files: perplexity and KL divergence, speed, and comparison with stock types of llama.cpp."""
