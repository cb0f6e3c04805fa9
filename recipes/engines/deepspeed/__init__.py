"""DeepSpeed engine: ZeRO for MoE models.

`recipes.engines.deepspeed.moe_engine` imports DeepSpeed, which takes seconds: import it only to wrap a model.
"""
