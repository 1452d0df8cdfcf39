"""Methods inside the language model, one file each."""
