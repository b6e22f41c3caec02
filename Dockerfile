# datapipe in an image: docs/deploy.md says how to run it, compose.yaml does.
# The Python is that of .python-version, with which the tests are run.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
# every version and hash as locked; wheels, so that nothing is compiled (nkeys has none, and is Python)
COPY requirements.txt deploy/requirements-build.txt /src/
RUN python -m venv /opt/datapipe \
    && /opt/datapipe/bin/python -m pip install --no-cache-dir --require-hashes --only-binary :all: \
        -r /src/requirements-build.txt \
    && /opt/datapipe/bin/python -m pip install --no-cache-dir --require-hashes --only-binary :all: \
        --no-binary nkeys --no-build-isolation --no-compile -r /src/requirements.txt
COPY pyproject.toml setup.cfg README.md LICENSE /src/
COPY datapipe /src/datapipe
COPY templates /src/templates
# nobody may write there later, so it is byte-compiled now; what installs goes
RUN /opt/datapipe/bin/python -m pip install --no-cache-dir --no-compile --no-deps --no-index \
        --no-build-isolation /src \
    && /opt/datapipe/bin/python -m pip uninstall --yes --quiet setuptools pip \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/datapipe/lib

FROM python:${PYTHON}-slim-bookworm
LABEL org.opencontainers.image.title="datapipe" \
    org.opencontainers.image.description="Takes JSON events by HTTP POST and loads them into a database: none lost, none twice" \
    org.opencontainers.image.licenses="MIT"

# a fixed number, so that volumes and runAsNonRoot can rely on it
RUN useradd --uid 10001 --user-group --no-log-init --no-create-home \
        --home-dir /var/lib/datapipe --shell /usr/sbin/nologin datapipe \
    && install --directory --owner datapipe --group datapipe --mode 0700 /var/lib/datapipe \
    && install --directory /srv/datapipe
COPY --from=build /opt/datapipe /opt/datapipe

ENV PATH="/opt/datapipe/bin:${PATH}" \
    PYTHONDONTWRITEBYTECODE=1 \
    DATAPIPE_DATA_DIR=/var/lib/datapipe

# modules of event types, which `event_modules` names, are found here
WORKDIR /srv/datapipe
USER 10001:10001
VOLUME /var/lib/datapipe
EXPOSE 8080
STOPSIGNAL SIGTERM
# whether the process lives. It says nothing of the database: no restart would bring that back
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s CMD ["python", "-ISc", "import http.client, os; port = os.environ.get('DATAPIPE_PORT') or os.environ.get('PORT') or 8080; h = http.client.HTTPConnection('localhost', port, timeout=4); h.request('GET', '/healthz'); raise SystemExit(h.getresponse().status != 200)"]
ENTRYPOINT ["datapipe"]
CMD ["serve"]
