"""The tokenizer package; ARCHITECTURE.md says what lives here."""
