"""Read Hugging Face models: checkpoints, the hub, model families, tokenizers, and blocks that run in transformers."""
