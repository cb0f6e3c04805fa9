"""Parts of the Megatron engine; nothing here imports megatron-core before a run opens that engine."""
