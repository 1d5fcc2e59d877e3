"""Rows that are made instead of written: drawn, labelled, revised. `work` and `lines`: batches, and the files they are
kept in. `labels`: verdicts become rows. `services`: models that draw and write. `kinds`: what the stages do with some
rows. `stage`: a stage from its configuration to its folder.
"""
