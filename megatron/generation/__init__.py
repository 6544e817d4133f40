"""The generation package; ARCHITECTURE.md says what lives here."""
