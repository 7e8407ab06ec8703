"""Rows as training reads them: through a plan, with their documents, weights and a teacher's predictions."""
