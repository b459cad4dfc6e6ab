"""The paper's protocols: masks, images, metrics and reports; and what the networks cost."""
