"""From files to rows, from rows to sequences, from sequences to tokens. No model, no loss."""
