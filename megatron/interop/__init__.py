"""The interop package; ARCHITECTURE.md says what lives here."""
