"""What the Megatron engine is made of; nothing here is imported before that engine is chosen."""
