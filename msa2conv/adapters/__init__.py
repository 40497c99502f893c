"""Adapters know backbones: each finds the Sites of one family. The only importers of timm."""
