"""The engine package; ARCHITECTURE.md says what lives here."""
