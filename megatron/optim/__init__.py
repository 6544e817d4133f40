"""The optim package; ARCHITECTURE.md says what lives here."""
