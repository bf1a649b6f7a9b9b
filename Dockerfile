# The package on NVIDIA's PyTorch image, whose torch stays (MEGATRON_RAL_CONTAINER in launch_scripts/setup.sh).
# This file has not been built: no image could be pulled where it was written. Choose a tag whose torch is 2.11 to 2.13.
ARG BASE=nvcr.io/nvidia/pytorch:26.03-py3
FROM ${BASE}
WORKDIR /workspace/megatron_ral
ENV MEGATRON_RAL_CONTAINER=1
COPY . .
RUN bash -c 'set -e; source launch_scripts/setup.sh; setup_environment'
ENV PATH=/workspace/megatron_ral/.venv/bin:${PATH}
CMD ["megatron-ral", "--help"]
