# A parameter server: no PyTorch. Build from the project's root:
#   docker build -f deploy/docker/server.Dockerfile -t loscar-server .
# Any image with Python 3.11 or newer, venv and pip will do as a base.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS dependencies
# How pip finds packages; left out, it uses its own index.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv --without-pip /opt/loscar
WORKDIR /build
COPY pyproject.toml constraints.txt deploy/docker/requirements.py wheels* /build/
RUN python3 requirements.py certs metrics > requirements.txt \
    && python3 -m pip --python /opt/loscar/bin/python install --find-links /build -c constraints.txt -r requirements.txt

FROM dependencies AS project
COPY . /build
RUN python3 -m pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE_IMAGE}
# Volumes take over the owner of the folder that they cover.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin loscar \
    && install -d -o loscar -g loscar /var/lib/loscar /var/lib/loscar/checkpoints
# The dependencies in a layer of their own, which a change of the code leaves as it is.
COPY --from=dependencies /opt/loscar /opt/loscar
COPY --from=project /wheels /wheels
COPY --from=project /build/deploy/docker/entry.sh /opt/loscar/bin/loscar-entry
COPY --from=project /build/deploy/docker/health.sh /opt/loscar/bin/loscar-health
RUN python3 -m pip --python /opt/loscar/bin/python install --disable-pip-version-check --no-cache-dir --no-index \
        --no-deps /wheels/*.whl
ENV PATH=/opt/loscar/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /var/lib/loscar
EXPOSE 50051
HEALTHCHECK --interval=30s --timeout=20s --start-period=30s --retries=3 CMD ["loscar-health", "server"]
ENTRYPOINT ["loscar-entry"]
CMD ["server"]
