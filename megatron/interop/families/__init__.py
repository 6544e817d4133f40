"""The families package; ARCHITECTURE.md says what lives here."""
