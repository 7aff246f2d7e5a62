"""The recipe of the D2Quant paper, in torch: the baseline of the ablation."""
