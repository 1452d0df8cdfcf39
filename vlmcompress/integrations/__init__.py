"""Other projects that vlmcompress plugs into, one package each; imported by them alone."""
