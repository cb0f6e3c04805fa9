"""Certifies that programs which serve an exported mixture compute what its trainer does, expert by expert."""
