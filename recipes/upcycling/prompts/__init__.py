"""Router rows from prompts: what each expert is to be good at, in words."""
