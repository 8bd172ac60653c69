"""A step as the mathematics has it: noise, passes, loss, KL; and passes that take any guide and any handler."""
