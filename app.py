from moebius_jax.cli.demo import main  # what a Hugging Face Space of this repository runs

main(["--host", "0.0.0.0"])
