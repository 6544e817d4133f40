"""The launch package; ARCHITECTURE.md says what lives here."""
