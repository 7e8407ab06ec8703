"""The whole way as functions, one a step: what a command asks for is asked for here, and a program calls them too.

    tokenize_corpus  ->  mix_stores  ->  pack_rows  ->  train_model  ->  evaluate_model  ->  write_report

All are names of `longspan`. The first and the last are those of `data.tokenize` and `report`, which need no more than
their own room.
"""
