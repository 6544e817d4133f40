"""The model package; ARCHITECTURE.md says what lives here."""
