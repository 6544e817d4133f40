"""The parallel package; ARCHITECTURE.md says what lives here."""
