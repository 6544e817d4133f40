"""The schema package; ARCHITECTURE.md says what lives here."""
