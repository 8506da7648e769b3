"""The package format, shared by compiler and runtime. It does not import torch."""
