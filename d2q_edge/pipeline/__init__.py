"""From an opened checkpoint to quantized blocks and the file: planning, the block loop, resuming, refinement."""
