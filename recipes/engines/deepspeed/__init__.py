"""What DeepSpeed needs to know of a mixture, and what a checkpoint needs to know of ZeRO's partitions.

`wrap` imports DeepSpeed, which takes seconds: import it where a model is wrapped, not before.
"""
