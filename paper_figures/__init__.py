"""Figures and tables of theory and practice: one module each, all made by ``python -m paper_figures``.

Not part of the installed package: run from the root of the repository.
"""
