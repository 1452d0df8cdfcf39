"""What a patched model works with; docs/support.md is made from the outcomes of these tests."""
