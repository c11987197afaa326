"""The image service: prompt in, PNG out, over HTTP."""
