"""The config package; ARCHITECTURE.md says what lives here."""
