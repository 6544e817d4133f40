"""The training package; ARCHITECTURE.md says what lives here."""
