"""The ops package; ARCHITECTURE.md says what lives here."""
