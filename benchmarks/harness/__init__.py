"""The league: every way to make a Vision Transformer cheaper, under the same rules. See docs/benchmarks/README.md.

config -> reading, parents -> methods -> runner (training, measuring, rules) -> result -> tables, plots, checking.
"""
