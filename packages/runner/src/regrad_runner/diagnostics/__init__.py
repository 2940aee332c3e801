"""What is measured beside the result: effects, gradient quality, memory, explanations."""
