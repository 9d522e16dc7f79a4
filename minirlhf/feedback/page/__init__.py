"""A page on which a person says what is good: python -m minirlhf.feedback RUN."""
