"""RULER (Hsieh et al., arXiv 2404.06654): 13 tasks of retrieval, tracing, counting and question answering."""
