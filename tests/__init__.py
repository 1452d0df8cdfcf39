"""Tests of vlmcompress."""
