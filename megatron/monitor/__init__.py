"""The monitor package; ARCHITECTURE.md says what lives here."""
