"""What is told to people: the inspection of a model, the report of a conversion, a model card."""
