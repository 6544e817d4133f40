"""The proof package; ARCHITECTURE.md says what lives here."""
