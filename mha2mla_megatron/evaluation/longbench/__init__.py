"""LongBench v1: answers to questions over long contexts, generated greedily and scored as its authors do."""
