"""What a mixture of experts really uses of the hardware: cost, accuracy and performance, after MoE-CAP.

Source: Y. Jiang et al., "MoE-CAP", arXiv:2412.07067. Definitions and units are in ``docs/cap.md``.
"""
