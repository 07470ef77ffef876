"""Captions as token states: any number of frozen text encoders, joined as one token sequence."""
