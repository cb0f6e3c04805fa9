"""Upcycling against continued dense training and MoE training from scratch, at equal budgets."""
