"""Looks inside a mixture: how its experts are used on text, and how alike they are."""
