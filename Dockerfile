# protlm for the CPU:
#   docker build --tag protlm .
#   docker run --rm --volume "$PWD:/data" --user "$(id -u):$(id -g)" protlm embed MODEL my_proteins.fasta --out embeddings.h5
# TORCH_INDEX chooses another build of torch. The fused attention for GPUs needs a C compiler at run time, which the image
# does not have: with a CUDA build attention runs on torch operations.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim-bookworm AS builder
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Debian keeps only the newest patch of a package, so that no version can be pinned.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
RUN python -m venv /opt/protlm
COPY constraints.txt .
RUN /opt/protlm/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY . .
RUN /opt/protlm/bin/pip install --no-cache-dir -c constraints.txt '.[parquet]' \
    && /opt/protlm/bin/protlm --version --verbose

FROM python:${PYTHON}-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=builder /opt/protlm /opt/protlm
# The user of --user has no home and no name here; the caches of libraries want both.
ENV PATH=/opt/protlm/bin:$PATH HOME=/tmp USER=protlm
USER 1000:1000
WORKDIR /data
ENTRYPOINT ["protlm"]
CMD ["--help"]
