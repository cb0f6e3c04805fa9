"""Weight files of a checkpoint, read and written in parts."""
