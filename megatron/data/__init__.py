"""The data package; ARCHITECTURE.md says what lives here."""
