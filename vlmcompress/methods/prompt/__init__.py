"""Parts of methods that rewrite the embedded prompt, one file each."""
