"""The recipe of the D2Quant paper itself, in torch: the yardstick that the ablation compares ours with."""
