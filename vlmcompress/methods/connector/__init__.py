"""Methods that act between vision tower and language model."""
