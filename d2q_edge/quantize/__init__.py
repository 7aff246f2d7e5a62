"""The quantizer: one algorithm per file, on torch tensors.

Nothing here knows about files, model families or GGUF: weights and calibration statistics in, block scales, codebooks
and codes out (tensor_types.py packs them).
"""
