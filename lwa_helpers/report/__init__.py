"""Figures, tables and numbers of the paper, from saved frames alone."""
