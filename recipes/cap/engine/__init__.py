"""Forward passes of an engine: an extension that its workers record them with, and what reads the record."""
