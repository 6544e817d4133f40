"""The objectives package; ARCHITECTURE.md says what lives here."""
