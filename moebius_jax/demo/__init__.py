"""A page to paint on: `painter` knows pictures and the pipeline, `page` knows gradio.

Needs the extra `demo`.
"""
