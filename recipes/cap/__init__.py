"""Cost, accuracy and performance of models on the hardware at hand, after MoE-CAP.

Source: Y. Jiang et al., "MoE-CAP", arXiv:2412.07067. Definitions and units are in ``docs/cap.md``.
"""
