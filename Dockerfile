# A GPU image that trains as an ordinary user. Build: docker build -t deepy .
# Run:  docker run --gpus all --shm-size 8g -it -v "$PWD/data:/home/deepy/deepy/data" deepy
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# openssh and pdsh are for several machines (docs/multinode.md), g++ is for the image's nvcc; the rest is what Python and git need.
RUN apt-get update && apt-get install -y --no-install-recommends \
        ca-certificates g++ git make openssh-client pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --shell /bin/bash deepy
USER deepy
WORKDIR /home/deepy/deepy

# The requirements first, so that a change of the code does not install torch again.
COPY --chown=deepy requirements requirements
RUN python3 -m venv .venv \
    && .venv/bin/pip install -c requirements/lock.txt torch setuptools \
    && DS_BUILD_OPS=0 .venv/bin/pip install -c requirements/lock.txt -r requirements/requirements.txt \
        -r requirements/wandb.txt -r requirements/tensorboard.txt
COPY --chown=deepy . .
RUN .venv/bin/pip install --no-deps --no-build-isolation -e . && touch .venv/.installed

ENV PATH="/home/deepy/deepy/.venv/bin:$PATH"
CMD ["./deepy.py", "doctor"]
