"""Routers on multi-task tables, COMET's own ground: a generated recommendation set, a model, a comparison."""
