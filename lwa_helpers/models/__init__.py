"""Language models: which are known, how they load, their layers, vocabulary, precision and export."""
