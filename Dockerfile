# The page of demo.py in a container.
#
#   docker build -t moebius-jax .                                  # CPU
#   docker build -t moebius-jax:cuda --build-arg EXTRAS=demo,convert,cuda .   # NVIDIA, driver 580 or newer
#   docker run --rm -p 127.0.0.1:7860:7860 -v moebius:/weights moebius-jax
#   docker run --rm --gpus all -p 127.0.0.1:7860:7860 -v moebius:/weights moebius-jax:cuda
#
# Downloaded and converted weights, and compiled programs, are kept in the volume /weights.
FROM python:3.12-slim
ARG EXTRAS=demo,convert
RUN useradd --create-home --uid 1000 painter && mkdir /weights && chown painter /weights
WORKDIR /app
COPY pyproject.toml README.md LICENSE train.py ./
COPY LICENSES LICENSES
COPY configs configs
COPY moebius_jax moebius_jax
# PyPI's torch, which only converts released checkpoints, would bring CUDA along.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu ".[${EXTRAS}]"
USER painter
ENV HF_HOME=/weights XDG_CACHE_HOME=/weights
VOLUME /weights
EXPOSE 7860
ENTRYPOINT ["moebius-demo", "--host", "0.0.0.0", "--port", "7860"]
