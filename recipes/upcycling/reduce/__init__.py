"""The way back to fewer experts or none: text that a mixture reads, mixed experts, checks of files."""
