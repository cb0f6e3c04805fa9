"""Data of a run: documents or conversations, tokenised, cached, and packed into samples."""
