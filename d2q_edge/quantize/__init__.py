"""The quantizer's algorithms, one per file: tensors in, tensors out.

Weights and calibration statistics go in; block scales, codebooks and codes come out (see QuantizedLayer).
"""
