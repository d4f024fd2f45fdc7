"""Figures, tables and numbers of the paper, made only from saved frames."""
