"""The passes of a mean-field guide, as two vectors and one handler."""
