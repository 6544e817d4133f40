"""The checkpoint package; ARCHITECTURE.md says what lives here."""
