# docker build -t deepmim_scale . && docker run --gpus all --shm-size 8g -v DATA:/data -v RUNS:/runs \
#     deepmim_scale deepspeed --module deepmim_scale.train.pretrain --preset debug --data /data --output /runs/debug
# Apptainer: apptainer build deepmim_scale.sif docker-daemon://deepmim_scale:latest
# Written for CUDA 12.6; not yet built or run by us.
FROM nvidia/cuda:12.6.3-devel-ubuntu24.04
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv build-essential pdsh \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH OMP_NUM_THREADS=1
# cu126 wheels still have sm_70 up to torch 2.14.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cu126 "torch<2.15" torchvision
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir ".[sample,plots,clip,parquet,dali-cuda12]"
WORKDIR /work
CMD ["deepmim-scale", "--help"]
