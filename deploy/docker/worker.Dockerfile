# A worker with PyTorch for CPUs. Build from the project's root:
#   docker build -f deploy/docker/worker.Dockerfile -t loscar-worker .
# For NVIDIA GPUs add --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126, or the folder of another CUDA
# version that PyTorch's index has; the host needs NVIDIA's driver and container toolkit.
# Any image with Python 3.11 or newer, venv and pip will do as a base.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS dependencies
# How pip finds packages; left out, it uses its own index.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
# Where PyTorch comes from; empty: from where everything else comes.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv --without-pip /opt/loscar
WORKDIR /build
COPY pyproject.toml constraints.txt deploy/docker/requirements.py wheels* /build/
RUN python3 requirements.py worker metrics > requirements.txt \
    && python3 -m pip --python /opt/loscar/bin/python install --find-links /build \
        ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -c constraints.txt -r requirements.txt

FROM dependencies AS project
COPY . /build
RUN python3 -m pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE_IMAGE}
# Volumes take over the owner of the folder that they cover.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin loscar \
    && cd /var/lib && install -d -o loscar -g loscar loscar loscar/data loscar/models loscar/states
# The dependencies in a layer of their own, which a change of the code leaves as it is.
COPY --from=dependencies /opt/loscar /opt/loscar
COPY --from=project /wheels /wheels
COPY --from=project /build/deploy/docker/entry.sh /opt/loscar/bin/loscar-entry
COPY --from=project /build/deploy/docker/health.sh /opt/loscar/bin/loscar-health
RUN python3 -m pip --python /opt/loscar/bin/python install --disable-pip-version-check --no-cache-dir --no-index \
        --no-deps /wheels/*.whl
ENV PATH=/opt/loscar/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 LOSCAR_DATA_DIR=/var/lib/loscar/data
USER 10001:10001
WORKDIR /var/lib/loscar
HEALTHCHECK --interval=60s --timeout=30s --start-period=120s --retries=3 CMD ["loscar-health", "worker"]
ENTRYPOINT ["loscar-entry"]
CMD ["worker"]
