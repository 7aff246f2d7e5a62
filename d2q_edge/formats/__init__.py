"""The block formats of quantized tensors, and GGUF files."""
