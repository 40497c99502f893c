"""Passes from module to module: apply a Plan, lift a model into a supernet, ask which parameters hang together."""
